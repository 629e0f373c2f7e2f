"""Doing what was chosen: a bundle of search parameters, and codes where that was agreed to."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import msgspec

from amips_plugins.bundle.manifest import Manifest
from amips_plugins.bundle.registry import Registry
from amips_plugins.collection import Collection, CollectionKey, collection_key
from amips_plugins.errors import BundleNotFound, InvalidInput
from amips_plugins.evaluation import Measurement, evaluate
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.models.calibration import Calibration
from amips_plugins.progress import Progress, no_progress
from amips_plugins.routing.router import LearnedRouter
from amips_plugins.tune.bundle import write_tuned_bundle
from amips_plugins.tune.calibrating import calibrated, parameter_of
from amips_plugins.tune.keys import truth_of
from amips_plugins.tune.rows import NATIVE_ROW, choose
from amips_plugins.tune.run import Measured, deepest
from amips_plugins.tuning import Build

__all__ = ["Applied", "apply_choice", "check_unpinned", "replaced_router", "settled"]


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What was done.

    Attributes
    ----------
    version, registry
        The bundle, and where it was published.
    rebuilt
        The codes that the collection got; None where it was not touched.
    evaluated
        Native and tuned search, on queries that have chosen nothing.
    way_back
        How to have it all as it was, in sentences.
    """

    version: str
    registry: str
    rebuilt: str | None
    evaluated: tuple[Measurement, ...]
    way_back: tuple[str, ...]


def replaced_router(registry: Registry, key: CollectionKey) -> str | None:
    """Return the version of the bundle with a model that serves now, if one does."""
    try:
        manifest = registry.open(key).manifest
    except BundleNotFound:
        return None
    return None if manifest.model == "tuned" else manifest.version


def settled(measured: Measured, *, rebuild: bool) -> Measured:
    """Return the same with the choice to make where the index may not be changed."""
    result = measured.result
    if rebuild or result.choice.answer != "rebuild":
        return measured
    able = [msgspec.structs.replace(row, applies=False) for row in result.rows]
    choice = choose(able, result.recall, result.k, agreed=False)
    changed = msgspec.structs.replace(result, choice=choice)
    return replace(measured, result=changed)


def check_unpinned(registry: Registry, key: CollectionKey) -> None:
    """Raise ``InvalidInput`` where nothing that is published would serve."""
    if registry.pinned(key):
        raise InvalidInput(
            f"Version {registry.current(key)} of {key} is pinned, and what is published now would "
            f"not serve; run amips registry unpin first, or pass --dry-run."
        )


def apply_choice(
    collection: Collection,
    measured: Measured,
    registry: Registry,
    work: Path,
    progress: Progress = no_progress,
) -> Applied:
    """Publish the parameters that were chosen, and change the codes first where those were.

    Killed at any point and called again, it goes on from there: whatever codes there are,
    the parameters that were published have their candidates rescored.
    """
    result, tuning, before = measured.result, measured.tuning, measured.found
    name = result.choice.search or NATIVE_ROW
    build = measured.builds.get(name, before)
    made = measured.calibrations[name]
    rebuilt, served = None, collection
    back: list[str] = []
    key = collection_key(collection.info)
    check_unpinned(registry, key)
    earlier = registry.current(key)
    if build is not before:
        # First, so that no search finds codes without having their candidates rescored.
        _publish(collection, measured, build, made, registry, work)
        try:
            served, rebuilt = tuning.apply(build, progress), build.name
        except BaseException:
            # Parameters with rescoring do for what there was; those of another index do not.
            native = measured.calibrations.get(NATIVE_ROW)
            if native is not None and not build.knob.rescored:
                _publish(collection, measured, before, native, registry, work)
            raise
        depth = deepest(served, served.count())
        truth = truth_of(served, measured.parts.calibrate, depth, progress)
        made = calibrated(served, build, measured.parts.calibrate, truth, progress)
        back.append(tuning.way_back(before))
    version = _publish(served, measured, build, made, registry, work).version
    quiet = HealthMonitor(share=0.0, drift_share=0.0)
    router = LearnedRouter(served, registry=registry, refresh=None, watch=quiet)
    recalls = (result.recall,)
    report = measured.parts.report
    rows = evaluate(router, report, result.k, recalls, progress=progress) if len(report) else []
    if served is not collection:
        served.close()
    undo = (
        f"amips registry rollback {shlex.quote(str(key))} --registry {shlex.quote(registry.root)}"
    )
    if rebuilt is not None:  # two bundles were published
        undo += f" && {undo}"
    back.insert(
        0,
        f"To have the parameters as they were: {undo}"
        if earlier is not None
        else "To search without the parameters: do without a router, or set AMIPS_DISABLED=1.",
    )
    return Applied(
        version=version,
        registry=registry.root,
        rebuilt=rebuilt,
        evaluated=tuple(
            msgspec.structs.replace(row, search=row.search.replace("learned", "tuned"))
            for row in rows
        ),
        way_back=tuple(back),
    )


def _publish(
    collection: Collection,
    measured: Measured,
    build: Build,
    made: Calibration,
    registry: Registry,
    work: Path,
) -> Manifest:
    result = measured.result
    manifest = write_tuned_bundle(
        work / "bundle",
        collection.info,
        result.keys,
        measured.sample,
        parameter_of(build),
        made,
        queries=measured.parts.source,
        k=result.k,
        recall=result.recall,
        reason=result.choice.text,
    )
    registry.publish(work / "bundle")
    return manifest
