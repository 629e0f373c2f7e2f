"""The commands that docs/operations.md shows are commands, with options that there are."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
CONSOLE = "".join(re.findall(r"^```console\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
SHOWN = re.findall(r"^\$ (?:.* )?amips (.*?)(?: 2>.*)?$", CONSOLE, re.MULTILINE)


def test_the_page_shows_commands() -> None:
    assert len(SHOWN) > 20
    lines = [line for line in CONSOLE.splitlines() if line.startswith("$")]
    assert sum(" amips " in line for line in lines) == len(SHOWN)


@pytest.mark.parametrize("line", SHOWN)
def test_a_command_can_be_parsed(line: str) -> None:
    name, *arguments = shlex.split(line)
    command: click.Command = importlib.import_module(f"amips_plugins.cli.{name}").command
    if isinstance(command, click.Group):  # a layout is built where no other verb is named
        name = arguments.pop(0) if arguments[0] in command.commands else "build"
        command = command.commands[name]
    assert command.make_context(name, arguments).params


def test_what_holds_a_promise_is_there() -> None:
    named = re.findall(r"`((?:integration_)?tests/\S+\.py)`", PAGE)
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).is_file()] == []
