"""What a search gives: hits, and how they were found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from amips_plugins.collection import Hit

__all__ = ["Hits", "Trace"]


@dataclass(frozen=True, slots=True)
class Trace:
    """How a query was answered.

    Attributes
    ----------
    mode
        ``route``, ``rewrite``, ``tuned`` (natively, with calibrated parameters), ``exact`` (every
        key was looked at) or ``native``.
    n_probes
        Cells the model chose; None without cells.
    version
        Version of the bundle that planned; None without one.
    fallback
        Why the native search answered in place of the model, or why an exact one is none; None
        when nothing went wrong.
    cells
        With ``explain=True``, the cells chosen, best first.
    scanned
        With ``explain=True``, the share of the keys that lie in those cells, plus a bundle's own
        multiplications expressed in keys. Over 1 where every key was scanned: the cells held so
        many that this was cheaper (``Collection.break_even``), or they gave fewer than k hits.
        None where a hook does not say what its cells hold.
    left_out
        Where several collections are searched as one, those that were to be searched and gave no
        answer: keys of theirs are missing.
    plan_us, search_ms
        With ``explain=True``, microseconds spent on the plan of the whole batch and milliseconds
        in the database's client.
    """

    mode: str
    n_probes: int | None = None
    version: str | None = None
    fallback: str | None = None
    cells: tuple[int, ...] | None = None
    scanned: float | None = None
    plan_us: float | None = None
    search_ms: float | None = None
    left_out: tuple[str, ...] = ()


class Hits(Sequence["Hit"]):
    """The hits of one query, best first, and how they were found.

    Attributes
    ----------
    trace
        How the query was answered.
    """

    __slots__ = ("_hits", "trace")

    def __init__(self, hits: Sequence[Hit], trace: Trace) -> None:
        self._hits = tuple(hits)
        self.trace = trace

    @overload
    def __getitem__(self, index: int) -> Hit: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...

    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self._hits[index]

    def __len__(self) -> int:
        return len(self._hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self._hits)

    def __repr__(self) -> str:
        return f"Hits({list(self._hits)!r}, trace={self.trace!r})"
