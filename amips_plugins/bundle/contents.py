"""What is in a bundle: every file's name, limit, writer and reader, in one table.

Values go in by ``BundleContents.write`` and come out by ``load``, and in no other way. A new file
is a line of the table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import msgspec

from amips_plugins.arrays import read_npy, readable, write_npy
from amips_plugins.bundle.golden_outputs import GoldenOutputs
from amips_plugins.bundle.key_sample import KeySample
from amips_plugins.bundle.manifest import FORMAT, MANIFEST, Manifest, describe_file
from amips_plugins.bundle.reference import REFERENCE_LIMIT, Reference
from amips_plugins.files import replace_file
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.cells import Cells
from amips_plugins.models.given import GivenCells
from amips_plugins.models.tuned import EffortParameter

if TYPE_CHECKING:
    from amips_plugins.bundle.package import Bundle

__all__ = [
    "CALIBRATION",
    "CELLS",
    "EFFORT",
    "FURTHER_CELLS",
    "GOLDEN_OUTPUTS",
    "IDS",
    "KEY_SAMPLE",
    "KNOWN_CELLS",
    "MODEL",
    "PARTITIONS",
    "REFERENCE",
    "BundleContents",
    "BundleFile",
    "limit_of",
    "load",
    "write_files",
    "write_ids",
]

_T = TypeVar("_T")


class BundleFile(str, Generic[_T]):
    """The name of a file, its limit in bytes, and how its value becomes bytes and back.

    ``load`` keeps a value for the next who asks, unless it grows with the collection.
    """

    __slots__ = ("from_bytes", "kept", "limit", "to_bytes")

    def __new__(
        cls,
        name: str,
        limit: int,
        to_bytes: Callable[[_T], bytes],
        from_bytes: Callable[[bytes], _T],
        *,
        kept: bool = True,
    ) -> BundleFile[_T]:
        """Make the name, with what else is known."""
        file = super().__new__(cls, name)
        file.limit, file.to_bytes, file.from_bytes, file.kept = limit, to_bytes, from_bytes, kept
        return file

    limit: int
    to_bytes: Callable[[_T], bytes]
    from_bytes: Callable[[bytes], _T]
    kept: bool


def write_ids(ids: Iterable[int | str]) -> bytes:
    """Return ids as lines of JSON."""
    return b"".join(msgspec.json.encode(key) + b"\n" for key in ids)


_V = TypeVar("_V", bound="_Value")


class _Value(Protocol):
    def to_bytes(self) -> bytes: ...

    @classmethod
    def from_bytes(cls: type[_V], data: bytes) -> _V: ...


def _of(name: str, limit: int, kind: type[_V]) -> BundleFile[_V]:
    return BundleFile(name, limit, kind.to_bytes, kind.from_bytes)


_FILES: tuple[BundleFile[Any], ...] = (
    MODEL := BundleFile("model.onnx", 512 << 20, bytes, bytes),
    GOLDEN_OUTPUTS := _of("golden_outputs.npz", 64 << 20, GoldenOutputs),
    REFERENCE := _of("reference.npz", REFERENCE_LIMIT, Reference),
    KEY_SAMPLE := _of("key_sample.json", 1 << 20, KeySample),
    CELLS := _of("cells.npz", 512 << 20, Cells),
    # In place of cells of ours: those that the collection's users have cut.
    PARTITIONS := _of("partitions.json", 64 << 20, GivenCells),
    CALIBRATION := _of("calibration.npz", 64 << 20, Calibration),
    # In place of a model: which search parameter the calibration speaks of.
    EFFORT := _of("effort.json", 1 << 16, EffortParameter),
    # The snapshot's keys, one a line, and (n, 2) int32: cell and sketch of each of them.
    IDS := BundleFile("ids.jsonl", 64 << 30, bytes, bytes, kept=False),
    KNOWN_CELLS := BundleFile("known_cells.npy", 16 << 30, write_npy, read_npy, kept=False),
    # (m, 2) int32: row and cell, wherever a key lies in more cells than its own.
    FURTHER_CELLS := BundleFile("further_cells.npy", 16 << 30, write_npy, read_npy, kept=False),
)
_BY_NAME = {str(file): file for file in _FILES}


def limit_of(name: str) -> int:
    """Return how many bytes a file of this name may have."""
    return _BY_NAME[name].limit if name in _BY_NAME else 64 << 20


class BundleContents:
    """The values of a bundle's files by name; what is not there is read from the bundle."""

    def __init__(self, values: dict[str, Any], bundle: Bundle | None = None) -> None:
        self._values = values
        self._bundle = bundle

    def __getitem__(self, file: BundleFile[_T]) -> _T:
        """Return the value of a file, or raise ``BundleCorrupt``."""
        if file in self._values or self._bundle is None:
            value: _T = self._values[file]
            return value
        data = self._bundle.read(file)
        with readable(f"{file} of {self._bundle.location}"):
            value = file.from_bytes(data)
        if file.kept:
            self._values[file] = value
        return value

    def files(self) -> dict[str, bytes]:
        """Return what ``write`` writes, by name."""
        return {str(name): _BY_NAME[name].to_bytes(value) for name, value in self._values.items()}

    def write(self, folder: Path, **about: Any) -> Manifest:
        """Write the files, and the manifest last, into a folder that nobody reads yet.

        The files fill in what they say of the manifest's fields, and the clock version and time.
        """
        return write_files(folder, self.files(), **about)


def write_files(folder: Path, files: Mapping[str, bytes], **about: Any) -> Manifest:
    """Do what ``BundleContents.write`` does with files as they are."""
    cells: Cells | GivenCells | None = None
    if CELLS in files:
        cells = Cells.from_bytes(files[CELLS])
    elif PARTITIONS in files:
        cells = GivenCells.from_bytes(files[PARTITIONS])
    created = datetime.now(timezone.utc)
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(files[name])
    content = digest.hexdigest()
    known: dict[str, Any] = {
        "format": FORMAT,
        "version": f"{created:%Y%m%dT%H%M%S}-{content[:8]}",
        "created": created.isoformat(timespec="seconds"),
        "n_cells": 0 if cells is None else cells.n_cells,
        "layout": "" if cells is None else cells.layout(),
        "files": {name: describe_file(data) for name, data in files.items()},
    }
    manifest = Manifest(**(known | about))
    for name, data in files.items():
        replace_file(folder / name, data)
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    replace_file(folder / MANIFEST, text)
    return manifest


def load(bundle: Bundle) -> BundleContents:
    """Return the values of a bundle's files, each read and verified once, at its first use."""
    return BundleContents(bundle.values, bundle)
