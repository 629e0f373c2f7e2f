from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins.errors import TrainingError
from amips_plugins.export.queries import QuerySplits, augment, guess_queries, split_queries
from tests.support.training_data import gaussian

SHARES = {"train": 0.75, "validate": 0.05, "calibrate": 0.10, "test": 0.10}


def as_sets(splits: QuerySplits) -> dict[str, set[tuple[float, ...]]]:
    return {name: {tuple(row) for row in getattr(splits, name).tolist()} for name in SHARES}


@settings(max_examples=30, deadline=None)
@given(n=st.integers(200, 600), repeats=st.integers(0, 500), seed=st.integers(0, 10_000))
def test_no_query_is_in_two_splits(n: int, repeats: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    distinct = gaussian(n, 3, seed)
    log = np.concatenate([distinct, distinct[rng.integers(n, size=repeats)]])
    rng.shuffle(log)
    splits = split_queries(log, seed)
    sets = as_sets(splits)
    # Disjoint, complete, and every query once.
    assert sum(len(rows) for rows in sets.values()) == n
    assert set.union(*sets.values()) == {tuple(row) for row in distinct.tolist()}
    assert sum(len(getattr(splits, name)) for name in SHARES) == n


def test_shares_are_about_right() -> None:
    splits = split_queries(gaussian(10_000, 3), 0)
    for name, share in SHARES.items():
        deviation = np.sqrt(share * (1 - share) / 10_000)
        assert abs(len(getattr(splits, name)) / 10_000 - share) < 5 * deviation, name


def test_splits_keep_the_type_and_the_source() -> None:
    queries = gaussian(300, 3)
    assert split_queries(queries, 0).source == "log"
    splits = split_queries(queries, 0, "guess")
    assert splits.source == "guess"
    for name in SHARES:
        assert getattr(splits, name).dtype == np.float32
        assert getattr(splits, name).shape[1] == 3


@pytest.mark.parametrize("seed", [0, 1])
def test_a_query_keeps_its_split_when_the_log_grows(seed: int) -> None:
    log = gaussian(800, 4)
    early = as_sets(split_queries(log[:300], seed))
    late = as_sets(split_queries(np.concatenate([log[::-1], log[:50]]), seed))
    for name in SHARES:
        assert early[name] <= late[name]


def test_negative_zero_is_zero_however_the_log_is_ordered() -> None:
    plus = gaussian(400, 3)
    plus[:, 0] = 0.0
    minus = plus.copy()
    minus[:, 0] = -0.0
    expected = as_sets(split_queries(plus, 0))
    assert as_sets(split_queries(minus, 0)) == expected
    assert as_sets(split_queries(np.concatenate([minus, plus]), 0)) == expected


def test_a_query_on_a_border_is_in_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the hash says, its smallest and largest value included."""
    borders = [round(share * 2**64) for share in (0.0, 0.75, 0.80, 0.90)]
    places = [*(border + off for border in borders for off in (-1, 0, 1, 4096)), 2**64 - 1]
    digests = [place % 2**64 for place in places]
    digests += [int(n * 2**64 / 100) for n in range(100)]
    left = iter(digests)

    class Digest:
        def digest(self) -> bytes:
            return next(left).to_bytes(8, "little")

    monkeypatch.setattr("hashlib.blake2b", lambda *_, **__: Digest())
    queries = gaussian(len(digests), 2)
    sets = as_sets(split_queries(queries, 0))
    assert sum(len(rows) for rows in sets.values()) == len(digests)
    assert set.union(*sets.values()) == {tuple(row) for row in queries.tolist()}


def test_the_order_of_the_log_means_nothing() -> None:
    log = gaussian(500, 4)
    one, other = split_queries(log, 3), split_queries(log[::-1], 3)
    for name in SHARES:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_another_seed_is_another_split() -> None:
    log = gaussian(500, 4)
    assert as_sets(split_queries(log, 0))["test"] != as_sets(split_queries(log, 1))["test"]


@pytest.mark.parametrize("distinct", [0, 1, 49])
def test_too_few_queries_are_refused(distinct: int) -> None:
    queries = gaussian(distinct, 3)
    log = np.concatenate([queries] * 30)  # repeats do not help
    with pytest.raises(TrainingError, match=f"{distinct} distinct queries are too few.*collect"):
        split_queries(log, 0)


def test_augment_appends_noisy_copies_of_the_same_length() -> None:
    queries = gaussian(40, 8) * np.linspace(0.1, 10, 40, dtype=np.float32)[:, None]
    many = augment(queries, 3, 0.02, 5)
    assert many.dtype == np.float32
    assert many.shape == (160, 8)
    np.testing.assert_array_equal(many[:40], queries)
    for copy in many[40:].reshape(3, 40, 8):
        lengths = np.linalg.norm(queries, axis=1)
        np.testing.assert_allclose(np.linalg.norm(copy, axis=1), lengths, rtol=1e-5)
        cosines = (copy * queries).sum(axis=1) / lengths**2
        assert cosines.min() > 0.95
        assert cosines.max() < 1.0
    np.testing.assert_array_equal(many, augment(queries, 3, 0.02, 5))
    assert not np.array_equal(many, augment(queries, 3, 0.02, 6))


def test_augment_without_copies_or_with_zeros() -> None:
    queries = gaussian(5, 3)
    assert augment(queries, 0, 0.02, 0) is queries
    queries[0] = 0.0
    many = augment(queries, 2, 0.02, 0)
    assert np.isfinite(many).all()
    assert np.count_nonzero(many[[0, 5, 10]]) == 0


def test_guesses_warn_and_lie_near_the_keys() -> None:
    keys = gaussian(100, 8) * np.linspace(0.01, 100, 100, dtype=np.float32)[:, None]
    with pytest.warns(UserWarning, match="only as good as that guess"):
        guessed = guess_queries(keys, 500, 0, spread=0.1)
    assert guessed.shape == (500, 8)
    assert guessed.dtype == np.float32
    away = np.linalg.norm(guessed[:, None] - keys[None], axis=2) / np.linalg.norm(keys, axis=1)
    assert away.min(axis=1).max() < 0.4
    assert away.min(axis=1).min() > 0.0
    with pytest.warns(UserWarning, match="No query log"):
        np.testing.assert_array_equal(guessed, guess_queries(keys, 500, 0, spread=0.1))
