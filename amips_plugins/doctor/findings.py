"""What the doctor finds."""

from __future__ import annotations

from typing import Literal

import msgspec

from amips_plugins.export.trial_result import Trial

__all__ = ["Diagnosis", "Verdict"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What to do, and why."""

    answer: Literal["route", "leave", "unclear"]
    text: str


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """All that was found."""

    database: str
    collection: str
    field: str
    metric: str
    dim: int
    keys: int
    construction: tuple[tuple[str, str], ...]  # how it is built, in pairs
    notes: tuple[str, ...]  # what to put right, whatever becomes of routing
    native: Literal["scan", "lists", "graph"]  # what a native search does
    break_even: float  # share of the keys above which a full scan is cheaper than cells
    trial: Trial | None
    verdict: Verdict
