"""``amips backfill``."""

from __future__ import annotations

import click

from amips_plugins.cli.options import dry_run_option, json_option, registry_option
from amips_plugins.cli.output import echo_json
from amips_plugins.cli.progress import show_progress

__all__ = ["command"]


@click.command("backfill")
@click.argument("uri")
@registry_option
@click.option(
    "--verify",
    is_flag=True,
    help="Read every vector, and mend also the keys that lie in the cell of an earlier vector.",
)
@dry_run_option
@json_option
def command(uri: str, registry: str | None, verify: bool, dry_run: bool, as_json: bool) -> None:
    """Give the keys of the collection URI that have no cell theirs.

    Keys written by others, who know nothing of cells, are searched by every query until then. The
    cells are those of the bundle that the collection is laid out in. Whether keys lie in the cells
    of their own vectors is looked up for a sample of them, and for all with --verify.

    Interrupted, the same command goes on where it stopped.
    """
    from amips_plugins.adapters.connect import connect
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.layout import backfill, check_backfill
    from amips_plugins.routing.serving import serving_bundle

    with connect(uri) as collection:
        bundle = serving_bundle(collection, Registry(registry))
        check_backfill(collection, bundle)
        placed = 0 if dry_run else backfill(collection, bundle, show_progress, verify=verify)
        left = collection.overflow()
    if as_json:
        echo_json({"placed": placed, "overflow": left})
    elif dry_run:
        click.echo(f"{left:,} keys would get their cells.")
    else:
        click.echo(f"{placed:,} keys got their cells; {left:,} have none.")
