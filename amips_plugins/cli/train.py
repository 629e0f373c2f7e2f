"""``amips train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from amips_plugins.cli.options import QueryFiles, json_option, queries_options
from amips_plugins.cli.output import echo_json, share, table
from amips_plugins.cli.progress import show_progress

__all__ = ["command"]


def _spill(ctx: click.Context, param: click.Parameter, value: str) -> float | str:
    if value == "auto":
        return value
    try:
        return float(value)
    except ValueError:
        message = f"{value!r} is no share; pass a number such as 0.27, or auto."
        raise click.BadParameter(message, ctx, param) from None


@click.command("train")
@click.argument("snapshot", type=click.Path(path_type=Path))
@queries_options(
    ", from your log. Without it queries are guessed from the keys, and the result is only as good "
    "as that guess."
)
@click.option(
    "--model",
    type=click.Choice(["auto", "linear", "supportnet", "keynet", "native"]),
    default="auto",
    show_default=True,
    help="auto: the cheapest router. keynet: rewrite queries for an unchanged IVF index. "
    "native: plain k-means centroids, to compare with.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to fill.")
@click.option("--cells", default=64, show_default=True, help="Number of cells.")
@click.option(
    "--partitions",
    metavar="FIELD",
    help="Choose among the values of this field, which the snapshot has, and cut no cells; "
    "'native' are the database's own partitions.  [default: the snapshot's, if any]",
)
@click.option(
    "--count",
    type=click.Choice(["searches", "keys"]),
    default="searches",
    show_default=True,
    help="What a search of partitions is to save.",
)
@click.option(
    "--layout",
    type=click.Choice(["query-aware", "native"]),
    default="query-aware",
    show_default=True,
    help="Cut the keys as queries see them, or by plain k-means.",
)
@click.option(
    "--preset",
    default="default",
    show_default=True,
    help="Training recipe; 'paper' is the paper's own.",
)
@click.option("--k", default=10, show_default=True, help="Recall@k to be cheap at.")
@click.option("--recall", default=0.95, show_default=True, help="Recall to be cheap at.")
@click.option(
    "--spill",
    metavar="SHARE|auto",
    callback=_spill,
    default="auto",
    show_default=True,
    help="Give keys further cells, up to this share of the keys; 0 for none.",
)
@click.option(
    "--max-cell",
    metavar="MULTIPLE",
    type=click.FloatRange(min=1.05),
    help="Largest cell, as a multiple of the mean, such as 1.2, for engines whose segments have a "
    "largest size.  [default: any]",
)
@click.option(
    "--index",
    type=click.Choice(["flat", "hnsw", "ivf_sq8"]),
    default="flat",
    show_default=True,
    help="What cells will hold: keys to scan, a graph, or lists of codes (Milvus), whose misses "
    "the targets then count.",
)
@click.option("--epochs", type=int, help="Passes over the queries.  [default: the recipe's]")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option(
    "--engine",
    metavar="local|ray[:ADDRESS]",
    default="local",
    show_default=True,
    help="Who does what is done key by key: this process, a Ray cluster of this machine alone, or "
    "a cluster that is there. The result is the same.",
)
@click.option(
    "--memory",
    metavar="GIB",
    type=click.FloatRange(min=0.0, min_open=True),
    default=2.0,
    show_default=True,
    help="What the workers of this machine may take together, beside the nets.",
)
@json_option
def command(
    snapshot: Path,
    queries: QueryFiles,
    out: Path,
    cells: int,
    engine: str,
    memory: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Train on a SNAPSHOT folder and write a bundle to OUT/bundle.

    Every candidate is compared with the native search on queries it has never seen, its own cost
    included. Interrupted, the same command goes on where it stopped.
    """
    from amips_plugins.errors import require

    require("torch", "train")
    require("faiss", "train")
    from amips_plugins.export.snapshot import Snapshot
    from amips_plugins.export.train import TrainOptions, train

    taken = Snapshot.open(snapshot)
    about = taken.manifest
    log = queries.read(about.collection, about.metric, about.dim)
    wanted = TrainOptions(n_cells=cells, **options)
    run = train(taken, log, out, wanted, show_progress, engine=engine, memory=memory)
    manifest = run.manifest
    if as_json:
        echo_json(manifest)
        return
    click.echo(f"\nCost of recall@{manifest.default_k} on held-out queries, in full scans:\n")
    shown = [figure for figure in manifest.figures if figure.k == manifest.default_k]
    recalls = sorted({figure.recall for figure in shown})
    names = list(dict.fromkeys(figure.candidate for figure in shown))
    cost = {(figure.candidate, figure.recall): figure.total for figure in shown}
    header = ["search", *(f"recall {recall:.2f}" for recall in recalls)]
    rows = [[name, *(share(cost[name, recall]) for recall in recalls)] for name in names]
    click.echo(table(header, rows))
    click.echo(f"\n{manifest.reason}")
    if manifest.copies:
        more = share(manifest.copies / manifest.count)
        click.echo(f"{manifest.copies:,} keys lie in a further cell ({more} of the keys).")
    click.echo(f"Bundle {manifest.version} ({manifest.model}) is in {run.bundle}.")
