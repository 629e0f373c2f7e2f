"""Classes of filters, and which of them a router is known to hold its target under.

A calibrated router promises nothing of a filtered search: the best keys that a filter leaves may
lie in other cells than the best keys of all, and a database with an index of the payload may find
them sooner by itself. So the native search answers until shadow samples of *this class* of filter
show that routing has the recall that is asked for and costs less; and again as soon as they do not.
Where the target is missed, more of the keys are searched, step by step: a filter that one key in
five passes asks for the cells of the best 5 k keys.

A bundle without a model sets a parameter of the native search itself. There, a class that misses
its target without the parameter gets it though that takes longer: nothing else would hold it.

Filters are of one class where they name the same fields and operators, whatever the values.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from amips_plugins.background.forks import ForkLock
from amips_plugins.health.change_detector import Detector

__all__ = [
    "DEARER",
    "MISSES",
    "NOT_MEASURED",
    "FilterClass",
    "FilterClasses",
    "FilterTrial",
    "FilterVerdict",
    "narrows",
    "shape_of",
]

NOT_MEASURED = "filter: not measured"
MISSES = "filter: routing misses the target"
DEARER = "filter: native is as cheap"

WORTH = 0.8
"""Share of the native search's time that routing has to stay below before it begins."""

_STEPS = (1.0, 1.5, 2.0, 3.0, 4.0)  # times the share of the keys that an unfiltered search takes
_FALSE_START = 1e-4  # below its target, a class is routed once in 1 / this many samples at most
_FALSE_STOP = 1e-3
_LEAST_LOSS = 0.01  # for a target of 1, which nothing can exceed
_UNDECIDED = 1_000  # samples after which more is searched for
_REST = 1_000  # samples that a class is left alone for that did not do
_MOST = 64

_LONGEST = 200
_LONG_LISTS = re.compile(
    r"""\bin\s*\[ (?: [\d\s,.+-]* | (?:\s*"[^"\\]*"\s*,?)* | (?:\s*'[^'\\]*'\s*,?)* ) \]""",
    re.VERBOSE | re.IGNORECASE,
)
_LITERALS = re.compile(
    r"""(?P<kept> (?<=[\w\]])(?<![iI][nN])\[\s*(?:"[^"]*"|'[^']*'|\d+)\s*\] | \bkey="[^"]*" )
    | "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | \b0x[0-9a-f]+
    | (?<![\w.]) [+-]?\d+(?:\.\d*)?(?:e[+-]?\d+)? \b | \b(?:true|false)\b """,
    re.VERBOSE | re.IGNORECASE,
)
_LISTS = re.compile(r"([\[({])\s*\?(?:\s*,\s*\?)*\s*([\])}])")
_UNSET = re.compile(r"(?:, )?\b[\w#]+=(?:None|\[\])")
_REMEMBERED = 1_000  # characters of a text whose shape is kept
_SCALARS = (bool, int, float, str)
_CLAUSES = ("must", "should", "must_not", "min_should")
_FIELDS = ("key", "field", "is_empty", "is_null")  # whose value names what is compared


def narrows(given: Any) -> bool:
    """Tell whether a filter keeps anything out: stores pass empty ones."""
    if given is None or isinstance(given, (str, Mapping)):
        return bool(given)
    clauses = [getattr(given, name) for name in _CLAUSES if hasattr(given, name)]
    return not clauses or any(clauses)


def shape_of(given: Any) -> str:
    """Return what a filter compares and how, without the values; at most 200 characters."""
    shape = _shape(given)
    if len(shape) <= _LONGEST:
        return shape
    return f"{shape[: _LONGEST - 17]} {hashlib.sha256(shape.encode()).hexdigest()[:16]}"


def _shape(given: Any, name: str = "") -> str:
    if isinstance(given, str):
        if name in _FIELDS:
            return given
        return "?" if name else _text_shape(given)  # an expression, as Milvus takes it
    if hasattr(given, "model_fields_set"):  # Qdrant's
        given = {key: value for key, value in vars(given).items() if value is not None}
    if isinstance(given, Mapping):
        pairs = ((str(key), _shape(value, str(key))) for key, value in given.items())
        return "{" + ", ".join(sorted(f"{key}: {s}" for key, s in pairs if s != "[]")) + "}"
    if isinstance(given, (list, tuple, set, frozenset)):
        if name and isinstance(next(iter(given), None), _SCALARS):
            return "[?]"  # there may be thousands
        return "[" + ", ".join(sorted({_shape(value, name) for value in given})) + "]"
    if name or isinstance(given, _SCALARS):
        return "?"
    if given is None:
        return ""
    if callable(given):
        return str(getattr(given, "__qualname__", type(given).__qualname__))
    return _text_shape(repr(given))  # Edge's, which say what they hold


def _text_shape(text: str) -> str:
    return _remembered(text) if len(text) <= _REMEMBERED else _without_values(text)


def _without_values(text: str) -> str:
    shorter = _UNSET.sub("", _LONG_LISTS.sub("in [?]", text))
    values = _LITERALS.sub(lambda match: match["kept"] or "?", shorter)
    return _LISTS.sub(r"\1?\2", " ".join(values.split()))


_remembered = lru_cache(1024)(_without_values)


@dataclass(frozen=True, slots=True)
class FilterTrial:
    """One filtered query, searched natively and as a router would, off the caller's path.

    Recall of the routed answer against the exact filtered one, and its ``target`` (``relative`` to
    what the native search found for the same query, or not); the time of the routed search over the
    native one's; how many times the planned share of the keys was searched; the recall of the
    native search, where the plan is that search with another parameter.
    """

    recall: float
    target: float
    cost_ratio: float
    widen: float = 1.0
    relative: bool = False
    native: float | None = None


class FilterVerdict(NamedTuple):
    """What is known of a class: how far to search by plan, or why the native search answers."""

    widen: float | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class FilterClass:
    """What is known of one class of filters: fields and operators, without values.

    Its searches look at ``widen`` times the planned share of the keys, or go native for a
    ``reason``; ``samples`` have been looked at.
    """

    shape: str
    widen: float | None
    reason: str | None
    samples: int


@dataclass(slots=True)
class _Evidence:
    step: int = 0
    routed: bool = False
    reason: str = NOT_MEASURED
    samples: int = 0
    left_alone: int = 0  # samples still to come before it is tried again
    rest: int = _REST
    tried: int = 0
    holds: bool = False
    pays: bool = False
    native: Literal["", "short", "fine"] = ""  # of its target, where it is the same search
    natively: tuple[Detector, Detector] = field(init=False)  # of being below its target, and above
    recall: tuple[Detector, Detector] = field(init=False)  # of being above its bound, and below
    cost: tuple[Detector, Detector] = field(init=False)

    def __post_init__(self) -> None:
        self.told_of_native("")
        self.begin()

    def told_of_native(self, what: Literal["", "short", "fine"]) -> None:
        """Keep what the native search is known to do, and look again whether it still does."""
        self.native = what
        self.natively = Detector(_FALSE_START), Detector(_FALSE_STOP)

    def look_at_native(self, trial: FilterTrial) -> bool:
        """Weigh what the native search found; tell whether it is left out of account, or fine."""
        if trial.native is None:
            return True
        gain = trial.native - trial.target
        short, fine = self.natively
        if short.add(-gain, max(1.0 - trial.target, _LEAST_LOSS)):
            self.told_of_native("short")
        elif fine.add(gain, max(trial.target, _LEAST_LOSS)):
            self.told_of_native("fine")
        return self.native == "fine"

    def begin(self) -> None:
        """Forget what was seen at another step, or before it was routed."""
        self.tried, self.holds, self.pays = 0, False, False
        self.recall = Detector(_FALSE_START), Detector(_FALSE_STOP)
        self.cost = Detector(_FALSE_STOP), Detector(_FALSE_STOP)


class FilterClasses:
    """What is known of each class of filters; the least recently sampled are forgotten.

    Any number of threads may share it. Filters that are ``known`` are routed from the start, and
    watched as the others are; beyond ``most`` classes any other is searched natively.
    """

    def __init__(
        self, known: Iterable[Any] = (), *, widens: bool = True, most: int = _MOST
    ) -> None:
        self._last = len(_STEPS) - 1 if widens else 0
        self._most = most
        self._lock = ForkLock()
        self._classes: OrderedDict[str, _Evidence] = OrderedDict()
        for one in known:
            self._of(shape_of(one)).routed = True
        self._decided = bool(self._classes)

    def verdict(self, given: Any) -> FilterVerdict:
        """Say how to search under a filter."""
        if not self._decided:  # which spares a look at the filter
            return FilterVerdict(None, NOT_MEASURED)
        evidence = self._classes.get(shape_of(given))
        if evidence is None:
            return FilterVerdict(None, NOT_MEASURED)
        if evidence.routed:
            return FilterVerdict(_STEPS[evidence.step], None)
        return FilterVerdict(None, evidence.reason)

    def to_try(self, shape: str) -> float | None:
        """Return how far to search for a sample of a class; None while it is left alone."""
        with self._lock:
            evidence = self._of(shape)
            if evidence.left_alone:
                evidence.left_alone -= 1
                if evidence.left_alone:
                    return None
                evidence.step = 0
                evidence.begin()
            return _STEPS[evidence.step]

    def add(self, shape: str, trial: FilterTrial) -> bool:
        """Weigh a sampled query of a class; tell whether what is known has changed."""
        with self._lock:
            changed = self._weigh(self._of(shape), trial)
        self._decided = self._decided or changed
        return changed

    def _weigh(self, evidence: _Evidence, trial: FilterTrial) -> bool:
        if trial.widen != _STEPS[evidence.step]:
            return False
        evidence.samples += 1
        evidence.tried += 1
        before = evidence.routed, evidence.reason
        ratio = min(trial.cost_ratio, 2.0)
        above, below = evidence.recall
        most = 1.0 if trial.relative else max(1.0 - trial.target, _LEAST_LOSS)
        missed = below.add(trial.target - trial.recall, most)
        # Whether what it costs decides: not while nothing cheaper is known to hold the target.
        counts = evidence.look_at_native(trial)
        if evidence.routed:
            if missed:
                self._search_more(evidence)
            elif counts and evidence.cost[1].add(ratio - 1.0, 1.0):
                self._give_up(evidence, DEARER)
            return (evidence.routed, evidence.reason) != before
        enough = max(trial.target, _LEAST_LOSS)
        gain = trial.recall - trial.target
        evidence.holds = above.add(gain, 1.0 if trial.relative else enough) or evidence.holds
        evidence.pays = evidence.cost[0].add(WORTH - ratio, 2.0 - WORTH) or evidence.pays
        if missed:
            self._search_more(evidence)
        elif evidence.holds and (evidence.pays or evidence.native == "short"):
            evidence.routed = True
            evidence.begin()
        elif counts and evidence.cost[1].add(ratio - WORTH, WORTH):
            self._give_up(evidence, DEARER)
        elif evidence.tried >= _UNDECIDED:
            self._search_more(evidence)
        return (evidence.routed, evidence.reason) != before

    def summary(self) -> tuple[FilterClass, ...]:
        """Return what is known of every class, the latest sampled last."""
        with self._lock:
            known = list(self._classes.items())
        return tuple(
            FilterClass(
                shape,
                _STEPS[e.step] if e.routed else None,
                None if e.routed else e.reason,
                e.samples,
            )
            for shape, e in known
        )

    def _of(self, shape: str) -> _Evidence:
        evidence = self._classes.get(shape)
        if evidence is None:
            evidence = self._classes[shape] = _Evidence()
            while len(self._classes) > self._most:
                self._classes.popitem(last=False)
        else:
            self._classes.move_to_end(shape)
        return evidence

    def _search_more(self, evidence: _Evidence) -> None:
        if evidence.step == self._last:
            self._give_up(evidence, MISSES)
            return
        evidence.step += 1
        evidence.routed, evidence.reason = False, MISSES
        evidence.begin()

    def _give_up(self, evidence: _Evidence, reason: str) -> None:
        evidence.routed, evidence.reason = False, reason
        evidence.left_alone = evidence.rest
        evidence.rest *= 2  # what fails again and again is asked less and less
        evidence.begin()
