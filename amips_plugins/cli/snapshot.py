"""``amips snapshot``."""

from __future__ import annotations

from pathlib import Path

import click

from amips_plugins.cli.options import json_option, several_option
from amips_plugins.cli.output import echo_json
from amips_plugins.cli.progress import show_progress

__all__ = ["command"]


@click.command("snapshot")
@click.argument("uris", metavar="URI...", nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to fill.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=5_000,
    show_default=True,
    help="Keys read at once.",
)
@click.option(
    "--partitions",
    metavar="FIELD",
    help="Copy this field, too: it says where a key belongs, and a router chooses among its "
    "values. 'native' are the partitions of Milvus, or the shard keys of Qdrant.",
)
@several_option
@json_option
def command(
    uris: tuple[str, ...],
    out: Path,
    batch_size: int,
    partitions: str | None,
    name: str,
    as_json: bool,
) -> None:
    """Copy every id and vector of the collection URI to a folder.

    Of several URIs, or NAME=URI, a router is to search as one each is a partition. Interrupted, the
    same command goes on where it stopped. The collections are only read.
    """
    from amips_plugins.adapters.connect import connect
    from amips_plugins.export.snapshot import take_snapshot
    from amips_plugins.partitions import NATIVE_PARTITIONS, Partitions

    with connect(*uris, name=name) as collection:
        seen = collection
        if partitions is not None or len(uris) > 1:
            seen = collection.partitioned(Partitions.named(partitions or NATIVE_PARTITIONS))
        taken = take_snapshot(seen, out, batch_size, show_progress)
    manifest = taken.manifest
    if as_json:
        shown = ("count", "dim", "metric", "fingerprint", "count_before", "count_after", "moved")
        echo_json({"snapshot": str(out), **{name: getattr(manifest, name) for name in shown}})
    else:
        click.echo(
            f"{manifest.count:,} keys of dimension {manifest.dim} ({manifest.metric}) in {out}, "
            f"fingerprint {manifest.fingerprint[:12]}."
        )
    if manifest.moved:
        click.echo(
            f"Warning: the collection changed meanwhile: it held {manifest.count_before:,} keys at "
            f"the start and {manifest.count_after:,} at the end, {manifest.count:,} were copied. "
            f"That does not hurt training; keys written since are searched all the same.",
            err=True,
        )
