"""Classes of filters, and which of them a router is known to hold its target under.

A calibrated router promises nothing of a filtered search: the best keys that a filter leaves may
lie in other cells than the best keys of all, and a database with an index of the payload may find
them sooner by itself. So the native search answers until shadow samples of *this kind* of filter
show that routing has the recall that is asked for and costs less; and again as soon as they do not.

Filters are of one class where they name the same fields and operators, whatever the values.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from amips_plugins.health.change_detector import Detector
from amips_plugins.health.gate import FALSE_FALL, FALSE_RISE, SLACK

__all__ = ["FilterClasses", "FilterTrial", "shape_of"]

_LONGEST = 200
_LITERALS = re.compile(
    r""" "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | 0x[0-9a-f]+
    | (?<![\w.]) [+-]?\d+(?:\.\d*)?(?:e[+-]?\d+)? \b | \b(?:true|false)\b """,
    re.VERBOSE | re.IGNORECASE,
)
_LISTS = re.compile(r"([\[(])\s*\?(?:\s*,\s*\?)*\s*([\])])")
_FIELDS = ("key", "field", "is_empty", "is_null")  # whose value names what is compared


def shape_of(given: Any) -> str:
    """Return what a filter compares and how, without the values; at most 200 characters."""
    shape = _shape(given)
    if len(shape) <= _LONGEST:
        return shape
    return f"{shape[: _LONGEST - 17]} {hashlib.sha256(shape.encode()).hexdigest()[:16]}"


def _shape(given: Any, name: str = "") -> str:
    if isinstance(given, str) and name in _FIELDS:
        return given
    if isinstance(given, str) and not name:  # an expression, as Milvus takes it
        values = " ".join(_LITERALS.sub("?", given).split())
        return _LISTS.sub(r"\1?\2", values)
    if hasattr(given, "model_dump"):
        given = given.model_dump(exclude_none=True)
    if isinstance(given, Mapping):
        parts = (f"{key}: {_shape(value, str(key))}" for key, value in given.items())
        return "{" + ", ".join(sorted(parts)) + "}"
    if isinstance(given, (list, tuple, set, frozenset)):
        return "[" + ", ".join(sorted({_shape(value, name) for value in given})) + "]"
    if name or given is None or isinstance(given, (bool, int, float)):
        return "?"
    if callable(given):
        return getattr(given, "__qualname__", type(given).__qualname__)
    return _shape(repr(given))  # an object of a client that says what it holds


@dataclass(frozen=True, slots=True)
class FilterTrial:
    """One filtered query, searched natively and as a router would, off the caller's path.

    Attributes
    ----------
    recall, target
        Recall of the routed answer against the exact filtered one, and what was asked for.
    cost_ratio
        Cost of the routed search over the native one's.
    """

    recall: float
    target: float
    cost_ratio: float


@dataclass(slots=True)
class _Evidence:
    routed: bool = False
    holds: bool = False
    pays: bool = False
    samples: int = 0
    recall: Detector = field(default_factory=lambda: Detector(FALSE_RISE))
    cost: Detector = field(default_factory=lambda: Detector(FALSE_RISE))

    def start(self, *, routed: bool) -> None:
        alpha = FALSE_FALL if routed else FALSE_RISE
        self.routed, self.holds, self.pays = routed, False, False
        self.recall, self.cost = Detector(alpha), Detector(alpha)


class FilterClasses:
    """What is known of each class of filters; the least recently seen are forgotten.

    ``routed`` may be asked by any thread, ``add`` by one at a time.

    Parameters
    ----------
    most
        How many classes are remembered.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._classes: OrderedDict[str, _Evidence] = OrderedDict()

    def routed(self, shape: str) -> bool:
        """Tell whether routing is known to hold and to pay for this class; new ones are not."""
        evidence = self._classes.get(shape)
        return evidence is not None and evidence.routed

    def add(self, shape: str, trial: FilterTrial) -> None:
        """Weigh a sampled query of a class."""
        evidence = self._classes.setdefault(shape, _Evidence())
        self._classes.move_to_end(shape)
        while len(self._classes) > self._most:
            self._classes.popitem(last=False)
        evidence.samples += 1
        saved = 1.0 - min(trial.cost_ratio, 2.0)
        if evidence.routed:
            missed = evidence.recall.add(trial.target - trial.recall, max(1.0 - trial.target, 0.01))
            if missed or evidence.cost.add(-saved, 1.0):
                evidence.start(routed=False)
            return
        enough = max(trial.target - SLACK, 0.01)
        evidence.holds = evidence.holds or evidence.recall.add(trial.recall - enough, enough)
        evidence.pays = evidence.pays or evidence.cost.add(saved, 1.0)
        if evidence.holds and evidence.pays:
            evidence.start(routed=True)

    def summary(self) -> Iterable[tuple[str, bool, int]]:
        """Return each class with whether it is routed, and its number of samples."""
        return [(shape, e.routed, e.samples) for shape, e in list(self._classes.items())]
