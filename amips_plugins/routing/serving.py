"""What a router serves at one moment: a collection, and the model that plans for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from amips_plugins.background.circuit_breaker import Breaker
from amips_plugins.bundle.identity import check_bundle
from amips_plugins.bundle.loading import given_cells, load_hook, load_reference
from amips_plugins.bundle.manifest import MANIFEST, Manifest
from amips_plugins.bundle.package import Bundle
from amips_plugins.bundle.reference import Reference
from amips_plugins.bundle.registry import Registry
from amips_plugins.collection import Collection, Failure, collection_key
from amips_plugins.errors import BundleMismatch, InvalidInput
from amips_plugins.health.monitor import Watch
from amips_plugins.partitions import Partitions
from amips_plugins.plan import NATIVE, PreQueryHook, QueryPlan
from amips_plugins.routing.execution import Outcome
from amips_plugins.routing.fallbacks import Fallbacks

__all__ = [
    "Serving",
    "bundle_in",
    "follow",
    "serve_bundle",
    "serve_latest",
    "serving_bundle",
]

_log = logging.getLogger("amips_plugins")
_HINTS = {
    "cells: not laid out": "run: amips layout",
    "cells: of another bundle": "run: amips layout",
    "cells: stale": "run: amips backfill --verify",
}


@dataclass(frozen=True, eq=False)
class Serving:
    """One state of a router, replaced by another and never changed.

    A search takes it once and reports to it, so it never sees half a change, and what it learns
    is held against nothing else.

    Attributes
    ----------
    collection
        The generation that is searched.
    hook
        What plans; None without a usable bundle.
    bundle
        Where the hook comes from; None if it is the user's own.
    layout
        The collection's cells when it was looked at, where the bundle has any.
    latest
        The version that the registry named when it was looked at.
    obstacle
        Why the native search answers in place of the hook, or None.
    reference
        What the bundle's model said of held-out queries; None where it is not known.
    model_breaker, search_breaker
        Leave a model alone that fails to plan, and plans that fail to be searched.
    watch
        How live searches do; None where nothing plans.
    """

    collection: Collection
    hook: PreQueryHook | None = None
    bundle: Bundle | None = None
    layout: str | None = None
    latest: str | None = None
    obstacle: str | None = None
    reference: Reference | None = None
    model_breaker: Breaker = field(default_factory=Breaker, init=False)
    search_breaker: Breaker = field(default_factory=Breaker, init=False)
    watch: Watch | None = field(default=None, init=False)
    _logged: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if self.hook is None:
            self._logged.add(self.obstacle or "")  # said where it is found
        elif self.obstacle is None:
            watch = Watch(self.collection, self.hook, self.reference)
            object.__setattr__(self, "watch", watch)

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the bundle, or None."""
        return None if self.bundle is None else self.bundle.manifest

    @property
    def hint(self) -> str | None:
        """What to do about the obstacle."""
        return _HINTS.get(self.obstacle or "")

    @property
    def model_share(self) -> float:
        """The model's multiplications, as a share of those of a full scan; 0 for a user's hook."""
        manifest = self.manifest
        if manifest is None:
            return 0.0
        return manifest.parameters / manifest.dim / manifest.count

    def note(self, fallbacks: Fallbacks, reason: str, cause: object = None) -> str:
        """Count a reason to answer natively, log it once for this state, and return it."""
        if fallbacks.count(reason, self._logged):
            fallbacks.log(self.collection.info.name, reason, cause)
        return reason

    def account(self, fallbacks: Fallbacks, plan: QueryPlan, answered: Outcome) -> bool:
        """Learn from a search that was answered; tell whether to look around soon."""
        by_plan = answered.plan is plan
        news = not by_plan or self.search_breaker.troubled
        if news and plan is not NATIVE and not answered.blameless:
            self.searched(by_plan=by_plan)
        for reason, cause in answered.notes:
            self.note(fallbacks, reason, cause)
        return answered.fallback is not None or answered.incomplete

    def failed(self, plan: QueryPlan, exc: Exception, *, late: bool) -> bool:
        """Learn from a search that was not answered; tell whether to look around soon."""
        if plan is NATIVE:
            return False
        stopped = self.collection.failure(exc) in (Failure.OUTAGE, Failure.BUSY)
        if stopped or late:  # the native search had no chance: give it one, should this go on
            self.searched(by_plan=False)
        return not stopped

    def searched(self, *, by_plan: bool) -> None:
        """Learn how a routed search ended: by its plan, or by the native search in its place."""
        self._judge(self.search_breaker, "routed search", good=by_plan)

    def planned(self, *, good: bool) -> None:
        """Learn whether the model gave a plan."""
        self._judge(self.model_breaker, "model", good=good)

    def _judge(self, breaker: Breaker, what: str, *, good: bool) -> None:
        if not (breaker.succeed() if good else breaker.fail()):
            return
        name = self.collection.info.name
        if good:
            self._logged.clear()  # what goes wrong from now on is news
            text = "Circuit breaker closed: the %s of %r answers again."
        else:
            text = "Circuit breaker open: the %s of %r failed time and again; a trial will follow."
        event = "recovery" if good else "rest"
        _log.warning(text, what, name, extra={"amips_event": event, "amips_collection": name})

    def has_cells_of_bundle(self) -> bool:
        """Ask the collection whether it is laid out in the bundle's cells."""
        manifest = self.manifest
        if manifest is None or not manifest.layout or self.collection.partitions is not None:
            return False
        return self.collection.layout() == manifest.layout


def bundle_in(folder: Path) -> Bundle:
    """Open the bundle in a folder, or in the folder that training wrote."""
    inner = folder / "bundle"
    home = inner if (inner / MANIFEST).exists() else folder
    return Bundle.in_folder(home)


def follow(serving: Serving) -> Serving:
    """Look at the database again, and keep the model; the same object where nothing changed."""
    collection = serving.collection.current()
    manifest = serving.manifest
    layout = collection.layout() if manifest is not None and manifest.layout else None
    if collection is serving.collection and layout == serving.layout:
        return serving
    if serving.bundle is None:
        return replace(serving, collection=collection)
    obstacle = _obstacle(collection, serving.bundle, layout)
    return replace(serving, collection=collection, layout=layout, obstacle=obstacle)


def serve_bundle(
    collection: Collection, bundle: Bundle, threads: int, running: Serving | None = None
) -> Serving:
    """Load a bundle, or raise ``BundleError``; a hook of the same one that runs stays."""
    given = given_cells(bundle)
    collection = _seen(collection, None if given is None else given.partitions)
    check_bundle(collection, bundle)
    if running is not None and running.hook is not None and running.manifest == bundle.manifest:
        hook, reference = running.hook, running.reference
    else:
        hook, reference = load_hook(bundle, threads), load_reference(bundle)
    layout = collection.layout() if bundle.manifest.layout else None
    obstacle = _cells_obstacle(bundle, layout)
    return Serving(collection, hook, bundle, layout, obstacle=obstacle, reference=reference)


def serve_latest(running: Serving, registry: Registry, threads: int) -> Serving:
    """Load what the registry has, or raise ``BundleError``; the same object if nothing is new."""
    collection = _seen(running.collection, None)  # in which cells, the bundle says
    latest = registry.current(collection_key(collection.info))
    if running.hook is not None and latest == running.latest and running.obstacle is None:
        return running
    bundle = serving_bundle(collection, registry, latest)  # not asked again: it may have moved
    serving = replace(serve_bundle(collection, bundle, threads, running), latest=latest)
    same = (serving.manifest, serving.layout, latest, serving.obstacle)
    if same == (running.manifest, running.layout, running.latest, running.obstacle):
        return running
    return serving


def _seen(collection: Collection, partitions: Partitions | None) -> Collection:
    """Return a collection in these partitions, or in cells of ours."""
    if collection.partitions == partitions:
        return collection
    try:
        return collection.partitioned(partitions)
    except InvalidInput as exc:
        raise BundleMismatch(
            f"The bundle's partitions are none of the collection's: {exc}"
        ) from exc


def _obstacle(collection: Collection, bundle: Bundle, layout: str | None) -> str | None:
    """Say what keeps a loaded bundle from serving the collection as it is now."""
    try:
        check_bundle(collection, bundle)
    except BundleMismatch:
        return "bundle: BundleMismatch"  # an alias that was moved to another collection
    return _cells_obstacle(bundle, layout)


def _cells_obstacle(bundle: Bundle, layout: str | None) -> str | None:
    if bundle.manifest.layout in ("", layout):
        return None
    return "cells: not laid out" if layout is None else "cells: of another bundle"


def serving_bundle(
    collection: Collection, registry: Registry, latest_version: str | None = None
) -> Bundle:
    """Open the latest bundle that the collection's cells come from, or raise ``BundleError``.

    A newer bundle has to wait until the collection is laid out in its cells. Where the latest
    version is not known, the registry is asked.
    """
    key, name = collection_key(collection.info), collection.info.name
    latest = registry.open(key, latest_version)
    if given_cells(latest) is not None:
        return latest
    layout = collection.layout() if latest.manifest.layout else None
    if layout is None or layout == latest.manifest.layout:
        return latest
    version = collection.layouts.status().version
    older = latest if version is None else registry.open(key, version)
    if older.manifest.layout != layout:
        raise BundleMismatch(
            f"{name!r} is laid out in the cells {layout!r}, which are not those of bundle "
            f"{older.manifest.version}; lay it out again: amips layout."
        )
    _log.info(
        "Bundle %s serves %r until it is laid out in the cells of the latest one, %s.",
        older.manifest.version,
        name,
        latest.manifest.version,
    )
    return older
