"""What the benchmarks of promises say of one target in one situation."""

from __future__ import annotations

import msgspec

__all__ = ["HEADER", "Row", "show"]

HEADER = (
    "| situation | target | k | recall | native recall | cost ratio | answered by |\n"
    "|---|---|---|---|---|---|---|"
)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One target in one situation.

    Attributes
    ----------
    situation
        Its name.
    target, k
        What was asked for.
    recall, native_recall
        Mean recall@k, by score: of what answered, and of the native search.
    cost_ratio
        What answered, the model included, over that native search; 1 where it answers itself.
    answered_by
        ``learned``, or ``native`` where the target cannot be promised.
    """

    situation: str
    target: float
    k: int
    recall: float
    native_recall: float
    cost_ratio: float
    answered_by: str


def show(row: Row) -> str:
    """Lay a row out as a line of a table."""
    return (
        f"| {row.situation} | {row.target:.2f} | {row.k} | {row.recall:.3f} "
        f"| {row.native_recall:.3f} | {row.cost_ratio:.2f} | {row.answered_by} |"
    )
