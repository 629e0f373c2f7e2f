"""A collection large enough that widening is not everything, and what drives a watch over it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.bundle.reference import Reference
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Collection, Hit, SearchRequest
from amips_plugins.export.cost_curves import calibrate, curve, levels_by_threshold, thresholds_for
from amips_plugins.export.nets import KeyNet, LinearRouter
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.health.drift import outputs_of
from amips_plugins.health.monitor import HealthMonitor, Watch
from amips_plugins.health.shadow_search import ServedQuery, search_wider
from amips_plugins.models.hooks import RewriteHook, RouteHook
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.plan import PreQueryHook, Target
from amips_plugins.vectors import FloatArray, IntArray, Metric, normalise

COUNT, DIM, CELLS, K, RECALL = 2000, 16, 50, 10, 0.9
_SCALE = 12.0


def centres() -> FloatArray:
    return normalise(np.random.default_rng(0).standard_normal((CELLS, DIM)).astype(np.float32))


@functools.cache
def keys() -> FloatArray:
    rng = np.random.default_rng(1)
    around = centres()[rng.integers(CELLS, size=COUNT)]
    return normalise(around + 0.2 * rng.standard_normal((COUNT, DIM)).astype(np.float32))


def queries(seed: int, count: int, noise: float = 0.2) -> FloatArray:
    rng = np.random.default_rng(seed)
    around = centres()[rng.integers(CELLS, size=count)]
    return normalise(around + noise * rng.standard_normal((count, DIM)).astype(np.float32))


def cells() -> IntArray:
    nearest: IntArray = (keys() @ centres().T).argmax(axis=1).astype(np.int64)
    return nearest


@functools.cache
def router() -> RouteHook:
    """A linear router to the nearest centres, calibrated for recall@10 .9."""
    net = LinearRouter(DIM, CELLS)
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(centres()))
    order = Order(_SCALE, np.zeros(CELLS, dtype=np.float32))
    model = OnnxModel(to_onnx(net, DIM, Metric.COSINE, order))
    assigned, sizes = cells(), np.bincount(cells(), minlength=CELLS)

    def asked(seed: int) -> tuple[FloatArray, IntArray]:
        rows = queries(seed, 1500)
        (priority,) = model.run(["priority"], {"queries": rows})
        return priority, assigned[np.argsort(-(rows @ keys().T), axis=1)[:, :K]]

    thresholds = thresholds_for(*asked(2))
    priority, hit_cells = asked(3)
    levels = levels_by_threshold(priority, thresholds)
    measured = curve(levels, len(thresholds), hit_cells, sizes, CELLS)
    shares = np.append(sizes / COUNT, 0.0).astype(np.float32)
    return RouteHook(model, calibrate(measured, thresholds, K), "cells1", RECALL, shares)


@functools.cache
def keynet() -> RewriteHook:
    torch.manual_seed(0)
    return RewriteHook(OnnxModel(to_onnx(KeyNet(DIM), DIM, Metric.COSINE)))


@functools.cache
def reference() -> Reference:
    outputs = outputs_of(router(), queries(4, 512))
    assert outputs is not None
    return Reference.of(outputs)


def collection() -> MemoryCollection:
    made = MemoryCollection(keys(), metric=Metric.COSINE, name="world")
    return made.layouts.build(LayoutSpec("cells1", CELLS, lambda ids, _: cells()[np.array(ids)]))


def scramble(of: MemoryCollection, share: float = 1.0) -> None:
    """Put this share of the keys into other cells than the router looks for them in."""
    rows = np.arange(int(share * len(of._cells)))
    of._cells[rows] = np.random.default_rng(5).permutation(of._cells[rows])


def mend(of: MemoryCollection) -> None:
    of._cells = cells()[:, None]


class Driver:
    """What a router does with a watch, and no more."""

    def __init__(
        self, over: Collection, hook: PreQueryHook, watch: HealthMonitor, **start: Any
    ) -> None:
        self.collection = over
        self.hook = hook
        self.watch = watch
        self.begin(**start)

    def begin(self, reference: Reference | None = None) -> None:
        self.watched = Watch(self.collection, self.hook, reference)
        self.watch.begin(self.watched)

    def search(self, query: FloatArray, target: Target) -> list[Hit]:
        health = self.watch.health
        assert health is not None
        request = SearchRequest(query[None], target.k)
        found, mode = None, "native"
        if health.state != "native":
            found = search_wider(health.widen, self.collection, self.hook, target, request)
            plan = self.hook.plan(query[None], replace(target, widen=health.widen))
            if plan.cells is not None:
                mode = "route"
            elif plan.rewritten is not None:
                mode = "rewrite"
        if found is None:
            (found,) = self.collection.search(request)
        if self.watch.chosen():
            self.watch.sample(
                self.watched,
                ServedQuery(self.collection, self.hook, query, target, found, mode, health.widen),
            )
        return found

    def run(
        self,
        rows: FloatArray,
        until: str | None = None,
        target: Target = Target(K),  # noqa: B008
    ) -> int:
        """Search one by one, and return how many it took to reach a state."""
        for at, query in enumerate(rows, 1):
            self.search(query, target)
            assert self.watch.idle(20)
            if self.watch.health is not None and self.watch.health.state == until:
                return at
        assert until is None, self.watch.health
        return len(rows)
