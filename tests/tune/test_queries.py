from __future__ import annotations

import numpy as np
import pytest

from amips_plugins.errors import InvalidInput
from amips_plugins.tune.queries import FEWEST, split


def test_no_part_shares_a_query_and_repeats_count_once() -> None:
    rows = np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32)
    parts = split(np.concatenate([rows, rows[:100]]), rows)
    together = np.concatenate([parts.calibrate, parts.compare, parts.report])
    assert len(together) == len(np.unique(together, axis=0)) == 200
    assert [len(parts.calibrate), len(parts.compare), len(parts.report)] == [100, 50, 50]
    assert parts.source == "log"
    fewer = parts.at_most(20)
    assert [len(fewer.calibrate), len(fewer.compare), len(fewer.report)] == [20, 10, 50]
    again = split(rows[::-1], rows)
    assert np.array_equal(again.calibrate, parts.calibrate)  # whatever their order


def test_without_a_log_keys_with_noise_take_their_place_and_no_warning_speaks_of_training() -> None:
    keys = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    parts = split(None, keys)
    assert parts.source == "guess"
    assert len(parts.calibrate) >= 500


def test_too_few_are_refused() -> None:
    rows = np.random.default_rng(0).standard_normal((FEWEST - 1, 4)).astype(np.float32)
    with pytest.raises(InvalidInput, match="39 distinct queries are too few"):
        split(rows, rows)
