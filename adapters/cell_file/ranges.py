"""Reading parts of a file, all at once: from a disk, or from an object store through fsspec."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import fsspec

from amips_plugins.background.abandonable import run_abandonable
from amips_plugins.errors import (
    AmipsError,
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    InvalidInput,
)

__all__ = ["DiskFile", "Ranges", "StoredFile", "pages_of"]

Span = tuple[int, int]

_DONTCACHE = 0x80  # RWF_DONTCACHE of Linux 6.14
_PAGE = 4096  # bytes that a disk is read in at least
_TOGETHER = 64  # reads of a store under way at once
_PAUSE = 0.05  # seconds before a read is tried again; then twice as long, up to a second


class Ranges(Protocol):
    """A file of which parts are read."""

    where: str
    size: int

    def read(
        self, spans: Sequence[Span], deadline: float | None = None, *, once: bool = False
    ) -> list[bytes]:
        """Read from one offset up to another, for each.

        ``deadline`` is of ``time.monotonic``; what is read ``once`` need not be remembered.
        """
        ...

    def changed(self) -> bool:
        """Tell whether another file lies there now."""
        ...


class DiskFile:
    """A file on a disk: the kernel is told all that will be read, then it is read."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise CollectionNotFound(
                f"There is no cell file {path}; write one: amips cell-file."
            ) from exc
        except OSError as exc:
            raise CollectionError(f"{path} cannot be opened ({exc.strerror}).") from exc
        found = os.fstat(self._file)
        self.size = found.st_size
        self._which = (found.st_dev, found.st_ino, found.st_mtime_ns)
        self._uncached = sys.platform == "linux"
        if hasattr(os, "posix_fadvise"):  # what is asked for is read, and nothing behind it
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def read(
        self,
        spans: Sequence[Span],
        deadline: float | None = None,  # noqa: ARG002 - a disk is waited for
        *,
        once: bool = False,
    ) -> list[bytes]:
        """Read the spans, which the disk may take together."""
        if once and self._uncached:
            return [self._leaving_no_trace(start, end) for start, end in spans]
        if len(spans) > 1 and hasattr(os, "posix_fadvise"):
            for start, end in pages_of(spans):
                os.posix_fadvise(self._file, start, end - start, os.POSIX_FADV_WILLNEED)
        return [self._whole(start, end) for start, end in spans]

    def _leaving_no_trace(self, start: int, end: int) -> bytes:
        """Read what stays out of the page cache, unless it was there; else as ever."""
        data = bytearray(end - start)
        try:
            if os.preadv(self._file, [data], start, _DONTCACHE) == len(data):
                return bytes(data)
        except OSError:  # a kernel or a file system that cannot
            self._uncached = False
        return self._whole(start, end)

    def _whole(self, start: int, end: int) -> bytes:
        try:
            data = os.pread(self._file, end - start, start)
            while len(data) < end - start:
                more = os.pread(self._file, end - start - len(data), start + len(data))
                if not more:
                    break
                data += more
        except OSError as exc:
            raise CollectionError(f"{self.where} cannot be read ({exc.strerror}).") from exc
        return _complete(data, end - start, self.where)

    def changed(self) -> bool:
        """Tell whether another file lies there now."""
        try:
            found = os.stat(self.path)
        except OSError:
            return True
        return (found.st_dev, found.st_ino, found.st_mtime_ns) != self._which

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


class StoredFile:
    """A file in a store: spans are read side by side, and again where that fails, in time."""

    def __init__(self, url: str, timeout: float) -> None:
        self.where = url
        self._timeout = timeout
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as exc:
            raise InvalidInput(f"{url!r} cannot be opened: {exc}") from exc
        self._which = self._look()
        self.size = int(self._which["size"])

    def _look(self) -> dict[str, Any]:
        def look(_: float) -> dict[str, Any]:
            self._fs.invalidate_cache()
            found = self._fs.info(self._path)
            kept = ("size", "ETag", "etag", "mtime", "LastModified", "created", "md5Hash")
            return {name: found[name] for name in kept if name in found}

        (looked,) = self._together([look], time.monotonic() + self._timeout)
        return dict(looked)

    def read(
        self,
        spans: Sequence[Span],
        deadline: float | None = None,
        *,
        once: bool = False,  # noqa: ARG002 - nothing is remembered here
    ) -> list[bytes]:
        """Read the spans side by side.

        Raises
        ------
        DatabaseUnreachable
            The store has not given them by the deadline, however often it was asked.
        """
        until = time.monotonic() + self._timeout if deadline is None else deadline

        def reader(start: int, end: int) -> Callable[[float], bytes]:
            def once(_: float) -> bytes:
                data: bytes = self._fs.cat_file(self._path, start=start, end=end)
                return _complete(data, end - start, self.where)

            return once

        return self._together([reader(start, end) for start, end in spans], until)

    def _together(self, jobs: Sequence[Callable[[float], Any]], until: float) -> list[Any]:
        found: list[Any] = []
        for low in range(0, len(jobs), _TOGETHER):
            part = jobs[low : low + _TOGETHER]
            running: list[Future[Any]] = [
                run_abandonable(partial(self._again_and_again, job, until)) for job in part
            ]
            try:
                found += [one.result(max(0.0, until - time.monotonic())) for one in running]
            except TooLate as exc:
                raise self._silent("no answer") from exc
        return found

    def _again_and_again(self, job: Callable[[float], Any], until: float) -> Any:
        pause = _PAUSE
        while True:
            try:
                return job(until)
            except AmipsError:
                raise
            except FileNotFoundError as exc:
                raise CollectionNotFound(f"There is no cell file {self.where}.") from exc
            except PermissionError as exc:
                raise CollectionError(f"{self.where} may not be read: {exc}") from exc
            except Exception as exc:
                if time.monotonic() + pause >= until:
                    raise self._silent(f"{type(exc).__name__}: {exc}") from exc
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _silent(self, why: str) -> DatabaseUnreachable:
        return DatabaseUnreachable(
            f"{self.where} could not be read in time ({why}); look whether its store is well."
        )

    def changed(self) -> bool:
        """Tell whether another file lies there now."""
        return self._look() != self._which


def pages_of(spans: Sequence[Span]) -> list[Span]:
    """Return the whole pages that spans lie on, those that touch together: each is one read."""
    found: list[Span] = []
    for start, end in sorted(spans):
        low, high = start // _PAGE * _PAGE, -(-end // _PAGE) * _PAGE
        if found and low <= found[-1][1]:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return found


def _complete(data: bytes, length: int, where: str) -> bytes:
    if len(data) != length:
        raise CollectionError(f"{where} ended too early: it was cut short or replaced meanwhile.")
    return data
