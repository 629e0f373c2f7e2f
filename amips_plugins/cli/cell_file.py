"""``amips cell-file``."""

from __future__ import annotations

from pathlib import Path

import click

from amips_plugins.cli.options import dry_run_option, json_option, registry_option
from amips_plugins.cli.output import echo_json, size
from amips_plugins.cli.progress import show_progress

__all__ = ["command"]


@click.command("cell-file")
@click.argument("snapshot", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option("--bundle", "version", metavar="VERSION", help="A version other than the latest.")
@registry_option
@click.option(
    "--bits",
    type=click.Choice(["2", "4", "8"]),
    default="2",
    show_default=True,
    help="Of a code, for each dimension.",
)
@dry_run_option
@json_option
def command(
    snapshot: Path,
    out: Path,
    version: str | None,
    registry: str | None,
    bits: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the keys of a SNAPSHOT, in the cells of its collection's bundle, into one file.

    The file is opened as cells:///path/docs.cells, or from a store as cells+s3://bucket/docs.cells;
    a search reads whole cells of codes and then the vectors of the best candidates. It is for
    collections whose codes do not fit into memory. What lay at its place is replaced when it is
    complete.
    """
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.export.cell_file import plan_cell_file, write_snapshot
    from amips_plugins.export.snapshot import Snapshot

    taken = Snapshot.open(snapshot)
    bundle = Registry(registry).open(taken.manifest.collection, version)
    plan = plan_cell_file(taken, bundle, out, int(bits))
    if not dry_run:
        write_snapshot(taken, bundle, out, int(bits), show_progress)
    shown = {
        "file": str(out),
        "keys": plan.keys,
        "cells": bundle.manifest.n_cells,
        "layout": bundle.manifest.layout,
        "n_bytes": plan.n_bytes,
        "cell_bytes": plan.cell_bytes,
    }
    if as_json:
        echo_json(shown)
        return
    click.echo(
        f"{plan.keys:,} keys {'would be' if dry_run else 'are'} in {bundle.manifest.n_cells} cells "
        f"of {size(plan.cell_bytes)} of codes, {size(plan.n_bytes)} in all, in {out}."
    )
    if plan.note:
        click.echo(f"Note: {plan.note}", err=True)
