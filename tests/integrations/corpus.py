"""Real text and its embeddings, the same on every run: no model, no network."""

from __future__ import annotations

import functools
import re
import sysconfig
import zlib
from pathlib import Path

import numpy as np

from amips_plugins.demo.corpus import Pair, pairs
from amips_plugins.vectors import FloatArray

DIM = 64
COUNT = 400
TARGET = 0.9  # recall@10 of the bundles


def embed(text: str) -> list[float]:
    """Hash the words of a text, and the three letters that begin at each letter of one."""
    vector = np.zeros(DIM, dtype=np.float32)
    for word in re.findall(r"[a-z]+", text.lower()):
        whole = f"<{word}>"
        for piece in [whole] * 2 + [whole[at : at + 3] for at in range(len(whole) - 2)]:
            hashed = zlib.crc32(piece.encode())
            vector[hashed % DIM] += 1.0 if hashed & 0x10000 else -1.0
    if not vector.any():
        vector[0] = 1.0
    listed: list[float] = (vector / np.linalg.norm(vector)).tolist()
    return listed


@functools.cache
def _pairs() -> list[Pair]:
    return pairs(COUNT + 500, 0, [Path(sysconfig.get_path("stdlib"))])


def documents() -> list[tuple[str, dict[str, object]]]:
    """Return texts, and what is known about each."""
    return [
        (pair.key, {"title": pair.title, "group": row % 3, "row": row})
        for row, pair in enumerate(_pairs()[:COUNT])
    ]


def questions() -> list[str]:
    """Return questions of other texts, and of these: the bundles are calibrated on the first."""
    kept = _pairs()
    return [pair.query for pair in [*kept[COUNT:], *kept[:COUNT]]]


def calibration() -> FloatArray:
    """Return the embedded questions that the bundles are calibrated on."""
    return np.array([embed(text) for text in questions()[::2]], dtype=np.float32)


def unseen() -> list[str]:
    """Return questions that no bundle has seen."""
    return questions()[1::2][:150]
