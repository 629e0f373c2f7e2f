"""What has been measured so far, in a folder, so that the same command goes on from there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from amips_plugins.errors import BundleCorrupt, InvalidInput
from amips_plugins.files import held, read_file, replace_file
from amips_plugins.models.calibration import Calibration
from amips_plugins.tune.rows import Row

__all__ = ["Finished", "Trials", "alone"]

_KEY, _LIMIT, _LOCK = "asked.json", 64 << 20, ".lock"


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Have the folder for oneself, or raise ``InvalidInput``: two runs would drop their copies."""
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(work / _LOCK, wait=False))
        except BlockingIOError as exc:
            raise InvalidInput(
                f"Another amips tune is at work in the folder {str(work)!r}; wait until it has "
                f"ended, or give this one a folder of its own (--out)."
            ) from exc
        yield


@dataclass(frozen=True)
class Finished:
    """One way that has been measured, and what was calibrated; None where nothing could be."""

    row: Row
    calibration: Calibration | None = None


class Trials:
    """The finished trials of one question: another question begins anew.

    ``asked`` is all that the answers depend on.
    """

    def __init__(self, work: Path, asked: bytes) -> None:
        self._folder = work / "trials"
        key = hashlib.sha256(asked).hexdigest().encode()
        try:
            same = read_file(work / _KEY, _LIMIT) == key
        except OSError:
            same = False
        if not same:
            for path in self._folder.glob("*.*"):
                path.unlink()
            replace_file(work / _KEY, key)

    def get(self, name: str) -> Finished | None:
        """Return a trial that is finished; None for any other, and where its files are damaged."""
        row, calibration = self._paths(name)
        try:
            found = msgspec.json.decode(read_file(row, _LIMIT), type=Row)
            if found.effort is None and not calibration.exists():
                return Finished(found)
            return Finished(found, Calibration.from_bytes(read_file(calibration, _LIMIT)))
        except (OSError, msgspec.MsgspecError, BundleCorrupt):
            return None

    def put(self, finished: Finished) -> Finished:
        """Keep a trial, and return it; its row comes last."""
        row, calibration = self._paths(finished.row.search)
        if finished.calibration is not None:
            replace_file(calibration, finished.calibration.to_bytes())
        replace_file(row, msgspec.json.encode(finished.row))
        return finished

    def _paths(self, name: str) -> tuple[Path, Path]:
        plain = re.sub(r"[^0-9A-Za-z]+", "-", name)
        return self._folder / f"{plain}.json", self._folder / f"{plain}.npz"
