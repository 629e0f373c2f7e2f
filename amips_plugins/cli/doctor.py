"""``amips doctor``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from amips_plugins.cli.options import QueryFiles, json_option, queries_options, several_option
from amips_plugins.cli.output import echo_json, share, table
from amips_plugins.cli.progress import show_progress

if TYPE_CHECKING:
    from amips_plugins.doctor.findings import Diagnosis
    from amips_plugins.doctor.partitions import PartitionDiagnosis
    from amips_plugins.export.trial_result import Trial

__all__ = ["command"]

_EXIT = {"route": 0, "leave": 3, "unclear": 4}
_NAMES = {
    "index": "its own index, {n:,} lists",
    "centroids": "{n:,} k-means cells, nearest first",
    "perfect": "the same cells, perfect router",
    "linear": "{n:,} learned cells, quick router",
}


@click.command("doctor")
@click.argument("uris", metavar="URI...", nargs=-1, required=True)
@queries_options(
    ", from your log. Without it queries are guessed from the keys, and the doctor cannot say "
    "whether routing pays."
)
@click.option("--cells", default=64, show_default=True, help="Number of cells to try.")
@click.option("--sample", default=50_000, show_default=True, help="Keys to try them on, at most.")
@click.option(
    "--memory",
    type=click.FloatRange(min=0.001),
    metavar="GB",
    help="Memory the database may use for this collection; says how to keep it there (Qdrant, "
    "Milvus servers).",
)
@click.option(
    "--partitions",
    metavar="FIELD",
    help="Ask whether a router over the values of this field would pay, or over the 'native' "
    "partitions of the database, and not one over cells.",
)
@several_option
@json_option
def command(
    uris: tuple[str, ...],
    queries: QueryFiles,
    cells: int,
    sample: int,
    memory: float | None,
    partitions: str | None,
    name: str,
    as_json: bool,
) -> None:
    """Say whether routing would pay for the collection URI.

    Looks at how the collection is built, reads its keys (two million at most), and trains a quick
    router on a sample of them. Nothing is written to the database, and nothing stays on disk.
    Shares on a sample are an estimate. Several URIs, or NAME=URI, are searched as one, and each is
    a partition: the doctor says whether a router would pay that chooses among them.

    \b
    The exit status is
      0  where routing is worth it
      3  where the collection is best left as it is
      4  where it cannot be said, for want of queries for example
      1  for an error
    """  # noqa: D301 - click wants the backspace itself, to keep the lines
    from amips_plugins.adapters.connect import connect
    from amips_plugins.collection import collection_key
    from amips_plugins.doctor.diagnose import diagnose
    from amips_plugins.doctor.partitions import diagnose_partitions
    from amips_plugins.errors import InvalidInput, require
    from amips_plugins.partitions import NATIVE_PARTITIONS

    if len(uris) > 1 and memory is not None:
        raise InvalidInput("--memory is of one collection; ask for each of them by itself.")
    if len(uris) > 1:
        partitions = partitions or NATIVE_PARTITIONS
    if partitions is not None and memory is not None:
        raise InvalidInput("--memory is answered without --partitions only; ask once for each.")
    require("torch", "train")
    require("faiss", "train")
    with connect(*uris, name=name) as collection:
        info = collection.info
        rows = queries.read(collection_key(info), info.metric, info.dim)
        if partitions is not None:
            parted = diagnose_partitions(
                collection, partitions, rows, sample=sample, progress=show_progress
            )
            if as_json:
                echo_json(parted)
            else:
                click.echo(_show_partitions(parted))
            sys.exit(_EXIT[parted.verdict.answer])
        found = diagnose(
            collection,
            rows,
            n_cells=cells,
            sample=sample,
            memory=None if memory is None else int(memory * 1e9),
            progress=show_progress,
        )
    if as_json:
        echo_json(found)
    else:
        click.echo(_show(found))
    sys.exit(_EXIT[found.verdict.answer])


def _show_partitions(found: PartitionDiagnosis) -> str:
    trial = found.trial
    if trial is None:
        return found.verdict.text
    rows = [
        [one.search, f"{one.recall:.2f}", f"{one.searches:.1f}", share(one.keys)]
        for one in trial.costs
    ]
    shown = table(["search", f"recall@{trial.k}", f"searches, of {trial.partitions}", "keys"], rows)
    return f"{shown}\n\n{found.verdict.text}"


def _show(found: Diagnosis) -> str:
    facts = [
        ("database", found.database),
        ("keys", f"{found.keys:,} of dimension {found.dim} ({found.metric})"),
        *found.construction,
        ("break-even", _break_even(found.break_even)),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{found.collection!r}" + (f", field {found.field!r}" if found.field else "")]
    lines += [f"  {name:<{width}}  {value}" for name, value in facts]
    lines += [f"  Note: {note}" for note in found.notes]
    if found.trial is not None:
        lines += ["", *_show_trial(found.trial, found)]
    return "\n".join([*lines, "", found.verdict.text])


def _break_even(level: float) -> str:
    if level >= 1.0:
        return "fewer keys are always cheaper than all of them"
    return f"a full scan is cheaper from {share(level)} of the keys on"


def _show_trial(trial: Trial, found: Diagnosis) -> list[str]:
    recalls = sorted({cost.recall for cost in trial.costs})
    searches = list(dict.fromkeys((cost.search, cost.n_cells) for cost in trial.costs))
    by = {(cost.search, cost.recall): cost for cost in trial.costs}
    header = ["search", *(f"recall {recall:.2f}" for recall in recalls), "95 % interval"]
    rows = []
    if found.native == "scan":
        rows.append(["a full scan, as now", *("100.0%" for _ in recalls), ""])
    for name, n_cells in searches:
        last = by[name, recalls[-1]]
        shares = [share(by[name, recall].total) for recall in recalls]
        interval = f"{share(last.low)} to {share(last.high)}"
        rows.append([_NAMES[name].format(n=n_cells), *shares, interval])
    origin = "guessed" if trial.guessed else "yours"
    lines = [
        f"Keys scanned for recall@{trial.k} on {trial.test_queries:,} held-out queries ({origin}), "
        f"a router's own cost included:",
        "",
        table(header, rows),
    ]
    if trial.keys < found.keys:
        lines.append(
            f"\nEstimated on {trial.keys:,} of {found.keys:,} keys. The ten best of a sample lie "
            f"further apart than the ten best of all, so that these shares tend to be too high, "
            f"for every search alike."
        )
    if trial.read < found.keys:
        lines.append(
            f"They were drawn from the first {trial.read:,} keys in the order of their ids; where "
            f"ids go by topic, ask again with a copy in another order."
        )
    return lines
