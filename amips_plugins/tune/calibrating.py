"""From a build of an index to how far it has to be searched for a target."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from msgspec.structs import replace

from amips_plugins.collection import Collection
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.tuned import EffortParameter, TunedHook
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.progress import Progress, no_progress
from amips_plugins.tune.measuring import effort_curve
from amips_plugins.tune.recalls import EffortCurve, Truth, promise
from amips_plugins.tune.rows import Row
from amips_plugins.tuning import Build
from amips_plugins.vectors import FloatArray

__all__ = ["calibrated", "enough_for", "parameter_of", "planned"]

_ENOUGH = 0.999  # mean recall past which more effort finds nothing more


def parameter_of(build: Build) -> EffortParameter:
    """Return the search parameter of a build."""
    knob = build.knob
    return EffortParameter(knob.name, knob.rescored, knob.reorder_k)  # type: ignore[arg-type]


def calibrated(
    collection: Collection,
    build: Build,
    queries: FloatArray,
    truth: Truth,
    progress: Progress = no_progress,
    go_on: Callable[[EffortCurve], bool] | None = None,
) -> Calibration:
    """Calibrate the search parameter of a collection that is so built, for each k of the truth."""
    truth = truth if build.exact_scores else truth.by_ids()

    def more(done: EffortCurve) -> bool:
        return float(done.recall(truth.depth)[:, -2].mean()) < _ENOUGH

    parameter, efforts = parameter_of(build), build.knob.efforts
    return promise(
        effort_curve(collection, parameter, efforts, queries, truth, progress, go_on or more)
    )


def enough_for(target: Target) -> Callable[[EffortCurve], bool]:
    """Go on until a target is promised, or nothing is missed."""

    def more(done: EffortCurve) -> bool:
        k = target.k
        holds = float(promise(done).guaranteed[k - 1, -2]) >= _recall(target)
        return not holds and float(done.recall(k)[:, -2].mean()) < 1.0

    return more


def planned(
    name: str, build: Build, made: Calibration, target: Target
) -> tuple[Row, QueryPlan | None]:
    """Return the row so far, and how to search for the target; None where that is not promised."""
    k, recall = target.k, _recall(target)
    row = Row(
        search=name,
        parameter=build.knob.name,
        best_promise=float(made.guaranteed[k - 1, :-1].max()),
        bytes_per_key=build.bytes_per_key,
        applies=build.applies,
    )
    hook = TunedHook(parameter_of(build), made, recall)
    if hook.unpromised(target) is not None:
        return row, None
    plan = hook.plan(np.empty((0, 0), dtype=np.float32), target)
    return replace(row, effort=made.effort(made.threshold(k, recall))), plan


def _recall(target: Target) -> float:
    assert target.recall is not None  # noqa: S101 - tuning has a target
    return target.recall
