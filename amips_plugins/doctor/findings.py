"""What the doctor finds."""

from __future__ import annotations

from typing import Literal

import msgspec

from amips_plugins.export.trial_result import Trial

__all__ = ["Diagnosis", "Verdict"]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What to do.

    Attributes
    ----------
    answer
        ``route``: worth it; ``leave``: leave the collection as it is; ``unclear``: cannot say.
    text
        Why, and what to do, in a sentence or two.
    """

    answer: Literal["route", "leave", "unclear"]
    text: str


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """All that was found.

    Attributes
    ----------
    database, collection, field, metric, dim, keys
        Which collection, and how many keys it has.
    construction
        How it is built, in pairs.
    notes
        What to put right, whatever becomes of routing.
    native
        What a native search does: scan every key, scan some lists, follow a graph.
    break_even
        Share of the keys above which a full scan is cheaper than a search of cells.
    trial
        None where there was nothing to try.
    verdict
        What to do.
    """

    database: str
    collection: str
    field: str
    metric: str
    dim: int
    keys: int
    construction: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    native: Literal["scan", "lists", "graph"]
    break_even: float
    trial: Trial | None
    verdict: Verdict
