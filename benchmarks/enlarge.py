"""More keys than the data has: repeats, with noise on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.data import Dataset

__all__ = ["NOISE", "enlarge"]

NOISE = 0.3
"""Length of the noise on a repeat of a unit key: their cosine is about .958."""

_BLOCK = 16_384


def enlarge(dataset: Dataset, count: int, seed: int = 0) -> Dataset:
    """Return the same queries over another number of keys.

    The first keys are those of the data, in their order; what comes behind them repeats them with
    noise of length ``NOISE`` in a random direction, at unit length again. Exact answers have to be
    looked up anew: the cache is another folder.

    Parameters
    ----------
    dataset
        Where the keys come from.
    count
        Number of keys wanted, fewer or more than there are.
    seed
        Of the noise.
    """
    folder = dataset.cache / f"keys-{count}-noise-{NOISE}-seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "keys.npy"
    if not path.exists():
        have, dim = dataset.keys.shape
        rng = np.random.default_rng(seed)
        temporary = path.with_name("keys.tmp.npy")
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(count, dim))
        for low in range(0, count, _BLOCK):
            rows = np.arange(low, min(low + _BLOCK, count))
            block = np.array(dataset.keys[rows % have])
            noise = rng.standard_normal(block.shape, dtype=np.float32)
            noise *= NOISE / np.linalg.norm(noise, axis=1, keepdims=True)
            repeats = rows >= have
            block[repeats] += noise[repeats]
            out[rows] = block / np.linalg.norm(block, axis=1, keepdims=True)
        out.flush()
        del out
        temporary.replace(path)
    keys = np.load(path, mmap_mode="r", allow_pickle=False)
    return replace(dataset, keys=keys, cache=folder)
