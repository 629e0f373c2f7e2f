"""What partitions cost engines that hold a graph for each: all of them, the largest, and ours.

How many partitions a query asks, and how far it follows their graphs (HNSW's ef), are chosen
together on calibration queries, for each recall and each way to search by itself:

all partitions
    One effort for all of them: what is done today.
largest first
    By how many hits they held, whatever is asked.
routed
    By a router with several heads for each partition.
routed, one ef
    The same asked by the product itself, which has one effort for a search.
one graph
    All keys in one graph, where they can be had in one: no partition, and no choice.

What a partition may hold is its probability times the share of its hits that an effort finds there.
The effort, or none, is the one that finds the most for what it costs, at one price for all queries;
where the engine takes one effort for a call, the best single one. Costs of a call, a search and a
step in a graph are fitted to calibration queries' CPU. The test queries are asked in turns of all
ways, and nothing is chosen on them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from amips_plugins.export.dataset import Split
from amips_plugins.vectors import FloatArray, IntArray
from benchmarks.given_engines import Asked, Engine, K

__all__ = ["EngineRow", "Priorities", "measure_engine"]

_NOISE = 1e-6
_BINS = 8  # of probabilities, each with its own share of hits that an effort finds
_HALVINGS = 14  # to find what a hit is worth
_PILOT = 60  # calibration queries that each setting of the cost model is timed on
_TURNS = 4
_ONE_GRAPH = (10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320)
_IDLE_SECONDS = 3.0


@dataclass(frozen=True)
class EngineRow:
    """One way to search one engine, set to one recall.

    Attributes
    ----------
    engine, method, k, recall
        What was measured.
    found
        Recall on the test queries.
    searches, keys
        Partitions a query asks, and the share of the keys in them.
    effort
        Mean effort in them.
    cpu_ms
        The engine's CPU a query, what it uses when nothing is asked left out.
    scored_mb
        What the engine counts as scored; NaN where it counts nothing.
    ms
        Median of a call.
    """

    engine: str
    method: str
    k: int
    recall: float
    found: float
    searches: float
    keys: float
    effort: float
    cpu_ms: float
    scored_mb: float
    ms: float


@dataclass(frozen=True)
class Priorities:
    """Log probabilities ``(n, n_cells)`` that a hit lies in a partition."""

    calibrate: FloatArray
    test: FloatArray


@dataclass(frozen=True)
class Found:
    """What each effort finds of the calibration queries' hits, ``(n_efforts, n, k)`` bool."""

    efforts: tuple[int, ...]
    at: np.ndarray
    hit_cells: IntArray


@dataclass(frozen=True)
class Costs:
    """CPU seconds of a call, and ``(n_efforts, n_cells)`` of a search in it."""

    call: float
    search: np.ndarray


@dataclass(frozen=True)
class Way:
    """A way to search, set: what each test query asks; None where it asks the one graph."""

    method: str
    recall: float
    search: Callable[[FloatArray, Asked], list[int]]
    asked: list[Asked]


def steps(effort: int, sizes: IntArray) -> np.ndarray:
    """Return about how many keys a graph of each size compares a query with."""
    found: np.ndarray = np.minimum(sizes, effort * np.log2(sizes + 1.0))
    return found


def jittered(queries: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Return queries that no engine has seen, and that ask the same."""
    noise = rng.standard_normal(queries.shape, dtype=np.float32)
    return (queries * (1 + _NOISE * noise)).astype(np.float32)


def what_is_found(engine: Engine, split: Split, cells: IntArray, rng: np.random.Generator) -> Found:
    """Ask every query those partitions that hold its hits, with every effort."""
    hits = split.hits[:, :K]
    hit_cells = cells[hits]
    wanted = [np.unique(row).tolist() for row in hit_cells]
    at = np.zeros((len(engine.efforts), *hits.shape), dtype=np.bool_)
    for place, effort in enumerate(engine.efforts):
        for row, query in enumerate(jittered(split.queries, rng)):
            answer = engine.ask(query, [(cell, effort) for cell in wanted[row]])
            at[place, row] = np.isin(hits[row], answer)
    return Found(engine.efforts, at, hit_cells)


def what_it_costs(
    engine: Engine, queries: FloatArray, priority: FloatArray, sizes: IntArray, idle: float
) -> Costs:
    """Fit what a call, a search and a step cost to the CPU of some calibration queries."""
    rng = np.random.default_rng(1)
    order = np.argsort(-priority, axis=1)
    features, seconds = [], []
    efforts = engine.efforts[:: max(1, len(engine.efforts) // 4)]
    for effort in efforts:
        for count in (1, len(sizes) // 8, len(sizes) // 3, len(sizes)):
            rows = rng.choice(len(queries), min(_PILOT, len(queries)), replace=False)
            chosen = [order[row, : max(1, count)].tolist() for row in rows]
            asked = jittered(queries[rows], rng)
            before, began = engine.cpu(), time.perf_counter()
            for query, own in zip(asked, chosen, strict=True):
                engine.ask(query, [(cell, effort) for cell in own])
            used = engine.cpu() - before - idle * (time.perf_counter() - began)
            walked = steps(effort, sizes)
            mean = np.mean([walked[own].sum() for own in chosen])
            features.append([1.0, np.mean([len(own) for own in chosen]), mean])
            seconds.append(used / len(rows))
    # Relative errors, or the largest searches alone would decide.
    weights = 1 / np.maximum(np.array(seconds), 1e-6)
    table = np.array(features) * weights[:, None]
    call, search, step = not_negative(table, np.array(seconds) * weights)
    return Costs(call, np.stack([search + step * steps(one, sizes) for one in engine.efforts]))


def not_negative(table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Solve least squares, leaving out what would be below nothing."""
    kept = np.ones(table.shape[1], dtype=np.bool_)
    while True:
        found = np.zeros(table.shape[1])
        found[kept] = np.linalg.lstsq(table[:, kept], wanted, rcond=None)[0]
        if (found >= 0).all():
            return found
        kept &= found > 0


def shares_found(found: Found, log_p: FloatArray) -> tuple[np.ndarray, np.ndarray]:
    """Return edges of bins of log probability, and what each effort finds of the hits in each."""
    at_hits = np.take_along_axis(log_p, found.hit_cells, axis=1)
    edges = np.unique(np.quantile(at_hits, np.arange(1, _BINS) / _BINS))
    bins = np.digitize(at_hits, edges)
    counts = np.bincount(bins.ravel(), minlength=len(edges) + 1)
    shares = np.stack(
        [
            np.bincount(bins.ravel(), one.ravel().astype(float), minlength=len(edges) + 1)
            for one in found.at
        ]
    )
    return edges, np.maximum.accumulate(shares / np.maximum(counts, 1), axis=0)


@dataclass(frozen=True)
class Rule:
    """Which effort each partition gets, of those that are ``allowed``, at a price."""

    edges: np.ndarray
    shares: np.ndarray
    costs: Costs
    allowed: tuple[int, ...]  # places among the efforts
    price: float

    def places(self, log_p: FloatArray) -> IntArray:
        """Return ``(n, n_cells)``: the place of the effort, -1 for a partition left aside."""
        bins, expected = np.digitize(log_p, self.edges), K * np.exp(log_p)
        most = np.zeros(log_p.shape)
        places = np.full(log_p.shape, -1, dtype=np.int64)
        for place in self.allowed:
            gain = expected * self.shares[place][bins] - self.costs.search[place] / self.price
            better = gain > most
            most, places = np.where(better, gain, most), np.where(better, place, places)
        rows, first = np.arange(len(log_p)), log_p.argmax(axis=1)
        places[rows, first] = np.maximum(places[rows, first], self.allowed[0])
        return places


def recall_of(places: IntArray, found: Found) -> float:
    """Return the recall of calibration queries that are asked so."""
    at_hits = np.take_along_axis(places, found.hit_cells, axis=1)
    rows, columns = np.indices(at_hits.shape)
    return float((found.at[at_hits, rows, columns] & (at_hits >= 0)).mean())


def cheapest(
    found: Found, log_p: FloatArray, costs: Costs, recall: float, *, own_efforts: bool
) -> Rule | None:
    """Choose efforts and price together: what costs the least of all that reaches a recall."""
    edges, shares = shares_found(found, log_p)
    every = tuple(range(len(found.efforts)))
    candidates = [(place,) for place in every] + ([every] if own_efforts else [])
    best: tuple[float, Rule] | None = None
    for allowed in candidates:
        low, high = np.log(float(costs.search.min()) / K) - 3, np.log(costs.search.max()) + 12
        rule = Rule(edges, shares, costs, allowed, float(np.exp(high)))
        if recall_of(rule.places(log_p), found) < recall:
            continue
        for _ in range(_HALVINGS):  # a higher price searches more
            middle = (low + high) / 2
            rule = Rule(edges, shares, costs, allowed, float(np.exp(middle)))
            enough = recall_of(rule.places(log_p), found) >= recall
            low, high = (low, middle) if enough else (middle, high)
        rule = Rule(edges, shares, costs, allowed, float(np.exp(high)))
        places = rule.places(log_p)
        asked = np.where(places >= 0, np.take_along_axis(costs.search, places, axis=0), 0.0)
        cost = float(asked.sum(axis=1).mean())
        if best is None or cost < best[0]:
            best = cost, rule
    return None if best is None else best[1]


def asked_by(rule: Rule, log_p: FloatArray, efforts: Sequence[int]) -> list[Asked]:
    """Write a rule as what each query asks."""
    places = rule.places(log_p)
    return [
        [(int(cell), efforts[row[cell]]) for cell in np.flatnonzero(row >= 0)] for row in places
    ]


def ways(
    engine: Engine,
    calibrate: Split,
    test: Split,
    cells: IntArray,
    by: dict[str, Priorities],
    recalls: Sequence[float],
) -> Iterator[Way]:
    """Set every way to search to every recall, on calibration queries alone."""
    rng, sizes = np.random.default_rng(0), np.bincount(cells)
    idle = idle_share(engine)
    found = what_is_found(engine, calibrate, cells, rng)
    routed = by["routed"].calibrate
    costs = what_it_costs(engine, calibrate.queries, routed, sizes, idle)
    every = range(len(sizes))
    product, count = engine.as_product(), len(test.queries)
    whole = [
        np.mean(
            [
                np.isin(hits[:K], engine.whole(query, effort)).mean()
                for query, hits in zip(
                    jittered(calibrate.queries, rng), calibrate.hits, strict=True
                )
            ]
        )
        for effort in _ONE_GRAPH
    ]
    for recall in recalls:
        enough = [e for e, one in zip(found.efforts, found.at, strict=True) if one.mean() >= recall]
        if enough:
            asked: Asked = [(cell, enough[0]) for cell in every]
            yield Way("all partitions", recall, engine.ask, [asked] * count)
        enough = [e for e, one in zip(_ONE_GRAPH, whole, strict=True) if one >= recall]
        if enough:
            one_graph = by_effort(engine)
            yield Way("one graph", recall, one_graph, [[(0, enough[0])]] * count)
        for method, log_p in by.items():
            rule = cheapest(found, log_p.calibrate, costs, recall, own_efforts=engine.own_efforts)
            if rule is not None:
                chosen = asked_by(rule, log_p.test, found.efforts)
                yield Way(method, recall, engine.ask, chosen)
        rule = cheapest(found, routed, costs, recall, own_efforts=False)
        if rule is not None:
            chosen = asked_by(rule, by["routed"].test, found.efforts)
            yield Way("routed, one ef", recall, product, chosen)


def by_effort(engine: Engine) -> Callable[[FloatArray, Asked], list[int]]:
    """Return a search of the one graph."""
    return lambda query, asked: engine.whole(query, asked[0][1])


def idle_share(engine: Engine) -> float:
    """Return the CPU seconds a second of an engine that nobody asks."""
    before, began = engine.cpu(), time.perf_counter()
    time.sleep(_IDLE_SECONDS)
    return (engine.cpu() - before) / (time.perf_counter() - began)


def measure_engine(
    name: str,
    engine: Engine,
    calibrate: Split,
    test: Split,
    cells: IntArray,
    by: dict[str, Priorities],
    recalls: Sequence[float],
) -> list[EngineRow]:
    """Set every way to search on calibration queries, and ask them the test queries in turns.

    Parameters
    ----------
    name, engine
        What is asked, loaded.
    calibrate, test
        Queries and their exact hits.
    cells
        ``(n_keys,)`` the partition of each key, from 0.
    by
        Log probabilities of ``largest first`` and ``routed``, for these queries.
    recalls
        Targets.
    """
    rng, sizes = np.random.default_rng(2), np.bincount(cells)
    prepared = list(ways(engine, calibrate, test, cells, by, recalls))
    idle = idle_share(engine)
    used = np.zeros((len(prepared), 2))
    found: list[list[float]] = [[] for _ in prepared]
    taken: list[list[float]] = [[] for _ in prepared]
    for part in np.array_split(np.arange(len(test.queries)), _TURNS):
        for number in rng.permutation(len(prepared)).tolist():
            way, queries = prepared[number], jittered(test.queries[part], rng)
            before, began = (engine.cpu(), engine.scored()), time.perf_counter()
            for row, query in zip(part.tolist(), queries, strict=True):
                started = time.perf_counter()
                answer = way.search(query, way.asked[row])
                taken[number].append(time.perf_counter() - started)
                found[number].append(len(set(answer) & set(test.hits[row, :K].tolist())) / K)
            seconds = time.perf_counter() - began
            used[number] += engine.cpu() - before[0] - idle * seconds, engine.scored() - before[1]
    rows = []
    for number, way in enumerate(prepared):
        asked = [pair for one in way.asked for pair in one]
        whole = way.method == "one graph"
        share = 1.0 if whole else sizes[[cell for cell, _ in asked]].sum() / len(cells)
        cpu, scored = used[number] / len(test.queries)
        rows.append(
            EngineRow(
                engine=name,
                method=way.method,
                k=K,
                recall=way.recall,
                found=round(float(np.mean(found[number])), 4),
                searches=round(len(asked) / len(way.asked), 2),
                keys=round(float(share if whole else share / len(way.asked)), 4),
                effort=round(float(np.mean([effort for _, effort in asked])), 1),
                cpu_ms=round(1e3 * cpu, 3),
                scored_mb=round(float(scored), 3),
                ms=round(1e3 * float(np.median(taken[number])), 2),
            )
        )
    return rows
