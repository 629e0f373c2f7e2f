"""How long work reports its progress, without knowing who watches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Progress", "Step", "no_progress"]


class Step(Protocol):
    """One running step of long work."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report that ``amount`` more units are done; ``note`` says how it goes (a loss)."""
        ...


Progress = Callable[[str, int, int, str], AbstractContextManager[Step]]
"""Opens a step: ``progress(title, total, done, unit)``; ``done`` units are there from before."""


class _Silent:
    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report nothing."""


@contextmanager
def no_progress(title: str, total: int, done: int = 0, unit: str = "") -> Iterator[Step]:  # noqa: ARG001 - the signature of Progress
    """Watch nothing: the default of every library function."""
    yield _Silent()
