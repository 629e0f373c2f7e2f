"""What every database's object has where its cells are its users' own partitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from amips_plugins.cell_layout import (
    AssignCells,
    BuildPlan,
    LayoutAudit,
    LayoutSpec,
    LayoutStatus,
)
from amips_plugins.collection import Collection, CollectionInfo
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions
from amips_plugins.progress import Progress, no_progress

__all__ = ["GivenLayouts"]


class _Counted(Protocol):
    """What can be counted of a collection in its own partitions."""

    @property
    def info(self) -> CollectionInfo: ...

    def count(self) -> int: ...

    def overflow(self) -> int: ...


class GivenLayouts:
    """The layouts of a collection in its own partitions: nothing to build, mend or take back.

    ``count`` says how many keys each of the values has that a router knows.
    """

    def __init__(self, of: _Counted, given: Partitions, count: Callable[[], Sequence[int]]) -> None:
        self._of = of
        self._given = given
        self._count = count

    def status(self) -> LayoutStatus:
        """Say how many keys lie in each of the parts."""
        of = self._of
        return LayoutStatus(
            of.info.name,
            self._given.layout,
            None,
            "given",
            of.count(),
            of.overflow(),
            sizes=tuple(self._count()),
        )

    def audit(self, sample: int, assign: AssignCells | None = None) -> LayoutAudit:  # noqa: ARG002 - there is nothing to look at
        """Find nothing stale: where a key belongs does not follow from its vector."""
        return LayoutAudit(0, 0)

    def plan(self, spec: LayoutSpec) -> BuildPlan:  # noqa: ARG002 - refused
        """Refuse."""
        raise self._refusal()

    def build(self, spec: LayoutSpec, progress: Progress = no_progress) -> Collection:  # noqa: ARG002 - refused
        """Refuse."""
        raise self._refusal()

    def roll_back(self, *, anyway: bool = False) -> Collection:  # noqa: ARG002 - refused
        """Refuse."""
        raise self._refusal()

    def drop_old(self, *, anyway: bool = False) -> list[str]:  # noqa: ARG002 - there is nothing
        """Remove nothing."""
        return []

    def backfill(
        self,
        assign: AssignCells,  # noqa: ARG002 - refused
        progress: Progress = no_progress,  # noqa: ARG002
        *,
        verify: bool = False,  # noqa: ARG002
    ) -> int:
        """Refuse."""
        raise self._refusal()

    def _refusal(self) -> InvalidInput:
        return InvalidInput(
            f"{self._of.info.name!r} is searched by {self._given}, which is its users' to "
            f"write; there is nothing to lay out."
        )
