"""``amips layout``."""

from __future__ import annotations

import click

from amips_plugins.cli.progress import show_progress
from amips_plugins.cli.publish import registry_option

__all__ = ["command"]


@click.command("layout")
@click.argument("uri")
@registry_option
def command(uri: str, registry: str | None) -> None:
    """Put the collection URI into the cells of its latest bundle.

    Qdrant gets a payload key in place. Milvus gets a new collection, NAME__g2, with a partition
    for every cell; the old one stays as it is.
    """
    from amips_plugins.adapters.connect import connect
    from amips_plugins.layout import lay_out
    from amips_plugins.registry import Registry, collection_key

    collection = connect(uri)
    try:
        bundle = Registry(registry).open(collection_key(collection.info))
        placed = lay_out(collection, bundle, show_progress)
        click.echo(
            f"{placed.info.name!r} has {placed.count():,} keys in {bundle.manifest.n_cells} cells "
            f"(layout {bundle.manifest.layout})."
        )
    finally:
        collection.close()
