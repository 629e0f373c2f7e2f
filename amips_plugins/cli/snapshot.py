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
@click.option(
    "--shards",
    type=click.IntRange(min=1),
    metavar="N",
    help="Read by N readers at once, into Parquet files.  [default: one reader, one file]",
)
@click.option(
    "--parquet",
    metavar="PATH",
    help="Read a Parquet file, or a folder of them, that holds the collection's keys already; "
    "also an fsspec URL.",
)
@click.option(
    "--id-column", default="id", show_default=True, help="Where the ids are, with --parquet."
)
@click.option(
    "--vector-column",
    default="vector",
    show_default=True,
    help="Where the vectors are, with --parquet.",
)
@several_option
@json_option
def command(
    uris: tuple[str, ...],
    out: Path,
    batch_size: int,
    partitions: str | None,
    shards: int | None,
    parquet: str | None,
    id_column: str,
    vector_column: str,
    name: str,
    as_json: bool,
) -> None:
    """Copy every id and vector of the collection URI to a folder.

    Of several URIs, or NAME=URI, a router is to search as one each is a partition. Interrupted, the
    same command goes on where it stopped. The collections are only read.
    """
    from amips_plugins.adapters.connect import connect
    from amips_plugins.errors import InvalidInput
    from amips_plugins.export.parquet_import import Columns, import_parquet
    from amips_plugins.export.sharded_snapshot import take_sharded_snapshot
    from amips_plugins.export.snapshot import take_snapshot
    from amips_plugins.partitions import NATIVE_PARTITIONS, Partitions

    if parquet is not None and ((partitions, shards) != (None, None) or len(uris) > 1):
        raise InvalidInput(
            "--parquet holds the keys of one collection and goes with neither --partitions nor "
            "--shards; leave them out."
        )

    with connect(*uris, name=name) as collection:
        seen = collection
        if partitions is not None or len(uris) > 1:
            seen = collection.partitioned(Partitions.named(partitions or NATIVE_PARTITIONS))
        if parquet is not None:
            columns = Columns(id_column, vector_column)
            taken = import_parquet(seen, parquet, out, columns, batch_size, show_progress)
        elif shards is not None:
            taken = take_sharded_snapshot(seen, out, shards, batch_size, show_progress)
        else:
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
