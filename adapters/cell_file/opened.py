"""An open cell file: runs, rows and fields, checked when they are read."""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from amips_plugins.adapters.cell_file.codes import Coder
from amips_plugins.adapters.cell_file.file_format import (
    HEADER_BYTES,
    check_runs,
    damaged,
    read_header,
    row_type,
)
from amips_plugins.adapters.cell_file.key_ids import stored_ids
from amips_plugins.adapters.cell_file.ranges import Ranges
from amips_plugins.collection import Id
from amips_plugins.vectors import IntArray

__all__ = ["OpenCellFile"]

_SCANNED = 4 << 20  # bytes of rows read at once by a scan

Rows = npt.NDArray[Any]


class OpenCellFile:
    """The parts of one cell file."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        first = min(HEADER_BYTES, ranges.size)
        self.header = read_header(ranges.read([(0, first)])[0], ranges.size, ranges.where)
        self.row_type = row_type(self.header)
        self.runs = check_runs(self._section("runs"), self.header, ranges.where)
        self.starts: IntArray = self.runs["row"].astype(np.int64)
        self.coder = Coder(self.header.metric, self.header.dim, self.header.bits)
        lengths = np.diff(self.runs["code"].astype(np.int64)).tolist()
        keys = np.diff(self.starts).tolist()
        if lengths != [self.coder.n_bytes(count) for count in keys]:
            raise damaged(ranges.where, "its codes have another length than its keys need")
        self._checked = bytearray(len(keys))
        self._index: tuple[npt.NDArray[Any], IntArray] | None = None
        self._reading = threading.Lock()

    def _section(self, name: str) -> bytes:
        section = self.header.sections[name]
        return self.ranges.read([(section.offset, section.offset + section.length)])[0]

    def _fails(self, what: str) -> Exception:
        return damaged(self.ranges.where, f"{what} has another checksum")

    def read_runs(
        self, numbers: Sequence[int], deadline: float | None, *, once: bool = False
    ) -> list[bytes]:
        """Read the codes of some runs; each is checked when it is first read."""
        start, codes = self.header.sections["codes"].offset, self.runs["code"]
        spans = [(start + int(codes[one]), start + int(codes[one + 1])) for one in numbers]
        found = self.ranges.read(spans, deadline, once=once)
        for number, data in zip(numbers, found, strict=True):
            if not self._checked[number]:
                if zlib.crc32(data) != int(self.runs["crc"][number]):
                    raise self._fails(f"cell {number}")
                self._checked[number] = 1
        return found

    def read_rows(self, numbers: IntArray, deadline: float | None) -> Rows:
        """Read rows, in increasing order, those side by side together."""
        if not len(numbers):
            return np.empty(0, self.row_type)
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        parts = np.split(numbers, breaks)
        spans = [self._span(int(part[0]), int(part[-1]) + 1) for part in parts]
        return self._checked_rows(b"".join(self.ranges.read(spans, deadline)))

    def _span(self, low: int, high: int) -> tuple[int, int]:
        start, size = self.header.sections["rows"].offset, self.row_type.itemsize
        return start + low * size, start + high * size

    def _checked_rows(self, data: bytes) -> Rows:
        rows, size = np.frombuffer(data, self.row_type), self.row_type.itemsize
        view = memoryview(data)
        sums = [zlib.crc32(view[low : low + size - 4]) for low in range(0, len(data), size)]
        if sums != rows["crc"].tolist():
            raise self._fails("a key")
        return rows

    def every_row(self, deadline: float | None = None) -> Iterator[tuple[int, Rows]]:
        """Read all rows in their order, some at a time, each time with the number of the first."""
        at_once = max(1, _SCANNED // self.row_type.itemsize)
        for low in range(0, self.header.count, at_once):
            high = min(low + at_once, self.header.count)
            (data,) = self.ranges.read([self._span(low, high)], deadline)
            yield low, self._checked_rows(data)

    def read_fields(self, rows: Rows, deadline: float | None) -> list[Mapping[str, Any]]:
        """Read the stored fields of rows."""
        if not self.header.has_fields:
            return [{}] * len(rows)
        section = self.header.sections["fields"]
        ends = rows["at"] + rows["length"]
        if len(rows) and int(ends.max()) > section.length:
            raise damaged(self.ranges.where, "fields lie behind its end")
        spans = [
            (section.offset + int(low), section.offset + int(high))
            for low, high in zip(rows["at"], ends, strict=True)
        ]
        decoder = msgspec.json.Decoder(dict[str, Any])
        try:
            return [decoder.decode(data) for data in self.ranges.read(spans, deadline)]
        except msgspec.MsgspecError as exc:
            raise damaged(self.ranges.where, f"its fields: {exc}") from exc

    @property
    def index(self) -> tuple[npt.NDArray[Any], IntArray]:
        """The ids in their order, and the row of each; read when first asked for."""
        with self._reading:
            if self._index is None:
                data, count = self._section("index"), self.header.count
                if hashlib.sha256(data).hexdigest() != self.header.sections["index"].sha256:
                    raise self._fails("its index")
                kind = np.dtype(self.header.ids)
                ids = np.frombuffer(data, kind, count)
                rows = np.frombuffer(data, "<i8", count, count * kind.itemsize)
                self._index = ids, rows.astype(np.int64)
            return self._index

    def find(self, ids: Sequence[Id]) -> IntArray:
        """Return the row of each id, -1 for those that are not there."""
        found = np.full(len(ids), -1, dtype=np.int64)
        known, rows = self.index
        places, wanted = stored_ids(ids, known.dtype)
        if len(places) and len(known):
            at = np.searchsorted(known, wanted).clip(max=len(known) - 1)
            found[places] = np.where(known[at] == wanted, rows[at], -1)
        return found

    def run_of(self, rows: IntArray) -> IntArray:
        """Return the run that each row lies in."""
        return np.searchsorted(self.starts, rows, side="right").astype(np.int64) - 1
