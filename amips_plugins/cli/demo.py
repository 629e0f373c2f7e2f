"""``amips demo``."""

from __future__ import annotations

from pathlib import Path

import click

from amips_plugins.cli.progress import show_progress

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
def command(database: str, folder: Path, pairs: int) -> None:
    """Try it all on real text: the docstrings of the installed Python packages.

    The first sentence of a docstring asks for its body. Some minutes on two cores.
    """
    from amips_plugins.demo.run import run

    run(database, folder, pairs, click.echo, show_progress)
