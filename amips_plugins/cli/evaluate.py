"""``amips evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec.structs import replace

from amips_plugins.cli.options import json_option, registry_option, several_option
from amips_plugins.cli.output import echo_json, share, size, table
from amips_plugins.cli.progress import show_progress

if TYPE_CHECKING:
    from amips_plugins.evaluation import Measurement

__all__ = ["command", "show"]


@click.command("evaluate")
@click.argument("uris", metavar="URI...", nargs=-1, required=True)
@click.option(
    "--queries",
    type=click.Path(path_type=Path),
    required=True,
    help="A .npy file of (n, dim) query vectors that no training has seen.",
)
@registry_option
@click.option("--k", default=10, show_default=True, help="Measure recall@k.")
@click.option(
    "--filter",
    "conditions",
    multiple=True,
    help="Compare under this filter, too: an expression of Milvus, or Qdrant's JSON. Repeatable.",
)
@several_option
@json_option
def command(
    uris: tuple[str, ...],
    queries: Path,
    registry: str | None,
    k: int,
    conditions: tuple[str, ...],
    name: str,
    as_json: bool,
) -> None:
    """Compare native and learned search of the collection URI on your own queries.

    Several URIs, or NAME=URI, are searched as one.

    Recall is measured against the exact answer, found by reading every key once; under a filter,
    by the database's own exact search. There "passing" is the share of the 100 best keys of a
    query that the filter lets pass. "scored" are the vectors that the engine itself counts, where
    it tells (Qdrant: service.hardware_reporting); what a filter costs is not in it.
    """
    from amips_plugins.adapters.connect import connect, read_filter
    from amips_plugins.cli.queries import load_queries
    from amips_plugins.evaluation import evaluate
    from amips_plugins.health.monitor import HealthMonitor
    from amips_plugins.routing.router import LearnedRouter

    with connect(*uris, name=name) as collection:
        rows = load_queries(queries, collection.info.dim)
        filters = {text: read_filter(collection, text) for text in conditions}
        quiet = HealthMonitor(share=0.0, drift_share=0.0, filters=tuple(filters.values()))
        router = LearnedRouter(collection, registry=registry, watch=quiet)
        measured = evaluate(router, rows, k, progress=show_progress)
        for text, condition in filters.items():
            under = evaluate(router, rows, k, progress=show_progress, filter=condition)
            measured += [replace(row, search=f"{row.search}, {text}") for row in under]
        caveat = collection.describe().first
    if as_json:
        echo_json(measured)
        return
    click.echo(show(measured, k))
    if caveat:
        click.echo(f"Warning: these times will not last. {caveat}", err=True)
    server = not getattr(router.collection, "local", True)
    if server and all(row.bytes_scored is None for row in measured):
        click.echo("Vectors scored: not told by the server (service.hardware_reporting).", err=True)
    for reason, count in router.fallbacks.items():
        click.echo(f"Warning: the native search answered {count} times: {reason}.", err=True)
    for source, count in getattr(router.collection, "left_out", {}).items():
        click.echo(f"Warning: {count} queries were answered without {source!r}.", err=True)


def show(measured: list[Measurement], k: int) -> str:
    """Lay measurements out as a table."""
    header = ["search", "recall@1", f"recall@{k}", "probes", "scanned", "ms"]
    filtered = any(row.passing is not None for row in measured)
    engine = any(row.bytes_scored is not None for row in measured)
    rows = [
        [
            row.search,
            f"{row.recall_at_1:.3f}",
            f"{row.recall_at_k:.3f}",
            "-" if row.n_probes is None else f"{row.n_probes:.1f}",
            share(row.scanned),
            f"{row.milliseconds:.2f}",
            *([share(row.passing)] if filtered else []),
            *(["not told" if row.bytes_scored is None else size(row.bytes_scored)] * engine),
        ]
        for row in measured
    ]
    more = [*(["passing"] if filtered else []), *(["scored"] if engine else [])]
    return table([*header, *more], rows)
