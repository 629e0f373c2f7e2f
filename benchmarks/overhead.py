"""What the package costs in time: microseconds added to a search.

    python benchmarks/overhead.py [--json overhead.json]

``plan`` is the hook alone: ONNX Runtime on one thread, and the choice of the cells. The others are
measured against the bare call in the same run, each search against its own: ``search`` is what
``LearnedRouter.search`` adds to the call of a collection that answers at once, with the same plan;
``client`` is all that happens outside the client's own call when the collection is a real one,
Qdrant's local mode with a hundred points, and ``ratio`` the whole search over that call.

Weights are random; time does not depend on them, but on the number of cells that the threshold
lets through, which is set to ``--probes`` on average. Hooks take turns in several rounds, and the
best round of each counts: what others do on the machine only ever adds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import torch
from qdrant_client import QdrantClient, models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins import LearnedRouter
from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Hit, SearchRequest
from amips_plugins.export.nets import KeyNet
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import new_router
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.files import replace_file
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.hooks import NativeHook, RewriteHook, RouteHook
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.plan import NATIVE, PreQueryHook, QueryPlan, Target
from amips_plugins.vectors import FloatArray, Metric, normalise

_K = 10
_BATCH = 256
_KEYS = 100  # of the collections
_LAYOUT = "overhead"
_WARM_UP = 500


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Times of one hook: in microseconds, each from the best round.

    Attributes
    ----------
    hook
        Which.
    plan_p50, plan_p99
        A plan for a single query.
    batch
        A query in a plan for 256 of them.
    search_p50, search_p99
        What one search adds to the same search of a collection that answers at once.
    client_p50, client_p99
        What one search of a real collection adds to the client's own call.
    ratio
        One search of a real collection over the client's own call, median.
    """

    hook: str
    plan_p50: float
    plan_p99: float
    batch: float
    search_p50: float
    search_p99: float
    client_p50: float
    client_p99: float
    ratio: float


class Instant(MemoryCollection):
    """A collection that has the answer ready."""

    def __init__(self, vectors: FloatArray) -> None:
        super().__init__(vectors)
        self._answer = [Hit(row, 1.0) for row in range(_K)]

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:  # noqa: ARG002
        """Return the same hits for every query."""
        return [self._answer] * len(request.queries)


class TimedClient(QdrantClient):
    """Qdrant's local mode, which knows how long its last query took."""

    took = 0.0  # microseconds

    def query_points(self, *args: Any, **more: Any) -> models.QueryResponse:
        """Answer, and take the time."""
        started = time.perf_counter_ns()
        response = super().query_points(*args, **more)
        self.took = (time.perf_counter_ns() - started) / 1e3
        return response


def real_collection(client: QdrantClient, keys: FloatArray, n_cells: int) -> QdrantCollection:
    """Make a collection in cells; its keys have none, so that every search finds k of them."""
    vectors = models.VectorParams(size=keys.shape[1], distance=models.Distance.COSINE)
    client.create_collection("overhead", vectors_config=vectors)
    empty = QdrantCollection(client, "overhead")
    assign = lambda _, vectors: np.zeros(len(vectors), dtype=np.int64)  # noqa: E731 - never called
    laid_out = empty.layouts.build(LayoutSpec(_LAYOUT, n_cells, assign))
    laid_out.upsert(list(range(len(keys))), keys)
    return QdrantCollection(client, "overhead")


def hooks(queries: FloatArray, n_cells: int, probes: int) -> dict[str, PreQueryHook]:
    """Build a hook of every kind, with nets of the default recipe."""
    dim = queries.shape[1]
    torch.manual_seed(0)
    centroids = normalise(torch.randn(n_cells, dim).numpy())
    order = Order(1.0, np.zeros(n_cells, dtype=np.float32))
    result: dict[str, PreQueryHook] = {"native": NativeHook()}
    presets = PRESETS["default"]
    for kind in ("linear", "supportnet"):
        net = new_router(kind, presets[kind], centroids, 0)
        model = OnnxModel(to_onnx(net, dim, Metric.COSINE, order, int8=True))
        (priority,) = model.run(["priority"], {"queries": queries})
        threshold = np.quantile(priority, 1.0 - probes / n_cells)
        levels = np.array([threshold, -np.inf], dtype=np.float32)
        recall = np.tile(np.array([0.95, 1.0], dtype=np.float32), (_K, 1))
        calibration = Calibration(levels, recall, recall, recall[0], 0.95)
        shares = np.append(np.full(n_cells, 1.0 / n_cells), 0.0).astype(np.float32)
        result[kind] = RouteHook(model, calibration, _LAYOUT, 0.95, shares)
    keynet = KeyNet(dim, presets["keynet"].width, presets["keynet"].depth)
    result["keynet"] = RewriteHook(OnnxModel(to_onnx(keynet, dim, Metric.COSINE)))
    return result


class Course:
    """Runs the same calls with one hook, round after round."""

    def __init__(self, name: str, hook: PreQueryHook, queries: FloatArray, n_cells: int) -> None:
        self._name = name
        self._hook = hook
        self._client = TimedClient(":memory:")
        self._instant = Instant(queries[:_KEYS])
        self._real = real_collection(self._client, queries[:_KEYS], n_cells)
        self._routers = [
            LearnedRouter(collection, hook=hook, refresh=None)
            for collection in (self._instant, self._real)
        ]
        self._vectors = list(queries)
        self._single = [queries[row : row + 1] for row in range(len(queries))]
        self._batches = [queries[low : low + _BATCH] for low in range(0, len(queries), _BATCH)]

    def round(self, calls: int) -> Timing:
        """Time the calls once, with another query in each."""
        plan = _times(self._plan(self._single), calls)
        batch = _median(_times(self._plan(self._batches), max(calls // 50, 2))) / _BATCH
        added = _times(self._search, calls) - _times(self._bare(), calls)
        around, inside = self._around_the_client(max(calls // 10, 2))
        for router in self._routers:
            if router.fallbacks:
                raise click.ClickException(
                    f"The native search answered for {self._name}: {dict(router.fallbacks)}."
                )
        return Timing(
            hook=self._name,
            plan_p50=_median(plan),
            plan_p99=_p99(plan),
            batch=batch,
            search_p50=_median(added),
            search_p99=_p99(added),
            client_p50=_median(around),
            client_p99=_p99(around),
            ratio=_median((around + inside) / inside),
        )

    def _plan(self, queries: list[FloatArray]) -> Callable[[int], object]:
        target = Target(k=_K)
        return lambda at: self._hook.plan(queries[at % len(queries)], target)

    def _search(self, at: int) -> object:
        return self._routers[0].search(self._vectors[at % len(self._vectors)], k=_K)

    def _bare(self) -> Callable[[int], object]:
        target = Target(k=_K)
        asked = [(SearchRequest(rows, _K), self._hook.plan(rows, target)) for rows in self._single]
        return lambda at: self._instant.search(*asked[at % len(asked)])

    def _around_the_client(self, calls: int) -> tuple[FloatArray, FloatArray]:
        inside = np.empty(calls, dtype=np.float32)

        def search(at: int) -> None:
            self._routers[1].search(self._vectors[at % len(self._vectors)], k=_K)
            inside[at] = self._client.took

        return _times(search, calls) - inside, inside


def best(rounds: Sequence[Timing]) -> Timing:
    """Return each figure of its best round."""
    figures: dict[str, Any] = {
        name: min(getattr(row, name) for row in rounds) for name in Timing.__struct_fields__
    }
    return Timing(**figures)


def _times(call: Callable[[int], object], calls: int) -> FloatArray:
    for at in range(min(_WARM_UP, calls)):
        call(at)
    taken = np.empty(calls, dtype=np.float32)
    for at in range(calls):
        started = time.perf_counter_ns()
        call(at)
        taken[at] = (time.perf_counter_ns() - started) / 1e3
    return taken


def _median(times: FloatArray) -> float:
    return float(np.median(times))


def _p99(times: FloatArray) -> float:
    return float(np.quantile(times, 0.99))


@click.command()
@click.option("--dim", default=384, show_default=True)
@click.option("--cells", default=512, show_default=True)
@click.option("--probes", default=16, show_default=True, help="Cells searched, on average.")
@click.option("--calls", default=2_000, show_default=True, help="Calls timed in a round.")
@click.option("--rounds", default=5, show_default=True, help="Rounds, of which the best counts.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
def main(
    dim: int, cells: int, probes: int, calls: int, rounds: int, json_file: Path | None
) -> None:
    """Time what the package adds to a search."""
    random = np.random.default_rng(0).standard_normal((4 * _BATCH, dim), dtype=np.float32)
    queries = normalise(random)
    courses = [
        Course(name, hook, queries, cells) for name, hook in hooks(queries, cells, probes).items()
    ]
    timed = [[course.round(calls) for course in courses] for _ in range(rounds)]
    rows = [best(of_hook) for of_hook in zip(*timed, strict=True)]
    click.echo(f"Microseconds, {dim} dimensions, {cells} cells, about {probes} searched\n")
    lines: list[list[str]] = [
        ["hook", "plan p50", "plan p99", "a query of 256", "queries/s"],
        ["---"] * 10,
    ]
    lines[0] += ["search p50", "search p99", "client p50", "client p99", "ratio"]
    for row in rows:
        lines.append([row.hook, f"{row.plan_p50:.1f}", f"{row.plan_p99:.1f}"])
        lines[-1] += [f"{row.batch:.2f}", f"{1e6 / row.batch:,.0f}" if row.batch > 0.1 else ""]
        lines[-1] += [f"{row.search_p50:.1f}", f"{row.search_p99:.1f}"]
        lines[-1] += [f"{row.client_p50:.1f}", f"{row.client_p99:.1f}", f"{row.ratio:.2f}"]
    for line in lines:
        click.echo("| " + " | ".join(line) + " |")
    if json_file is not None:
        replace_file(json_file, msgspec.json.format(msgspec.json.encode(rows), indent=2))


if __name__ == "__main__":
    main()
