"""The folder of a training: whose it is, and what of the work is kept for an interrupted run.

::

    run/
        options.json   what was asked for; another question needs another folder
        work/          targets, cells and checkpoints, so that an interrupted run resumes
        curves.json    what was measured on the way, for amips report; never published
        bundle/        the result; it appears whole, when everything else is done
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from amips_plugins.bundle.manifest import MANIFEST
from amips_plugins.errors import InvalidInput
from amips_plugins.files import replace_file
from amips_plugins.progress import Progress
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_keys, lifted_dim

__all__ = ["RunFolder"]

_ASKED = "options.json"
_BLOCK = 16_384


class RunFolder:
    """A run's folder, and the one question that it answers."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path = path
        self.work = path / "work"
        self._asked = asked

    @property
    def finished(self) -> bool:
        """Whether the bundle is there."""
        return (self.path / "bundle" / MANIFEST).exists()

    def check(self) -> None:
        """Refuse a folder that holds anything but this question."""
        folder, path = self.path, self.path / _ASKED
        if path.exists():
            try:
                found = msgspec.json.decode(path.read_bytes())
            except msgspec.MsgspecError as exc:
                raise InvalidInput(
                    f"{path} is damaged ({exc}), so that nobody knows what {folder} answers; "
                    f"delete the folder, or name another."
                ) from exc
            if found != self._asked:
                raise InvalidInput(
                    f"{folder} holds a training with other data or options; name another folder."
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InvalidInput(f"{folder} is not empty and holds no training; name another folder.")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder against other trainings, and write down what it answers."""
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise InvalidInput(
                    f"Another training is at work in {self.path}; wait for it, or name another "
                    f"folder."
                ) from exc
            self.check()
            question = msgspec.json.format(msgspec.json.encode(self._asked), indent=2)
            replace_file(self.path / _ASKED, question)
            self.work.mkdir(exist_ok=True)
            yield
        finally:
            os.close(handle)

    def once(self, name: str, compute: Callable[[], IntArray]) -> IntArray:
        """Compute exact answers once in the life of a run; a damaged file is no answer."""
        path = self.work / f"hits-{name}.npy"
        try:
            array: IntArray = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            array = compute()
            temporary = path.with_name(f"tmp-{path.name}")
            np.save(temporary, array, allow_pickle=False)
            temporary.replace(path)
        return array

    def lifted_keys(
        self, keys: FloatArray, metric: Metric, centre: FloatArray | None, progress: Progress
    ) -> FloatArray:
        """Write the lifted keys to a file that can be memory-mapped, unless they are the keys."""
        if metric is Metric.IP:
            return keys
        path = self.work / "keys.npy"
        shape = (len(keys), lifted_dim(keys.shape[1], metric))
        try:
            return _mapped(path, shape)
        except (OSError, ValueError, EOFError):
            temporary = path.with_name("keys.tmp.npy")
        about = {"descr": "<f4", "fortran_order": False, "shape": shape}
        with (
            temporary.open("wb") as file,  # writing through a map would die where the disk is full
            progress("prepare keys", len(keys), 0, "keys") as step,
        ):
            np.lib.format.write_array_header_1_0(file, about)
            for low in range(0, len(keys), _BLOCK):
                block = lift_keys(np.asarray(keys[low : low + _BLOCK]), metric, centre)
                file.write(np.ascontiguousarray(block, dtype="<f4").data)
                step.advance(len(block))
        temporary.replace(path)
        return _mapped(path, shape)


def _mapped(path: Path, shape: tuple[int, int]) -> FloatArray:
    mapped: FloatArray = np.load(path, mmap_mode="r", allow_pickle=False)
    if mapped.shape != shape:
        raise ValueError("of other keys")
    return mapped
