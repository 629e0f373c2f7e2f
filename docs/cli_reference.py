"""Writes the reference of the command line, as Markdown, from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from amips_plugins import cli

__all__ = ["reference"]


def reference() -> str:
    """Describe every command: how it is called, what it does, its options."""
    group = cli.command
    with click.Context(group, info_name="amips") as top:
        parts = ["\n", "```text\n", group.get_help(top), "\n```\n"]
        for name in group.list_commands(top):
            found = group.get_command(top, name)
            if found is not None:
                parts += _described(found, name, top, level=2)
    return "".join(parts)


def _described(
    command: click.Command, name: str, parent: click.Context, level: int
) -> Iterator[str]:
    with click.Context(command, info_name=name, parent=parent) as ctx:
        yield f"\n{'#' * level} amips {ctx.command_path.removeprefix('amips ')}\n\n"
        yield f"```text\n{command.get_usage(ctx)}\n```\n\n"
        yield _text(command.help or "")
        # A group may build something itself, where no other verb is named: `amips layout URI`.
        verbs = command.commands if isinstance(command, click.Group) else {}
        itself = verbs.get("build", command)
        records = [
            record
            for param in itself.get_params(ctx)
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx))
        ]
        yield "\n| option | |\n|---|---|\n"
        for flags, about in records:
            yield f"| `{_cell(flags)}` | {_cell(about)} |\n"
        if isinstance(command, click.Group):
            for verb in command.list_commands(ctx):
                yield from _described(command.commands[verb], verb, ctx, level + 1)


def _text(text: str) -> str:
    """Turn click's paragraphs into Markdown's; those it must not rewrap become blocks."""
    parts = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(_block(one) if one.startswith("\b") else one for one in parts) + "\n"


def _block(lines: str) -> str:
    return "```text\n" + lines.removeprefix("\b").strip("\n") + "\n```"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
