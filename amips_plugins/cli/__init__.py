"""The ``amips`` command: one module per subcommand, loaded when it is called."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import shlex
import sys
import warnings
from typing import Any

import click
from click.shell_completion import CompletionItem

from amips_plugins.errors import AmipsError

__all__ = ["command", "main"]

_COMMANDS = {
    "demo": "Try it all on the docstrings of the installed Python packages.",
    "tune": "Find the cheapest settings that hold a recall target, and set them.",
    "doctor": "Say whether routing would pay for a collection; nothing is changed.",
    "snapshot": "Copy a collection's ids and vectors to a folder.",
    "train": "Train a router on a snapshot and a log of queries.",
    "report": "Show a training, or a bundle, as one HTML page.",
    "publish": "Put a trained bundle into a registry.",
    "layout": "Put a collection into the cells of its bundle; status, rollback, drop-old.",
    "cell-file": "Write a snapshot into a cell file, for collections bigger than memory.",
    "backfill": "Give the keys that others have written their cells.",
    "status": "Say how a collection's router does, and what to do about it.",
    "evaluate": "Compare native and learned search on your own queries.",
    "export-cells": "Write a bundle's cells and router as plain tensors, for other programs.",
    "registry": "List, pin and roll back published bundles.",
    "completion": "Let bash, zsh or fish complete commands and options.",
}

_LONGEST = 800  # characters of somebody else's error

# What these have done is kept, and found again by the same command. The others are short, or
# only read.
_GO_ON = frozenset({"demo", "snapshot", "train", "publish", "layout", "backfill", "tune"})


class _Commands(click.Group):
    """Lists commands without importing them, so that ``amips --help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module = cmd_name.replace("-", "_")
        found: click.Command = importlib.import_module(f"{__name__}.{module}").command
        return found

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        named = [
            CompletionItem(name, help=about)
            for name, about in _COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*named, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands, in the order you would use them"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="amips-plugins", prog_name="amips")
@click.option("--debug", is_flag=True, help="Show tracebacks. May stand anywhere.")
@click.pass_context
def command(ctx: click.Context, debug: bool) -> None:
    """Make a Milvus or Qdrant collection cheaper to search by learning from its queries.

    To see it work on this machine, in some minutes: amips demo

    The main job, from a collection to a cheaper search:

    \b
      amips snapshot URI -o snap/                          copy ids and vectors
      amips train snap/ --queries queries.npy -o run/      learn; says whether it pays
      amips publish run/                                   into ./registry
      amips layout URI                                     cells, while others read and write
      amips evaluate URI --queries test.npy                what it gained

    URI names a collection:

    \b
      milvus:///path/docs.db?collection=docs      Milvus Lite
      milvus://localhost:19530?collection=docs    Milvus server
      qdrant:///path/folder?collection=docs       Qdrant, embedded
      qdrant://localhost:6333?collection=docs     Qdrant server
      qdrant-edge:///path/folder?collection=docs  Qdrant Edge, embedded
      cells:///path/docs.cells                    a cell file, or cells+s3://bucket/docs.cells

    Quote it, since shells read ? and &. Add &field=NAME where there are several vector fields, and
    +https to the scheme for TLS. Credentials come from AMIPS_MILVUS_TOKEN and AMIPS_QDRANT_API_KEY.

    In a script: results go to standard output (--json makes them JSON), progress and warnings to
    standard error, and nothing is asked. What removes something needs --yes there.

    \b
    Exit status:
      0    done
      1    an error, said in a sentence; --debug shows the traceback
      2    the command line was not understood
      3,4  amips tune, doctor: leave it as it is, or it cannot be said
      3,4  amips status: the router searches wider, or the native search answers
      130  interrupted; where work is kept, the same command goes on from there
    """  # noqa: D301 - click wants the backspace itself, to keep the lines
    ctx.obj = {"debug": debug}


def main(args: list[str] | None = None) -> None:
    """Run the command line; the console script's entry point."""
    warnings.showwarning = _show_warning
    given = sys.argv[1:] if args is None else args
    arguments = [argument for argument in given if argument != "--debug"]
    debug = len(arguments) < len(given)
    if not debug:  # they log tracebacks of what they raise as well
        for client in ("pymilvus", "milvus_lite"):
            logging.getLogger(client).setLevel(logging.CRITICAL)
    try:
        command.main(args=arguments, prog_name="amips", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"\n{_after_interrupt(arguments)}", err=True)
        sys.exit(130)
    except Exception as exc:
        if debug:
            raise
        click.echo(f"Error: {_sentence(exc)}", err=True)
        sys.exit(1)


def _after_interrupt(arguments: list[str]) -> str:
    again = f"amips {shlex.join(arguments)}"
    if arguments and arguments[0] in _GO_ON:
        return f"Interrupted. What is done is kept. To go on, the same command again:\n  {again}"
    return f"Interrupted. To start over, the same command again:\n  {again}"


def _sentence(exc: Exception) -> str:
    """Say what went wrong: our errors as they are, the database's, the system's, and faults."""
    if isinstance(exc, AmipsError):
        return str(exc)
    if _is_the_databases(exc):
        return f"The database says: {_short(_answer(exc))} (--debug shows more.)"
    if isinstance(exc, OSError) and exc.strerror:
        where = f": {exc.filename}" if exc.filename else ""
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f"{where or ' where the command writes'}; make room, and run it again"
        return f"{exc.strerror}{where}. (--debug shows more.)"
    return (
        f"This should not have happened: {type(exc).__name__}: "
        f"{_short(str(exc)) or 'no more is known'}. Run it again with --debug, and report what it "
        f"shows."
    )


def _answer(exc: Exception) -> str:
    """Return the server's own words: clients cut them, or wrap them in what nobody needs."""
    body = getattr(exc, "content", None)  # Qdrant's, of which str() shows 200 bytes
    if isinstance(body, bytes):
        try:
            return str(json.loads(body)["status"]["error"])
        except (ValueError, KeyError, TypeError):
            return f"{exc} {body.decode(errors='replace')}"
    details = getattr(exc, "details", None)  # of gRPC
    return str((callable(details) and details()) or getattr(exc, "message", "") or exc)


def _short(text: str) -> str:
    """Write on one line, and of a long text both ends: the reason may be in either."""
    line, half = " ".join(text.split()), _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}"


def _is_the_databases(exc: Exception) -> bool:
    """Whether an error comes from a database or its client, and not from a fault of ours."""
    origins = {kind.__module__.partition(".")[0] for kind in type(exc).__mro__}
    return not origins.isdisjoint({"pymilvus", "grpc", "qdrant_client", "httpx", "qdrant_edge"})


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {message}", err=True)
