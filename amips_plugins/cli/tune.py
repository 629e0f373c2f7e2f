"""``amips tune``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from amips_plugins.cli.evaluate import show as show_evaluated
from amips_plugins.cli.options import (
    QueryFiles,
    agreed,
    agreed_to_remove,
    dry_run_option,
    json_option,
    queries_options,
    registry_option,
    yes_option,
)
from amips_plugins.cli.output import duration, echo_json, table
from amips_plugins.cli.progress import show_progress

if TYPE_CHECKING:
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.collection import CollectionKey
    from amips_plugins.tune.apply import Applied
    from amips_plugins.tune.rows import Row
    from amips_plugins.tune.run import TuneResult

__all__ = ["command", "show"]

_EXIT = {"tune": 0, "rebuild": 0, "leave": 3, "unclear": 4}


@click.command("tune")
@click.argument("uri")
@queries_options(
    ", from your log; some hundred are good. Without it keys with noise take their place, and what "
    "is promised holds for those."
)
@click.option("--recall", default=0.95, show_default=True, help="Recall@k to hold.")
@click.option("--k", default=10, show_default=True, help="Hits that a search asks for, up to 100.")
@click.option(
    "--budget-minutes",
    default=20.0,
    show_default=True,
    type=click.FloatRange(min=0.0),
    help="Time for trials on copies, begun ones are finished; 0 tries what there is alone.",
)
@click.option("--sample", default=100_000, show_default=True, help="Keys that a copy has, at most.")
@click.option(
    "--memory",
    type=click.FloatRange(min=0.001),
    metavar="GB",
    help="Memory the database may use for this collection: builds that take more are not tried.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("tune"),
    show_default=True,
    help="Folder for what was measured, copies while they are needed, and the bundle.",
)
@registry_option
@dry_run_option
@yes_option
@json_option
def command(
    uri: str,
    queries: QueryFiles,
    recall: float,
    k: int,
    budget_minutes: float,
    sample: int,
    memory: float | None,
    out: Path,
    registry: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Find the cheapest settings that hold a recall target on the collection URI, and set them.

    Measures how the collection is searched now, how far its index has to be searched for the
    target, and what codes or another index would take, on copies beside it. Then asks, and
    publishes a bundle with which routers set the search parameters. The collection itself is
    changed only where codes (Qdrant) or another index (Milvus Lite) are the cheapest and you agree,
    or say --yes.

    \b
    The exit status is
      0  where something was set, or could be (--dry-run)
      3  where the collection is best left as it is
      4  where the target cannot be promised, for want of queries for example
      1  for an error
    """  # noqa: D301 - click wants the backspace itself, to keep the lines
    from amips_plugins.adapters.connect import connect
    from amips_plugins.adapters.tuning import tuning_of
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.collection import collection_key
    from amips_plugins.errors import InvalidInput
    from amips_plugins.tune.apply import apply_choice, check_unpinned, settled
    from amips_plugins.tune.run import MAX_K, NothingToTune, TuneOptions, measure
    from amips_plugins.tune.trials import alone

    if not 0.0 < recall < 1.0:
        raise InvalidInput(f"--recall {recall:g} is no target; pass a number between 0 and 1.")
    if not 1 <= k <= MAX_K:
        raise InvalidInput(f"--k {k} cannot be calibrated; pass a number from 1 to {MAX_K}.")
    if sample < 1_000:
        raise InvalidInput(f"--sample {sample} keys tell nothing; pass 1000 or more.")
    options = TuneOptions(
        recall=recall,
        k=k,
        seconds=60.0 * budget_minutes,
        sample=sample,
        memory=None if memory is None else int(memory * 1e9),
    )
    store, applied = Registry(registry), None
    with connect(uri) as collection:
        info = collection.info
        if not dry_run:
            check_unpinned(store, collection_key(info))
        rows = queries.read(collection_key(info), info.metric, info.dim)
        with alone(out):
            tuning = tuning_of(collection)
            for note in tuning.notes if budget_minutes and tuning.as_found() is not None else ():
                click.echo(note, err=True)
            try:
                measured = measure(collection, rows, options, out, show_progress)
            except NothingToTune as exc:
                click.echo(exc, err=as_json)
                if as_json:
                    echo_json({"measured": None, "applied": None})
                sys.exit(_EXIT["leave"])
            if not as_json:
                click.echo(show(measured.result))
            answer = measured.result.choice.answer
            if not dry_run and answer == "rebuild" and not _may_rebuild(measured.result, yes=yes):
                measured = settled(measured, rebuild=False)
                answer = measured.result.choice.answer
                click.echo(measured.result.choice.text, err=as_json)
            wanted = not dry_run and answer in ("tune", "rebuild")
            if wanted and _may_publish(store, collection_key(info), yes=yes):
                applied = apply_choice(collection, measured, store, out, show_progress)
    if as_json:
        echo_json({"measured": measured.result, "applied": applied})
    elif applied is not None:
        click.echo(_show_applied(applied, k))
    elif dry_run and answer in ("tune", "rebuild"):
        click.echo("Nothing was changed; the same command without --dry-run does it.")
    sys.exit(_EXIT[answer])


def _may_publish(store: Registry, key: CollectionKey, *, yes: bool) -> bool:
    """Ask, and where a router would go say so: that has to be wanted, in a script too."""
    from amips_plugins.tune.apply import replaced_router

    router = replaced_router(store, key)
    if router is None:
        return agreed(f"Publish these search parameters to {store.root}?", yes=yes)
    return agreed_to_remove(
        f"These parameters would take the place of the router {router} of {key} in {store.root}: "
        f"searches would be native, and cells, if there are any, of no use. Another --registry "
        f"keeps both.",
        yes=yes,
    )


def _may_rebuild(result: TuneResult, *, yes: bool) -> bool:
    """Ask whether the collection may be changed. A script has to say so beforehand."""
    row = next(row for row in result.rows if row.search == result.choice.search)
    took = "" if row.build_seconds is None else f", which takes about {duration(row.build_seconds)}"
    what = (
        f"The engine would rebuild {result.collection!r} with {row.search}{took}. Clients without "
        f"a router will search it as the database does by default."
    )
    if yes:
        return True
    if not sys.stdin.isatty():
        click.echo(f"{what} Nobody is there to ask whether it may: add --yes.", err=True)
        return False
    return agreed(what, yes=False)


def show(result: TuneResult) -> str:
    """Write what was found as a table, and what to do."""
    facts = [*result.construction, ("keys", f"{result.keys:,}")]
    width = max(len(name) for name, _ in facts)
    lines = [f"{result.collection!r}", *(f"  {name:<{width}}  {text}" for name, text in facts)]
    unit = "CPU ms" if result.unit == "cpu" else "ms"
    header = ["search", "set to", f"recall@{result.k}", "interval", unit, "interval", "of now"]
    header += ["bytes a key", "build s"]
    measured = [row for row in result.rows if row.dropped is None]
    sized = any(row.memory_bytes is not None for row in measured)
    counted = any(row.bytes_scored is not None for row in measured)
    header += ["MB memory"] if sized else []
    header += ["MB scored"] if counted else []
    origin = "guessed from the keys" if result.queries == "guess" else "yours"
    lines += [
        "",
        f"Target: recall@{result.k} {result.recall:g} with {result.confidence:.0%} confidence, "
        f"from {result.calibrated:,} queries ({origin}); compared on {result.compared:,} others, "
        f"one by one.",
        "",
        table(header, [_cells(row, sized=sized, counted=counted) for row in measured]),
        *(f"{row.search}: {row.dropped}" for row in result.rows if row.dropped is not None),
        *(f"Note: {note}" for note in result.notes),
        "",
        result.choice.text,
    ]
    return "\n".join(lines)


def _cells(row: Row, *, sized: bool, counted: bool) -> list[str]:
    setting = "-" if row.effort is None else f"{row.parameter} {row.effort}"
    if row.effort is None and row.best_promise is not None:
        setting = f"at most {row.best_promise:.3f}"
    return [
        row.search,
        setting,
        _number(row.recall, 3),
        _interval(row.recall_low, row.recall_high, 3),
        _number(row.cost, 3),
        _interval(row.cost_low, row.cost_high, 3),
        _number(row.ratio, 2),
        _number(row.bytes_per_key, 0),
        _number(row.build_seconds, 1),
        *([_megabytes(row.memory_bytes, 0)] if sized else ()),
        *([_megabytes(row.bytes_scored, 3)] if counted else ()),
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _megabytes(value: float | None, digits: int) -> str:
    return _number(None if value is None else value / 1e6, digits)


def _interval(low: float | None, high: float | None, digits: int) -> str:
    return "-" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"


def _show_applied(applied: Applied, k: int) -> str:
    lines = [f"Published {applied.version} to {applied.registry}."]
    if applied.rebuilt is not None:
        lines.append(f"The collection has {applied.rebuilt}.")
    if applied.evaluated:
        lines += ["", show_evaluated(list(applied.evaluated), k)]
    return "\n".join([*lines, "", *applied.way_back])
