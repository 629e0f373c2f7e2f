"""``amips demo``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from amips_plugins.cli.evaluate import show
from amips_plugins.cli.options import json_option
from amips_plugins.cli.output import echo_json
from amips_plugins.cli.progress import show_progress
from amips_plugins.cli.tune import show as show_tuned
from amips_plugins.errors import require

__all__ = ["command"]


@click.command("demo")
@click.option(
    "--database",
    type=click.Choice(["milvus", "qdrant"]),
    default="milvus",
    show_default=True,
    help="Milvus Lite, or Qdrant's embedded mode.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path(".demo"),
    show_default=True,
    help="Where everything is kept; a second run reuses it.",
)
@click.option(
    "--pairs",
    type=click.IntRange(min=1_000),
    default=12_000,
    show_default=True,
    help="Docstrings to use, at most.",
)
@json_option
def command(database: str, folder: Path, pairs: int, as_json: bool) -> None:
    """Try it all on real text: the docstrings of the installed Python packages.

    The first sentence of a docstring asks for its body. Some minutes on two cores.
    Interrupted, the same command goes on where it stopped.
    """
    for module in ("torch", "faiss", "tokenizers", "qdrant_edge"):
        require(module, "demo")
    from amips_plugins.demo.run import run

    say = partial(click.echo, err=as_json)
    measured = run(database, folder, pairs, say, show, show_tuned, show_progress)
    if as_json:
        echo_json(measured)
