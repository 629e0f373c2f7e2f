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
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from amips_plugins.bundle.manifest import MANIFEST
from amips_plugins.errors import InvalidInput
from amips_plugins.export.dataset import LookUp
from amips_plugins.export.executors import Executor
from amips_plugins.export.keys import Keys, shards
from amips_plugins.export.targets import Best, best_keys
from amips_plugins.files import replace_file
from amips_plugins.progress import Progress
from amips_plugins.vectors import FloatArray

__all__ = ["RunFolder"]

_ASKED = "options.json"
_BETWEEN = 20.0  # seconds from one time that exact answers are kept to the next


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

    def look_up(
        self, lifted: Keys, device: torch.device, progress: Progress, executor: Executor
    ) -> LookUp:
        """Return what finds exact answers once in the life of a run, going on where it stopped.

        A damaged file is no answer.
        """

        def find(queries: dict[str, FloatArray], depths: dict[str, int]) -> dict[str, Best]:
            path, kept_at = self.work / "targets.npz", time.monotonic()
            last, begun = len(shards(len(lifted))), _read_targets(path, list(queries))

            def keep(done: int, best: list[Best]) -> None:
                nonlocal kept_at
                if done == last or time.monotonic() - kept_at >= _BETWEEN:
                    _write_targets(path, done, dict(zip(queries, best, strict=True)))
                    kept_at = time.monotonic()

            best = begun[1] if begun is not None and begun[0] == last else None
            if best is None:
                wanted = list(queries.values()), lifted, [depths[name] for name in queries]
                title = "exact answers"
                best = best_keys(*wanted, device, progress, title, executor, begun, keep)
            return dict(zip(queries, best, strict=True))

        return find


def _read_targets(path: Path, names: list[str]) -> tuple[int, list[Best]] | None:
    """Return how many shards were looked through and what was found, if anything."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            best = [Best(kept[f"{name}-rows"], kept[f"{name}-scores"]) for name in names]
            return int(kept["done"]), best
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def _write_targets(path: Path, done: int, best: dict[str, Best]) -> None:
    arrays: dict[str, Any] = {"done": done}
    for name, found in best.items():
        arrays |= {f"{name}-rows": found.rows, f"{name}-scores": found.scores}
    temporary = path.with_name("tmp-targets.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)
