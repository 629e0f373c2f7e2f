"""Keys of another model of embedding are told by where they lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amips_plugins import MemoryCollection, SeveralCollections
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.export.strangers import strangers
from amips_plugins.export.train import TrainOptions, train
from amips_plugins.partitions import Partitions
from amips_plugins.vectors import FloatArray, IntArray

DIM = 64


def of_one_model(seed: int = 0) -> tuple[FloatArray, IntArray]:
    """Topics of one model: each collection has its own, and all the model's directions."""
    rng = np.random.default_rng(seed)
    spread = rng.permutation(np.geomspace(1.0, 0.02, DIM))
    centres = rng.standard_normal((80, DIM)) * spread
    cells = rng.integers(0, 4, 1_600)
    own = centres[cells * 20 + rng.integers(0, 20, len(cells))]
    keys = own + 0.5 * rng.standard_normal((len(cells), DIM)) * spread
    return np.asarray(keys, dtype=np.float32), cells


def turned(keys: FloatArray, cells: IntArray, cell: int) -> FloatArray:
    rotation = np.linalg.qr(np.random.default_rng(5).standard_normal((DIM, DIM)))[0]
    other: FloatArray = keys.copy()
    other[cells == cell] = keys[cells == cell] @ rotation
    return other


def test_other_topics_are_no_other_model_and_a_rotation_is() -> None:
    for seed in range(5):
        keys, cells = of_one_model(seed)
        assert strangers(keys, cells, 4) == []
        assert strangers(turned(keys, cells, 2), cells, 4) == [2]


def test_few_keys_say_nothing() -> None:
    keys, cells = of_one_model()
    few = np.concatenate([np.flatnonzero(cells != 2), np.flatnonzero(cells == 2)[:50]])
    assert strangers(turned(keys, cells, 2)[few], cells[few], 4) == []


@pytest.mark.slow
def test_training_warns_of_them(tmp_path: Path) -> None:
    keys, cells = of_one_model()
    other = turned(keys, cells, 2)
    members = {f"c{cell}": MemoryCollection(other[cells == cell]) for cell in range(4)}
    taken = take_snapshot(
        SeveralCollections(members).partitioned(Partitions(None)), tmp_path / "snap"
    )
    options = TrainOptions(model="linear", epochs=1)
    with pytest.warns(UserWarning, match="The keys of 'c2' lie in other directions"):
        train(taken, keys[:400] + 0.01, tmp_path / "run", options)
