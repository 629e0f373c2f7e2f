from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amips_plugins.export.keys import LiftedKeys, MappedKeys, Shard, blocks, shards
from amips_plugins.vectors import Metric, lift_keys
from tests.support.training_data import gaussian


@given(st.integers(0, 10**9))
def test_shards_are_all_rows_once_and_never_many(count: int) -> None:
    parts = shards(count)
    ends = [0, *(part.end for part in parts)]
    assert [part.first for part in parts] == ends[:-1]
    assert ends[-1] == count
    assert all(len(part) > 0 for part in parts)
    assert len(parts) <= 1_024


def test_blocks_of_a_shard_are_its_rows() -> None:
    keys = gaussian(50, 3)
    found = list(blocks(keys, Shard(7, 31), 10))
    assert [(rows.first, rows.end) for rows, _ in found] == [(7, 17), (17, 27), (27, 31)]
    np.testing.assert_array_equal(np.concatenate([block for _, block in found]), keys[7:31])


@pytest.mark.parametrize("metric", list(Metric))
def test_keys_in_a_file_read_as_the_array_does_in_another_process_too(
    metric: Metric, tmp_path: Path
) -> None:
    keys, rows = gaussian(50, 3), np.array([4, 4, 40, 7])
    keys.astype("<f4").tofile(tmp_path / "keys")
    centre = keys.mean(axis=0) if metric is Metric.L2 else None
    lifted = LiftedKeys(MappedKeys(tmp_path / "keys", 50, 3), metric, centre)
    wanted = lift_keys(keys, metric, centre)
    assert lifted.shape == wanted.shape
    assert len(lifted) == 50
    assert len(pickle.dumps(lifted)) < 1_000
    for read in (lifted, pickle.loads(pickle.dumps(lifted))):  # noqa: S301 - our own, just made
        np.testing.assert_allclose(read[10:20], wanted[10:20], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(read[rows], wanted[rows], rtol=1e-6, atol=1e-6)
