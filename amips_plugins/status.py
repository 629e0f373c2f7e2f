"""How a collection would be searched, found out once: what ``amips status`` says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from amips_plugins.bundle.loading import given_cells, known_cells, load_reference
from amips_plugins.bundle.manifest import Manifest
from amips_plugins.bundle.registry import Registry
from amips_plugins.cell_layout import LayoutAudit
from amips_plugins.collection import Collection, Id, SearchRequest
from amips_plugins.errors import BundleError, InvalidInput
from amips_plugins.health.drift import WINDOW, Drift, compare, outputs_of
from amips_plugins.health.gate import Gate, Shadow, State
from amips_plugins.health.recall import Recall, RecallWindow
from amips_plugins.health.shadow_search import ServedQuery, gate_of, search_wider, shadow_search
from amips_plugins.models.hooks import RewriteHook, RouteHook
from amips_plugins.models.tuned import TunedHook
from amips_plugins.partitions import Value
from amips_plugins.plan import PreQueryHook, Target
from amips_plugins.progress import Progress, no_progress
from amips_plugins.routing.serving import Serving, serve_latest
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["PartitionChanges", "RouterStatus", "router_status"]

_AUDITED = 1_000  # keys that are read with their vectors, to judge their cells
_MUCH_OVERFLOW = 0.05  # share of the keys; what a router warns of
_SAMPLE = 300  # queries that are searched
_GROWN = 2.0  # times its share of the keys


class PartitionChanges(msgspec.Struct, frozen=True, kw_only=True):
    """The users' own partitions that a router chooses among, against what it was trained on.

    Attributes
    ----------
    field
        What tells them apart; None for the database's own.
    known
        Number of values that the router knows.
    gone
        Those that no key has any more.
    grown
        Those with more than twice their share of the keys.
    """

    field: str | None
    known: int
    gone: tuple[Value, ...]
    grown: tuple[Value, ...]


class RouterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a collection's router.

    Attributes
    ----------
    state, reasons
        What the gate makes of it (see ``health.gate``), and why; without a usable bundle native.
    bundle, model, layout
        Version and kind of the bundle in use, and the cells that the collection is laid out in;
        None without.
    keys, overflow, break_even
        Number of keys, share of them without a cell, and the share above which routing does not
        pay.
    sampled, misplaced
        Keys looked at, and the share of all that lie in another vector's cell, at most (95 %
        confidence); 0 and None without cells.
    k, recall
        Recall@k of searches as planned, on the queries given; None without queries.
    drift
        Those queries against the bundle's reference; None without either.
    advice
        What to do, in a sentence.
    partitions
        How the users' own partitions have changed since training; None with cells of ours.
    """

    state: State
    reasons: tuple[str, ...]
    bundle: str | None
    model: str | None
    layout: str | None
    keys: int
    overflow: float
    break_even: float
    sampled: int
    misplaced: float | None
    k: int | None
    recall: Recall | None
    drift: Drift | None
    advice: str
    partitions: PartitionChanges | None = None


def router_status(
    collection: Collection,
    registry: Registry,
    queries: FloatArray | None = None,
    *,
    sample: int = _SAMPLE,
    progress: Progress = no_progress,
) -> RouterStatus:
    """Look at a collection, its bundle and some of its queries; nothing is changed.

    Parameters
    ----------
    collection
        The collection.
    registry
        Where its bundle is.
    queries
        ``(n, dim)`` float32, such as a query log's; None leaves recall and drift unknown.
    sample
        How many of them to search for, each exactly and as a router would.
    progress
        Watches the work.
    """
    obstacle, advice = None, ""
    serving = Serving(collection)
    try:
        serving = serve_latest(serving, registry, threads=1)
        obstacle = serving.obstacle
        advice = f"The cells are not those of the bundle; {serving.hint or 'run: amips layout'}."
    except BundleError as exc:
        obstacle, advice = str(exc), "Train and publish a bundle: amips train, amips publish."
    collection = serving.collection
    keys = collection.count()
    share = collection.overflow() / max(1, keys)
    changes = _changes(serving)
    audit = _audit(collection, serving)
    if obstacle is None and audit is not None and audit.too_stale:
        obstacle = "cells: stale"
        advice = "Others changed vectors and left their cells; mend them: amips backfill --verify."
    manifest, hook = serving.manifest, serving.hook
    if obstacle is None and manifest is not None:
        asked = SearchRequest(np.zeros((1, manifest.dim), dtype=np.float32), manifest.default_k)
        obstacle = collection.unroutable(asked, rewritten=isinstance(hook, RewriteHook))
        if obstacle is not None:
            advice = "Change that setting of the database, or leave its searches native."
    if obstacle is None and manifest is not None and isinstance(hook, (RouteHook, TunedHook)):
        obstacle = hook.unpromised(Target(manifest.default_k))
        advice = _best_promise(hook, manifest) if obstacle is not None else advice
    gate, recall, drift = gate_of(hook), None, None
    gate.add_overflow(share, collection.break_even)
    if serving.bundle is not None and hook is not None and obstacle is None:
        if queries is not None:
            drift = _drift(serving, hook, queries)
            if drift is not None:
                gate.add_drift(drift)
            chosen = np.random.default_rng(0).permutation(len(queries))[:sample]
            k = min(serving.bundle.manifest.default_k, keys)
            recall = _weigh(gate, serving, hook, queries[np.sort(chosen)], k, progress)
        advice = _advice(gate, share, changes, measured=queries is not None)
        if isinstance(hook, TunedHook) and gate.state != "healthy":
            advice = (
                "Tune again, on the queries that come now: amips tune; until then running routers "
                "search further."
            )
    health = gate.health
    return RouterStatus(
        state="native" if obstacle is not None else health.state,
        reasons=health.reasons if obstacle is None else (obstacle,),
        bundle=None if manifest is None else manifest.version,
        model=None if manifest is None else manifest.model,
        layout=collection.layout(),
        keys=keys,
        overflow=share,
        break_even=collection.break_even,
        sampled=0 if audit is None else audit.sampled,
        misplaced=None if audit is None or not audit.sampled else audit.share_at_most,
        k=None if recall is None or manifest is None else manifest.default_k,
        recall=recall,
        drift=drift,
        advice=advice,
        partitions=changes,
    )


def _best_promise(hook: RouteHook | TunedHook, manifest: Manifest) -> str:
    try:
        hook.calibration.threshold(manifest.default_k, manifest.default_recall)
    except InvalidInput as exc:
        return str(exc)
    return ""


def _audit(collection: Collection, serving: Serving) -> LayoutAudit | None:
    """Look at some keys' cells; None without cells, and where what laid them out is not at hand."""
    if collection.layout() is None or collection.partitions is not None:
        return None
    bundle = serving.bundle

    def assign(ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        """Read the bundle's cells only where keys have nothing beside theirs to judge them by."""
        assert bundle is not None  # noqa: S101 - for the type checker
        return known_cells(bundle)(ids, vectors)

    fits = bundle is not None and bundle.manifest.layout == collection.layout()
    return collection.layouts.audit(_AUDITED, assign if fits else None)


def _changes(serving: Serving) -> PartitionChanges | None:
    """Compare the users' own partitions with those that the bundle was trained on."""
    seen, bundle = serving.collection.partitions, serving.bundle
    given = None if bundle is None else given_cells(bundle)
    if seen is None or given is None:
        return None
    before, now = given.sizes, np.array(serving.collection.layouts.status().sizes)
    total = max(1, serving.collection.count()) / max(1, int(before.sum()) + given.overflow)
    values = given.partitions.values
    return PartitionChanges(
        field=seen.field,
        known=len(values),
        gone=tuple(values[cell] for cell in np.flatnonzero((now == 0) & (before > 0))),
        grown=tuple(values[cell] for cell in np.flatnonzero(now > _GROWN * total * before)),
    )


def _drift(serving: Serving, hook: PreQueryHook, queries: FloatArray) -> Drift | None:
    reference = None if serving.bundle is None else load_reference(serving.bundle)
    if reference is None:
        return None
    rows = np.random.default_rng(1).permutation(len(queries))[:WINDOW]
    outputs = outputs_of(hook, queries[rows])
    return None if outputs is None else compare(reference, outputs)


def _weigh(
    gate: Gate,
    serving: Serving,
    hook: PreQueryHook,
    queries: FloatArray,
    k: int,
    progress: Progress,
) -> Recall | None:
    """Show the gate the queries in the state that it is in; return their recall as planned."""
    planned = RecallWindow(len(queries))
    with progress("search", len(queries), 0, "queries") as step:
        for query in queries:
            as_planned = _examine(serving.collection, hook, query, k, 1.0, None)
            if as_planned is not None:
                planned.add(as_planned.served.recall)
            if gate.widen == 1.0:
                shadow = as_planned
            else:
                shadow = _examine(serving.collection, hook, query, k, gate.widen, gate.better)
            if shadow is not None:
                gate.add_shadow(shadow)
            step.advance(1)
    return planned.summary()


def _examine(
    collection: Collection,
    hook: PreQueryHook,
    query: FloatArray,
    k: int,
    widen: float,
    better: float | None,
) -> Shadow | None:
    target, request = Target(k), SearchRequest(query[None], k)
    found = search_wider(widen, collection, hook, target, request)
    if found is None:
        return None
    # Only a healthy state has to know how; the model had a part in the answer, or could have.
    mode = "native" if widen == math.inf else hook.plan(query[None], target).mode
    return shadow_search(
        ServedQuery(collection, hook, query, target, found, mode, widen), better, None
    )


def _advice(gate: Gate, share: float, changes: PartitionChanges | None, *, measured: bool) -> str:
    if changes is not None and (changes.gone or changes.grown or share > _MUCH_OVERFLOW):
        return (
            "The collection's partitions are not what the router learned: train again, on a new "
            "snapshot (amips snapshot --partitions)."
        )
    if gate.state != "healthy" and share > _MUCH_OVERFLOW:
        return "Give the keys without a cell theirs, and look again: amips backfill."
    if gate.state != "healthy":
        return (
            "Train on the queries that come now (amips train --queries-log), publish, and lay out; "
            "until then running routers search wider or natively."
        )
    if share > _MUCH_OVERFLOW:
        return "Give the keys without a cell theirs: amips backfill."
    drift = gate.health.drift
    if drift is not None and drift.found:
        if gate.in_doubt:
            return (
                "Queries differ from those trained on, and too few were searched for to tell "
                "whether their recall holds; look at more: --sample 2000."
            )
        return "Nothing to do: queries differ from those trained on, and their recall holds."
    if not measured:
        return "Nothing to do; with --queries or --queries-log recall is measured, too."
    return "Nothing to do."
