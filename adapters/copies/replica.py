"""Making one collection equal to another, pass by pass, while others read and write both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from amips_plugins.adapters.copies.row_changes import Change, Row, SourceBaseline, diff_rows
from amips_plugins.collection import Id
from amips_plugins.errors import CollectionError
from amips_plugins.progress import Progress, Step

__all__ = ["Replica", "found_again", "found_enough"]

_BATCH = 2_000  # rows
_MAX_PASSES = 20
_FEW = 0.0005  # changes in a pass, as a share of the keys, that the next step may leave
_FOUND = 0.9  # share of the neighbours that the copy has to find again; others may be writing


@dataclass
class Replica(ABC):
    """A copy of a collection, and what it takes to keep it one.

    ``counted`` is what the source counted before the last pass, and ``changed`` the keys that the
    pass wrote or deleted.
    """

    progress: Progress
    counted: int = 0
    changed: int = 0

    @property
    @abstractmethod
    def names(self) -> tuple[str, str]:
        """The names of source and copy."""

    @abstractmethod
    def count(self) -> int:
        """Count the source."""

    @abstractmethod
    def rows(self, *, of_copy: bool = False) -> Iterator[Row]:
        """Read the source, or the copy, in the order of the ids, each id once."""

    @abstractmethod
    def digests(self, ids: Sequence[Id]) -> Mapping[Id, int]:
        """Read what the copy holds now of these ids."""

    @abstractmethod
    def write(self, rows: Sequence[Row], *, new: bool) -> None:
        """Put rows into the copy; ``new`` where it holds none of them."""

    @abstractmethod
    def delete(self, ids: Sequence[Id]) -> None:
        """Delete ids from the copy."""

    @abstractmethod
    def problem(self, base: SourceBaseline) -> str | None:
        """Say what is wrong with the copy, as a sentence without its end; None where nothing is."""

    def catch_up(self, base: SourceBaseline | None = None, *, new: bool = False) -> SourceBaseline:
        """Pass until the copy is equal but for what others write during one pass."""
        before = float("inf")
        for number in range(_MAX_PASSES):
            now = self.run(base, new=new and number == 0)
            if self.changed <= _FEW * len(now.ids) or self.changed > before / 2:
                break
            base, before = None if base is None else now, self.changed
        return now

    def verify(self, base: SourceBaseline) -> SourceBaseline:
        """Refuse a copy that finds neighbours worse than its source, or has other keys.

        Others may write to the source while the two are compared, so a copy that fails catches up
        and is compared again before it is given up. Returns the base of the last pass.
        """
        for _ in range(_MAX_PASSES):
            problem = self.problem(base)
            if problem is None:
                return base
            base = self.run(None)
            if not self.changed:
                break
        raise CollectionError(f"{problem}; nothing was switched.")

    def drain(self, base: SourceBaseline) -> None:
        """After the switch: bring over what was written to the source until there is no more."""
        for _ in range(_MAX_PASSES):
            base = self.run(base)
            if not self.changed:
                return
        source, copy = self.names
        raise CollectionError(
            f"{source!r} is still being written to after the switch to {copy!r}: some writer names "
            f"it and not the alias; stop that writer and run the same command again."
        )

    def run(self, base: SourceBaseline | None, *, new: bool = False) -> SourceBaseline:
        """Make one pass, and return the source as it read it.

        Of a ``new`` copy nothing is read, and rows are inserted; ``base`` is as for ``diff_rows``.
        With it only those rows of the copy are read that may have to change.
        """
        seen = SourceBaseline()
        self.counted = self.count()
        with self.progress("copy" if new else "compare", self.counted, 0, "keys") as step:
            there: Iterator[Row] = iter(()) if new else self._there(base)
            self.changed = 0
            changes = diff_rows(self._watched(seen, step), there, base)
            for found in _batches(changes, _BATCH):
                some = found if base is None else self._still_due(found)
                written = [change.row for change in some if change.row is not None]
                if written:
                    self.write(written, new=new)
                gone = [change.id for change in some if change.row is None]
                if gone:
                    self.delete(gone)
                self.changed += len(some)
        return seen

    def _there(self, base: SourceBaseline | None) -> Iterator[Row]:
        return self.rows(of_copy=True) if base is None else base.rows()

    def _watched(self, seen: SourceBaseline, step: Step) -> Iterator[Row]:
        for row in self.rows():
            seen.add(row)
            step.advance(1)
            yield row

    def _still_due(self, found: Sequence[Change]) -> list[Change]:
        """Leave out what others have written to the copy since it was equal to the source."""
        now = self.digests([change.id for change in found])
        return [
            change
            for change in found
            if (change.old.digest if change.old else None) == now.get(change.id)
        ]


def found_enough(share: float, changed: int, keys: int) -> bool:
    """Tell whether a copy finds as many of its source's neighbours as it should.

    Two neighbours are lost for a key that moved since: where it was and where it went.
    """
    return share >= _FOUND - 2 * changed / max(1, keys)


def found_again(before: Mapping[Id, float], after: Mapping[Id, float]) -> float:
    """Return the share of hits that are found again, or give way to better ones."""
    if not before:
        return 1.0
    worst = min(after.values(), default=float("-inf"))
    worst = worst if len(after) >= len(before) else float("-inf")
    slack = 1e-4 * max(abs(score) for score in before.values())
    found = [key in after or score <= worst + slack for key, score in before.items()]
    return sum(found) / len(found)


def _batches(found: Iterator[Change], size: int) -> Iterator[list[Change]]:
    some: list[Change] = []
    for change in found:
        some.append(change)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
