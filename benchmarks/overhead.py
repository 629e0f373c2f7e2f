"""What a plan costs in time: microseconds added to every search, without any database.

    python benchmarks/overhead.py [--json overhead.json]

``plan`` is the hook alone: ONNX Runtime on one thread, and the choice of the cells. ``search`` is
``LearnedRouter.search`` around a collection that answers at once: all that the package adds to a
call of the database's client. Weights are random; time does not depend on them, but on the number
of cells that the threshold lets through, which is set to ``--probes`` on average.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import msgspec
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins import LearnedRouter
from amips_plugins.adapters.base import Hit, SearchRequest
from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.calibration import Calibration
from amips_plugins.export.nets import KeyNet
from amips_plugins.export.presets import PRESETS
from amips_plugins.export.routers import new_router
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.files import replace_file
from amips_plugins.hooks import NativeHook, RewriteHook, RouteHook
from amips_plugins.model import OnnxModel
from amips_plugins.plan import NATIVE, PreQueryHook, QueryPlan, Target
from amips_plugins.vectors import FloatArray, Metric, normalise

_K = 10
_BATCH = 256
_WARM_UP = 500


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Times of one hook.

    Attributes
    ----------
    hook
        Which.
    plan_p50, plan_p99
        Microseconds of one plan for a single query.
    plan_batch
        Microseconds a query in a plan for 256 of them.
    search_p50, search_p99
        Microseconds of one search around a collection that answers at once.
    """

    hook: str
    plan_p50: float
    plan_p99: float
    plan_batch: float
    search_p50: float
    search_p99: float


class Instant(MemoryCollection):
    """A collection that has the answer ready."""

    def __init__(self, vectors: FloatArray) -> None:
        super().__init__(vectors)
        self._answer = [Hit(row, 1.0) for row in range(_K)]

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:  # noqa: ARG002
        """Return the same hits for every query."""
        return [self._answer] * len(request.queries)


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
        model = OnnxModel(to_onnx(net, dim, Metric.COSINE, order))
        (priority,) = model.run(["priority"], {"queries": queries})
        threshold = np.quantile(priority, 1.0 - probes / n_cells)
        levels = np.array([threshold, -np.inf], dtype=np.float32)
        recall = np.tile(np.array([0.95, 1.0], dtype=np.float32), (_K, 1))
        calibration = Calibration(levels, recall, recall, recall[0], 0.95)
        shares = np.append(np.full(n_cells, 1.0 / n_cells), 0.0).astype(np.float32)
        result[kind] = RouteHook(model, calibration, "overhead", 0.95, shares)
    keynet = KeyNet(dim, presets["keynet"].width, presets["keynet"].depth)
    result["keynet"] = RewriteHook(OnnxModel(to_onnx(keynet, dim, Metric.COSINE)))
    return result


def measure(name: str, hook: PreQueryHook, queries: FloatArray, calls: int) -> Timing:
    """Time one hook, with another query in every call."""
    target = Target(k=_K)
    router = LearnedRouter(Instant(queries[:64]), hook=hook)
    single = [queries[row : row + 1] for row in range(len(queries))]
    vectors = list(queries)
    batches = [queries[low : low + _BATCH] for low in range(0, len(queries) - _BATCH, _BATCH)]
    plan = _times(lambda at: hook.plan(single[at % len(single)], target), calls)
    batch = _times(lambda at: hook.plan(batches[at % len(batches)], target), calls // 50)
    search = _times(lambda at: router.search(vectors[at % len(vectors)], k=_K), calls)
    if router.fallbacks:
        raise click.ClickException(f"The native search answered: {dict(router.fallbacks)}.")
    return Timing(
        hook=name,
        plan_p50=float(np.median(plan)),
        plan_p99=float(np.quantile(plan, 0.99)),
        plan_batch=float(np.median(batch)) / _BATCH,
        search_p50=float(np.median(search)),
        search_p99=float(np.quantile(search, 0.99)),
    )


def _times(call: Callable[[int], object], calls: int) -> FloatArray:
    for at in range(min(_WARM_UP, calls)):
        call(at)
    taken = np.empty(calls, dtype=np.float32)
    for at in range(calls):
        started = time.perf_counter_ns()
        call(at)
        taken[at] = (time.perf_counter_ns() - started) / 1e3
    return taken


@click.command()
@click.option("--dim", default=384, show_default=True)
@click.option("--cells", default=512, show_default=True)
@click.option("--probes", default=16, show_default=True, help="Cells searched, on average.")
@click.option("--calls", default=10_000, show_default=True, help="Calls timed of each kind.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
def main(dim: int, cells: int, probes: int, calls: int, json_file: Path | None) -> None:
    """Time what the package adds to a search."""
    random = np.random.default_rng(0).standard_normal((4 * _BATCH, dim), dtype=np.float32)
    queries = normalise(random)
    rows = [
        measure(name, hook, queries, calls) for name, hook in hooks(queries, cells, probes).items()
    ]
    click.echo(f"Microseconds, {dim} dimensions, {cells} cells, about {probes} searched\n")
    click.echo("| hook | plan p50 | plan p99 | a query of 256 | search p50 | search p99 |")
    click.echo("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        times = list(msgspec.structs.asdict(row).values())[1:]
        click.echo(f"| {row.hook} | " + " | ".join(f"{value:.1f}" for value in times) + " |")
    if json_file is not None:
        replace_file(json_file, msgspec.json.format(msgspec.json.encode(rows), indent=2))


if __name__ == "__main__":
    main()
