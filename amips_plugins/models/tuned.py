"""A bundle without a model: how far the database's own index is searched for a recall target.

An index is searched as far as one number says: a graph's list of candidates (``hnsw_ef``, ``ef``,
``search_list``), or how many lists of an IVF index are read (``nprobe``). Calibration keeps the
numbers that were measured as its ``efforts``, and their negatives as its thresholds, which fall.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from amips_plugins.arrays import readable
from amips_plugins.errors import BundleCorrupt, InvalidInput
from amips_plugins.models.calibration import Calibration
from amips_plugins.plan import EXACT, QueryPlan, Target
from amips_plugins.vectors import FloatArray

__all__ = ["EffortParameter", "ParameterName", "TunedHook", "check_tuned"]

ParameterName = Literal["hnsw_ef", "ef", "nprobe", "search_list"]


class EffortParameter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which of the database's search parameters says how far to search.

    Attributes
    ----------
    name
        The parameter.
    rescored
        Whether the index holds codes: then as many candidates as the effort says are compared with
        the query by their vectors (Qdrant's ``rescore`` and ``oversampling``).
    reorder_k
        How many candidates Milvus compares by their vectors (SCANN), whatever k is; 0 for none.
    """

    name: ParameterName
    rescored: bool = False
    reorder_k: int = 0

    @property
    def holds_hits(self) -> bool:
        """Whether the hits come out of that many candidates, so that there are no more of them."""
        return self.name != "nprobe"

    def params(self, effort: int, k: int) -> dict[str, Any]:
        """Return the search parameters for k hits.

        The number of candidates does not depend on k: the k best of them are the same for any k,
        so that what was measured at one k holds for all.
        """
        params: dict[str, Any] = {self.name: max(effort, k) if self.holds_hits else effort}
        if self.rescored:
            params["quantization"] = {"rescore": True, "oversampling": max(1.0, effort / k)}
        if self.reorder_k:
            params["reorder_k"] = max(self.reorder_k, k)
        return params

    def to_bytes(self) -> bytes:
        """Serialise as JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> EffortParameter:
        """Read what ``to_bytes`` wrote, or raise ``BundleCorrupt``."""
        with readable("The bundle's search parameter"):
            return msgspec.json.decode(data, type=cls)


@dataclass(frozen=True)
class TunedHook:
    """Sets the database's own search parameters, and changes nothing else.

    Attributes
    ----------
    parameter
        Which of them.
    calibration
        Says how far each recall target takes.
    default_recall
        The target when the caller names none.
    """

    parameter: EffortParameter
    calibration: Calibration
    default_recall: float

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:  # noqa: ARG002 - all alike
        """Choose the effort, the same for every query.

        A target that is not promised gets the widest search there is, and says so.
        """
        if target.n_probes is not None:
            raise InvalidInput(
                "n_probes counts cells, and a tuned bundle has none; name the database's own "
                "parameter in params."
            )
        recall = self.default_recall if target.recall is None else target.recall
        if recall == 1.0:
            return EXACT
        reason = self.unpromised(target)
        threshold = -np.inf if reason else self.calibration.threshold(target.k, recall)
        effort = self._effort(self.calibration.widen(threshold, target.widen))
        return QueryPlan(params=self.parameter.params(effort, target.k), reason=reason)

    def unpromised(self, target: Target) -> str | None:
        """Say why a target is not what the calibration promises, or None."""
        return self.calibration.unpromised(
            target.k, self.default_recall if target.recall is None else target.recall
        )

    def _effort(self, threshold: float) -> int:
        """Return the effort of a level; past all of them the largest, for nothing is scanned."""
        if threshold == -np.inf:
            threshold = float(self.calibration.thresholds[-2])
        effort = self.calibration.effort(threshold)
        assert effort is not None  # noqa: S101 - ``check_tuned`` has seen to it
        return effort


def check_tuned(calibration: Calibration, location: str) -> None:
    """Raise ``BundleCorrupt`` for a calibration that is none of efforts."""
    efforts = calibration.efforts
    sound = efforts is not None and len(efforts) > 1 and bool((np.diff(efforts[:-1]) > 0).all())
    if not sound or not np.array_equal(-calibration.thresholds[:-1], efforts[:-1]):  # type: ignore[index]
        raise BundleCorrupt(f"The calibration of {location} is none of a search parameter.")
