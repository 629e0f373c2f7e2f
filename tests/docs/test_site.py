"""What the site is made with: the check of its links, its figures, and its command reference."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from amips_plugins import cli

DOCS = Path(__file__).parents[2] / "docs"


def neighbour(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="other.html#there">x</a><p id="here"></p><a href="#here">y</a>', None),
        ('<a href="https://example.org/">x</a><img src="data:image/png;base64,">', None),
        ('<a href="gone.html">x</a>', "refers to gone.html, which is not there"),
        ('<a href="other.html#nowhere">x</a>', "has no such place"),
        ('<img src="gone.png">', "refers to gone.png"),
        ('<script src="https://example.org/x.js"></script>', "from elsewhere"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "from elsewhere"),
    ],
)
def test_a_fault_of_a_page_is_found(tmp_path: Path, body: str, fault: str | None) -> None:
    (tmp_path / "index.html").write_text(body)
    (tmp_path / "other.html").write_text('<h1 id="there">x</h1>')
    found = neighbour("check_site").faults(tmp_path)
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


@pytest.mark.parametrize("folder", [".", "gone"])
def test_a_site_without_a_page_is_no_site(tmp_path: Path, folder: str) -> None:
    assert "holds no page" in neighbour("check_site").faults(tmp_path / folder)[0]


def test_a_style_that_loads_a_font_is_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("")
    (tmp_path / "x.css").write_text("@font-face { src: url('https://example.org/font.woff2') }")
    assert "from elsewhere" in neighbour("check_site").faults(tmp_path)[0]


def test_the_figures_are_those_that_the_script_draws() -> None:
    script = [sys.executable, str(DOCS / "make_figures.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True)  # noqa: S603
    assert done.returncode == 0, done.stderr


def test_every_command_and_option_is_in_the_reference() -> None:
    page = neighbour("cli_reference").reference()
    with click.Context(cli.command, info_name="amips") as ctx:
        for name in cli.command.list_commands(ctx):
            found = cli.command.get_command(ctx, name)
            assert found is not None
            assert f"\n## amips {name}\n" in page
            for one in getattr(found, "commands", {"": found}).values():
                for param in one.params:
                    if isinstance(param, click.Option):
                        assert max(param.opts, key=len) in page, (name, param.opts)
    assert "### amips layout drop-old" in page
    assert "--storage [partitions" in page
