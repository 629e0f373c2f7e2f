"""What a database lets be tried of how a collection is searched: what ``amips tune`` is written to.

Trials that build something build it beside the collection, from copies of its keys, and remove it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from amips_plugins.errors import CollectionError
from amips_plugins.files import read_file, replace_file
from amips_plugins.progress import Progress

if TYPE_CHECKING:
    from amips_plugins.collection import Collection, KeyBatch

__all__ = [
    "CODE_CANDIDATES",
    "GRAPH_EFFORTS",
    "NO_KNOB",
    "Build",
    "Knob",
    "Tuning",
    "list_efforts",
    "lists_in_cells",
    "scratch_collection",
    "scratch_folder",
    "scratch_name",
]

_SMALL = (16, 20, 24, 28, 32, 36, 40, 48, 56, 64, 72, 80, 90)
GRAPH_EFFORTS = (*_SMALL, 100, 112, 128, 144, 160, 200, 256, 320, 400, 512, 768, 1024)
"""Candidates that a graph keeps; with 100 of them and more there may be 100 hits.

The least that is promised is one of these, so a step costs what it is long; a promise loses nothing
by short ones.
"""

CODE_CANDIDATES = {"IVF_SQ8": 1.5, "HNSW_SQ": 1.5, "SCANN": 10.0, "IVF_PQ": 8.0, "HNSW_PQ": 8.0}
"""Candidates for every hit that are scored by their vectors, by Milvus' names of kinds of codes."""

_SCRATCH = "scratch"
_RECORD = "scratch-collection"  # file that names a copy until it is gone
_LONGEST = 4_096  # bytes of it


@dataclass(frozen=True, slots=True)
class Knob:
    """The search parameter that says how far an index is searched, and values to try, rising.

    Without any the index looks at every key, and nothing can be set. ``rescored`` says that it
    holds codes, whose candidates are compared by their vectors; ``reorder_k`` how many of them,
    where that is set beside.
    """

    name: str
    efforts: tuple[int, ...]
    rescored: bool = False
    reorder_k: int = 0


NO_KNOB = Knob("", ())
"""Of an index that looks at every key."""


@dataclass(frozen=True, slots=True)
class Build:
    """One way to build the vector index.

    Attributes
    ----------
    name
        What to call it.
    knob
        How it is searched.
    bytes_per_key
        What a search compares of each key it looks at: the vector, or its code.
    options
        What the adapter needs to build it.
    applies
        Whether ``Tuning.apply`` can give it to the collection itself.
    exact_scores
        Whether the scores of its hits are those of the vectors, and not of codes.
    merges
        Whether it is the index that is there, in fewer pieces: then a copy of a sample, which has
        fewer anyway, tells nothing.
    """

    name: str
    knob: Knob
    bytes_per_key: float
    options: Mapping[str, Any] = field(default_factory=dict)
    applies: bool = False
    exact_scores: bool = True
    merges: bool = False


class Tuning(Protocol):
    """Trials on one collection."""

    @property
    def in_process(self) -> bool:
        """Whether the engine computes in this process, whose CPU time then says what it costs."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Where trials are built, and what that takes; whole sentences."""
        ...

    def as_found(self) -> Build | None:
        """Say how the collection is searched now; None where there is nothing to set or try."""
        ...

    def builds(self) -> Sequence[Build]:
        """List what else the database may offer; it may still refuse one."""
        ...

    def scratch(
        self, build: Build, batches: Iterable[KeyBatch], count: int, work: Path, progress: Progress
    ) -> AbstractContextManager[Collection]:
        """Build a copy of some keys, ready to be searched; it is gone on leaving.

        What an earlier run has left in the same ``work`` folder is removed first.
        """
        ...

    def free_bytes(self, work: Path) -> int | None:
        """Return how many bytes there are for a copy; None where nobody knows."""
        ...

    def apply(self, build: Build, progress: Progress) -> Collection:
        """Give the collection this index, and return it when that is built.

        Searches go on meanwhile, where they come from other processes.
        """
        ...

    def way_back(self, before: Build) -> str:
        """Say what to do to have the index as it was, as a whole sentence."""
        ...


def list_efforts(n_lists: int) -> tuple[int, ...]:
    """Return numbers of lists to try of an IVF index, rising to all of them."""
    steps = {round(2 ** (half / 2)) for half in range(2 * max(1, n_lists).bit_length())}
    return tuple(sorted({step for step in steps if step < n_lists} | {max(1, n_lists)}))


def lists_in_cells(rows_per_cell: float) -> int:
    """Return how many lists an IVF index inside a cell gets."""
    return max(1, round(math.sqrt(rows_per_cell)))


def scratch_folder(work: Path) -> Path:
    """Return an empty folder for a copy, in place of what was left in it."""
    folder = work / _SCRATCH
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def scratch_name(collection: str, work: Path | None = None) -> str:
    """Return what a copy in a database is called; one to compare with has a name of its own."""
    beside = "_base" if work is not None and work.name == "base" else ""
    return f"{collection}__amips_tune{beside}"


@contextmanager
def scratch_collection(
    work: Path, name: str, exists: Callable[[str], bool], drop: Callable[[str], object]
) -> Iterator[None]:
    """Let a copy be made under this name in a database, and drop it on leaving.

    What a killed run has left is dropped first; what somebody else has called so never is.
    """
    record, ours = work / _RECORD, name.encode()
    if exists(name):
        if not _recorded(record, ours):
            raise CollectionError(
                f"There is a collection {name!r}, and this command did not make it; drop it, or "
                f"run amips tune with the --out folder of the run that did."
            )
        drop(name)
    replace_file(record, ours)
    try:
        yield
    finally:
        if exists(name):
            drop(name)
        record.unlink(missing_ok=True)


def _recorded(record: Path, name: bytes) -> bool:
    try:
        return read_file(record, _LONGEST) == name
    except OSError:
        return False
