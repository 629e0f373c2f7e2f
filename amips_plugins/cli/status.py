"""``amips status``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amips_plugins.cli.options import (
    QueryFiles,
    json_option,
    queries_options,
    registry_option,
    several_option,
)
from amips_plugins.cli.output import duration, echo_json, share, table
from amips_plugins.cli.progress import show_progress

if TYPE_CHECKING:
    from amips_plugins.health.status_file import RunningStatus
    from amips_plugins.status import RouterStatus

__all__ = ["command"]

_EXIT = {"healthy": 0, "widened": 3, "native": 4}


@click.command("status")
@click.argument("uris", metavar="URI...", nargs=-1, required=True)
@registry_option
@queries_options(" to measure recall and drift on.")
@click.option(
    "--sample",
    default=300,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many of the queries to search for.",
)
@click.option(
    "--running",
    type=click.Path(path_type=Path),
    help="The folder of a StatusFile: show what running processes say, too.",
)
@several_option
@json_option
def command(
    uris: tuple[str, ...],
    registry: str | None,
    queries: QueryFiles,
    sample: int,
    running: Path | None,
    name: str,
    as_json: bool,
) -> None:
    """Say how the router of the collection URI does, and what to do about it.

    Several URIs, or NAME=URI, are searched as one. Nothing is changed. With queries, some are
    searched as the router would and exactly, and the state is the one that a running router would
    come to.

    The exit status is 0 where it is healthy, 3 where it would search wider, 4 where the native
    search answers.
    """
    from amips_plugins.adapters.connect import connect
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.collection import collection_key
    from amips_plugins.health.status_file import read_status
    from amips_plugins.status import router_status

    processes = None if running is None else read_status(running)
    with connect(*uris, name=name) as collection:
        info = collection.info
        rows = queries.read(collection_key(info), info.metric, info.dim)
        found = router_status(
            collection, Registry(registry), rows, sample=sample, progress=show_progress
        )
    if as_json:
        content: dict[str, Any] = {"collection": info.name, "status": found}
        if processes is not None:
            content["running"] = [{"age": p.age, "status": p} for p in processes]
        echo_json(content)
    else:
        click.echo(_show(info.name, found))
        if processes is not None:
            click.echo("\n" + _show_running(processes))
    sys.exit(_EXIT[found.state])


def _show(name: str, found: RouterStatus) -> str:
    recall, drift = found.recall, found.drift
    lines = [f"{name!r} is {found.state}." + "".join(f"\n  because: {r}" for r in found.reasons)]
    bundle = "none" if found.bundle is None else f"{found.bundle} ({found.model})"
    lines.append(f"bundle    {bundle}")
    lines.append(f"cells     {found.layout or 'none'}")
    lines.append(
        f"overflow  {share(found.overflow)} of {found.keys:,} keys have no cell; from "
        f"{share(found.break_even)} on routing does not pay"
    )
    if found.partitions is not None:
        changes = found.partitions
        named = "its own partitions" if changes.field is None else f"the field {changes.field!r}"
        lines[-1:] = [
            f"parts     {changes.known} values of {named}: {len(changes.gone)} of them gone, "
            f"{len(changes.grown)} grown to twice their share",
            f"overflow  {share(found.overflow)} of {found.keys:,} keys are in none of these",
        ]
    if found.misplaced is not None:
        lines.append(
            f"placed    at most {found.misplaced:.1%} of the keys are in a wrong cell (95 % "
            f"confidence, {found.sampled:,} sampled)"
        )
    if recall is not None:
        lines.append(
            f"recall    @{found.k} {recall.mean:.3f} as planned ({recall.low:.3f} to "
            f"{recall.high:.3f} with 95 % confidence), p5 {recall.p5:.2f}, {recall.n} queries"
        )
    if drift is not None:
        lines.append(f"drift     p = {drift.p_value:.2g} over {drift.n} queries")
    return "\n".join([*lines, found.advice])


def _show_running(processes: list[RunningStatus]) -> str:
    if not processes:
        return "No running process has written its status."
    header = [
        "process",
        "collection",
        "state",
        "since",
        "recall",
        "drift p",
        "overflow",
        "filters",
        "age",
    ]
    rows = []
    for process in processes:
        health = process.health
        recall, drift = health.recall, health.drift
        rows.append(
            [
                f"{process.host}/{process.pid}",
                process.collection,
                health.state,
                health.since,
                "-" if recall is None else f"{recall.mean:.3f} ({recall.low:.3f})",
                "-" if drift is None else f"{drift.p_value:.2g}",
                share(health.overflow),
                f"{sum(one.reason is None for one in health.filters)} of {len(health.filters)}",
                duration(process.age),
            ]
        )
    return table(header, rows)
