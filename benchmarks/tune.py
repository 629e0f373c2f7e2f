"""What ``amips tune`` chooses, beside the best of all that it could have chosen.

    python benchmarks/tune.py npm2pypi/ --only edge --keys 100000
    python benchmarks/tune.py pydocs --only demo --keys 12000

Every build that could be set is swept over every effort on test queries that tuning has not seen;
costs are ratios to the collection as it is, taken turn by turn. In the end what was chosen and the
best of the others stand side by side and are searched turn by turn, so that one ratio says what the
choice costs over the best. That best is picked on the test queries themselves, and promises
nothing; *best of those promised* is the cheapest there of the builds at the efforts that tune could
promise. The situations:

edge
    One graph of Qdrant Edge.
milvus
    A Milvus server with one HNSW index.
fanned
    A Milvus server with the keys at random in 64 partitions, a graph in each; of fewer than 77,000
    keys in as many as have 1,200.
demo
    Milvus Lite without an index, as ``amips demo`` stores its keys.
small
    The same with 2,000 keys.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.adapters.tuning import tuning_of
from amips_plugins.cli.progress import show_progress
from amips_plugins.cli.tune import show as show_result
from amips_plugins.collection import Collection
from amips_plugins.errors import AmipsError, InvalidInput
from amips_plugins.files import replace_file
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.tune.calibrating import parameter_of
from amips_plugins.tune.keys import draw, truth_of
from amips_plugins.tune.measuring import AGAIN, effort_curve, try_both
from amips_plugins.tune.recalls import promise
from amips_plugins.tune.rows import FOUND, NATIVE_ROW, Row, compared
from amips_plugins.tune.run import TuneOptions, measure
from amips_plugins.tuning import Build
from amips_plugins.vectors import FloatArray
from benchmarks.data import Source, load

Clock = Callable[[], float]
K = 10
_ROWS = 1_000
_GRAPHS, _IN_GRAPH = 64, 1_200  # keys, below which Milvus builds no index in a segment
_SMALL = 2_000


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """A build at an effort, on test queries: recall, and cost over the collection's as it is."""

    build: str
    effort: int
    recall: float
    ratio: float


class Against(msgspec.Struct, frozen=True, kw_only=True):
    """What the choice costs over the best there is, turn by turn, and the 95 % interval."""

    ratio: float
    low: float
    high: float


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """What was chosen, and what there was to choose from."""

    name: str
    keys: int
    unit: str
    recall: float
    as_found_recall: float
    as_found_ms: float
    answer: str
    chosen: str
    effort: int | None
    minutes: float
    swept: list[Swept]
    text: str = ""
    cpu_seconds: float = 0.0
    against: Against | None = None
    efforts: dict[str, int] = {}

    @property
    def promised(self) -> Swept | None:
        """The cheapest on test queries of what could be set and was promised; None for nothing."""
        able = [one for one in self.swept if self.efforts.get(one.build) == one.effort]
        return min(able, key=lambda one: one.ratio, default=None)

    @property
    def taken(self) -> Swept:
        """The choice, as it does on test queries."""
        if self.chosen == FOUND:
            return Swept(build=FOUND, effort=0, recall=self.as_found_recall, ratio=1.0)
        return next(
            one for one in self.swept if (one.build, one.effort) == (self.chosen, self.effort)
        )

    @property
    def best(self) -> Swept | None:
        """The cheapest that reaches the target on test queries; None where none does."""
        as_found = Swept(build=FOUND, effort=0, recall=self.as_found_recall, ratio=1.0)
        reached = [one for one in (as_found, *self.swept) if one.recall >= self.recall]
        return min(reached, key=lambda one: one.ratio, default=None)


def sweep(
    collection: Collection,
    queries: FloatArray,
    work: Path,
    clock: Clock,
    *,
    applied_alone: bool,
) -> tuple[list[Swept], float, float]:
    """Try everything; return also recall and milliseconds of the collection as it is."""
    tuning = tuning_of(collection)
    found = tuning.as_found()
    keys = draw(collection, 10**9, 0, show_progress)
    truth = truth_of(collection, queries, K, show_progress)
    swept: list[Swept] = []
    as_is = (collection, NATIVE, truth)
    again = AGAIN if tuning.in_process else 1
    (base,) = try_both([as_is], queries, K, clock, show_progress, "as it is", again)
    if found is None:
        return [], float(base.recall.mean()), 1e3 * float(base.calm.mean())

    def try_build(name: str, build: Build, place: Collection) -> None:
        seen = truth if build.exact_scores else truth.by_ids()
        for effort in build.knob.efforts:
            plan = QueryPlan(params=parameter_of(build).params(effort, K))
            ways: list[Any] = [(place, plan, seen), as_is]
            title = f"{name} {effort}"
            trial, beside = try_both(ways, queries, K, clock, show_progress, title, again)
            ratio = float(trial.calm.mean() / beside.calm.mean())
            recall = float(trial.recall.mean())
            swept.append(Swept(build=name, effort=effort, recall=recall, ratio=ratio))
            click.echo(f"{name:<14} {effort:>5} recall {recall:.4f} ratio {ratio:.2f}")
            if recall > 0.99:
                break

    try_build(NATIVE_ROW, found, collection)
    for build in tuning.builds():
        if applied_alone and not build.applies:
            continue
        try:
            scratch = tuning.scratch(build, keys.batches(), len(keys.ids), work, show_progress)
            with scratch as copy:
                try_build(build.name, build, copy)
        except Exception as exc:  # noqa: BLE001 - what the server refuses is no choice
            click.echo(f"{build.name}: {' '.join(str(exc).split())[:200]}")
    return swept, float(base.recall.mean()), 1e3 * float(base.calm.mean())


def side_by_side(
    collection: Collection,
    queries: FloatArray,
    work: Path,
    clock: Clock,
    taken: Swept,
    best: Swept,
) -> Against:
    """Search as was chosen and as would be best, turn by turn, on copies where it takes them."""
    tuning = tuning_of(collection)
    truth = truth_of(collection, queries, K, show_progress)
    found, builds = tuning.as_found(), {build.name: build for build in tuning.builds()}
    with ExitStack() as stack:
        ways: list[Any] = []
        places: dict[str, Collection] = {FOUND: collection, NATIVE_ROW: collection}
        for one, folder in ((taken, "trial"), (best, "base")):  # which databases tell apart
            build = builds.get(one.build, found)
            assert build is not None
            if one.build not in places:
                keys = draw(collection, 10**9, 0, show_progress)
                scratch = tuning.scratch(
                    build, keys.batches(), len(keys.ids), work / folder, show_progress
                )
                places[one.build] = stack.enter_context(scratch)
            plan = NATIVE
            if one.build != FOUND:
                plan = QueryPlan(params=parameter_of(build).params(one.effort, K))
            seen = truth if build.exact_scores else truth.by_ids()
            ways.append((places[one.build], plan, seen))
        again = AGAIN if tuning.in_process else 1
        ours, theirs = try_both(ways, queries, K, clock, show_progress, "side by side", again)
    row = compared(Row(search="chosen"), ours, theirs, Row(search="best", cost=1.0, ratio=1.0))
    assert row.ratio is not None
    assert row.ratio_low is not None
    assert row.ratio_high is not None
    return Against(ratio=row.ratio, low=row.ratio_low, high=row.ratio_high)


def situation(
    name: str,
    collection: Collection,
    clock: Clock,
    queries: FloatArray,
    test: FloatArray,
    recall: float,
    minutes: float = 60.0,
) -> Situation:
    """Tune, and hold the choice against all others."""

    def spent() -> float:  # by the client, too
        return clock() + (0.0 if clock is time.process_time else time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        began, before = time.monotonic(), spent()
        efforts: dict[str, int] = {}
        options = TuneOptions(recall=recall, k=K, seconds=minutes * 60)
        work = Path(folder, "tune")
        try:
            result = measure(collection, queries, options, work, show_progress, clock).result
            chosen = next((row for row in result.rows if row.search == result.choice.search), None)
            answer, text = result.choice.answer, result.choice.text
            efforts = {row.search: row.effort for row in result.rows if row.effort is not None}
            click.echo(show_result(result))
        except InvalidInput as exc:
            chosen, answer, text = None, "leave", str(exc)
            click.echo(f"{name}: {text}")
        took, cpu = (time.monotonic() - began) / 60, spent() - before
        swept, at, ms = sweep(collection, test, Path(folder, "sweep"), clock, applied_alone=True)
    return Situation(
        name=name,
        keys=collection.count(),
        unit="cpu",
        recall=recall,
        as_found_recall=at,
        as_found_ms=ms,
        answer=answer,
        chosen=FOUND if chosen is None else chosen.search,
        effort=None if chosen is None else chosen.effort,
        minutes=took,
        swept=swept,
        text=text,
        cpu_seconds=cpu,
        efforts=efforts,
    )


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A target, and the calibrations of some hundred queries that promise it.

    ``least`` and ``mean`` are their recalls on test queries; ``missed`` of them are below it.
    """

    k: int
    target: float
    promised: int
    missed: int
    least: float
    mean: float


def promises(
    collection: Collection, pool: FloatArray, test: FloatArray, each: int = 500, resamples: int = 20
) -> list[Kept]:
    """Calibrate the index as it is on resampled queries, and hold that against test queries."""
    build = tuning_of(collection).as_found()
    assert build is not None
    curves = []
    for queries in (pool, test):
        truth = truth_of(collection, queries, 100, show_progress)
        parameter, efforts = parameter_of(build), build.knob.efforts
        curves.append(effort_curve(collection, parameter, efforts, queries, truth, show_progress))
    rng = np.random.default_rng(0)
    made = [promise(curves[0].take(rng.permutation(len(pool))[:each])) for _ in range(resamples)]
    kept = []
    for k in (1, 10, 100):
        seen = dict(zip(curves[1].efforts.tolist(), curves[1].recall(k).mean(axis=0), strict=False))
        for target in (0.9, 0.95, 0.98):
            held = [one for one in made if one.unpromised(k, target) is None]
            found = [seen[one.effort(one.threshold(k, target))] for one in held]
            kept.append(
                Kept(
                    k=k,
                    target=target,
                    promised=len(held),
                    missed=sum(recall < target for recall in found),
                    least=float(min(found, default=0.0)),
                    mean=float(np.mean(found)) if found else 0.0,
                )
            )
    return kept


def show_promises(found: Sequence[Kept]) -> str:
    """Write the table of the guide."""
    lines = ["| k | target | promised by | below it on test queries | least | mean |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {one.k} | {one.target:g} | {one.promised} of 20 | {one.missed} | {one.least:.3f} | "
        f"{one.mean:.3f} |"
        for one in found
    ]
    return "\n".join(lines)


@contextmanager
def edge(keys: FloatArray) -> Iterator[tuple[Collection, Clock]]:
    """Qdrant Edge, one shard with a graph as the engine makes it."""
    from benchmarks.engines import build_edge

    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "keys.npy"), keys)
        built = build_edge(Path(folder), Path(folder, "keys.npy"), None)
        from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

        with QdrantEdgeCollection.connect(folder, built.name) as collection:
            yield collection, time.process_time


@contextmanager
def demo(keys: FloatArray) -> Iterator[tuple[Collection, Clock]]:
    """Milvus Lite as the demo has it: every search looks at all keys."""
    from pymilvus import DataType, MilvusClient

    from amips_plugins.adapters.milvus.collection import MilvusCollection

    with tempfile.TemporaryDirectory() as folder:
        client = MilvusClient(str(Path(folder, "docs.db")))
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=keys.shape[1])
        index = client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="COSINE")
        client.create_collection("docs", schema=schema, index_params=index)
        for low in range(0, len(keys), _ROWS):
            block = keys[low : low + _ROWS].tolist()
            client.insert("docs", [{"id": low + at, "vector": row} for at, row in enumerate(block)])
        client.flush("docs")
        yield MilvusCollection(client, "docs"), time.process_time
        client.close()


@contextmanager
def milvus(keys: FloatArray) -> Iterator[tuple[Collection, Clock]]:
    """Start the Milvus server of the wheel, with one HNSW index."""
    from benchmarks.engines import Milvus

    with Milvus() as server:
        server.index("docs", keys, None)
        meter = server.meter
        yield server.collection("docs"), meter.cpu


@contextmanager
def fanned(keys: FloatArray) -> Iterator[tuple[Collection, Clock]]:
    """Start the Milvus server of the wheel, with a graph in each of many partitions."""
    from benchmarks.engines import Milvus

    with Milvus() as server:
        graphs = min(_GRAPHS, max(1, len(keys) // _IN_GRAPH))
        parts = np.random.default_rng(0).permutation(len(keys)) % graphs
        server.index("docs", keys, None, parts[:, None])
        meter = server.meter
        yield server.collection("docs"), meter.cpu


_SITUATIONS: dict[str, Callable[[FloatArray], Any]] = {
    "edge": edge,
    "milvus": milvus,
    "fanned": fanned,
    "demo": demo,
    "small": lambda keys: demo(keys[:_SMALL]),
}


def show(found: Sequence[Situation]) -> str:
    """Write the table of the guide."""
    lines = [
        "| situation | as it is: recall | ms | chosen | recall | cost | best of those promised | "
        "cost | best there is | cost | chosen over best | tune, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        taken, best = one.taken, one.best
        sure = "- | -"
        if one.promised is not None:
            sure = f"{one.promised.build} {one.promised.effort} | {one.promised.ratio:.2f}"
        least = "-" if best is None else f"{best.build} {best.effort}"
        ratio = "-" if best is None else f"{best.ratio:.2f}"
        over = "-" if best is None else f"{taken.ratio / best.ratio:.2f}"
        if one.against is not None:
            over = f"{one.against.ratio:.2f} ({one.against.low:.2f} to {one.against.high:.2f})"
        lines.append(
            f"| {one.name}, {one.keys:,} keys | {one.as_found_recall:.3f} | {one.as_found_ms:.2f} "
            f"({one.unit}) | {taken.build} {taken.effort or ''} | {taken.recall:.3f} | "
            f"{taken.ratio:.2f} | {sure} | {least} | {ratio} | {over} | {one.cpu_seconds:.0f} |"
        )
    return "\n".join(lines)


@click.command()
@click.argument("data", envvar="AMIPS_BENCH_DATA")
@click.option("--only", multiple=True, type=click.Choice(sorted(_SITUATIONS)))
@click.option("--keys", default=20_000, show_default=True, help="Keys, from the first.")
@click.option("--queries", default=1_600, show_default=True, help="Queries that tune is given.")
@click.option("--test", default=400, show_default=True, help="Test queries.")
@click.option("--recall", default=0.95, show_default=True)
@click.option("--minutes", default=60.0, show_default=True, help="Time for tune's trials.")
@click.option("--promises", "check", is_flag=True, help="Resample calibrations; nothing else.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench/cache"))
def main(
    data: str,
    only: tuple[str, ...],
    keys: int,
    queries: int,
    test: int,
    recall: float,
    minutes: float,
    check: bool,
    json_file: Path | None,
    cache: Path,
) -> None:
    """Measure on DATA: a folder of arrays, pydocs, or beir:NAME."""
    try:
        found = load(Source(data, cache, limit=keys), show_progress)
    except AmipsError as exc:
        raise click.ClickException(str(exc)) from exc
    some = np.ascontiguousarray(found.keys[:keys], dtype=np.float32)
    done: list[Situation] = []
    for name in only or _SITUATIONS:
        with _SITUATIONS[name](some) as (collection, clock):
            if check:
                pool = np.ascontiguousarray(found.train[:queries], dtype=np.float32)
                click.echo(show_promises(promises(collection, pool, found.test[:test])))
                continue
            asked = np.ascontiguousarray(found.train[:queries], dtype=np.float32)
            seen = found.test[:test]
            one = situation(name, collection, clock, asked, seen, recall, minutes)
            if one.best is not None and one.best != one.taken:
                with tempfile.TemporaryDirectory() as folder:
                    ways = one.taken, one.best
                    against = side_by_side(collection, seen, Path(folder), clock, *ways)
                one = msgspec.structs.replace(one, against=against)
            done.append(one)
        if done:
            click.echo(show(done))
        if json_file is not None:
            replace_file(json_file, msgspec.json.format(msgspec.json.encode(done)))


if __name__ == "__main__":
    main()
