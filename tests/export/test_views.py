from __future__ import annotations

import numpy as np
import pytest

from amips_plugins.export import views
from amips_plugins.export.views import Hits, first_equals
from tests.support.training_data import gaussian


@pytest.mark.parametrize("pairs", [1, 7, 1_000])
def test_mean_queries_equal_brute_force(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_PAIRS", pairs)
    queries = gaussian(30, 4)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    hits = np.random.default_rng(0).integers(12, size=(30, 3))
    turned = Hits.of(hits)
    np.testing.assert_array_equal(turned.rows, np.unique(hits))
    for row, mean in zip(turned.rows, turned.means(queries), strict=True):
        wanted = sum(queries[q] for q in range(30) for hit in hits[q] if hit == row)
        np.testing.assert_allclose(mean, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_first_equals_finds_every_repeat_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(-1, 2, (3_000, 5)).astype(np.float32)
    keys[keys == 0.0] *= rng.choice([-1.0, 1.0], (keys == 0.0).sum())
    _, firsts, group = np.unique(keys + 0.0, axis=0, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(first_equals(keys), firsts[group.ravel()])
    distinct = gaussian(100, 4)
    np.testing.assert_array_equal(first_equals(distinct), np.arange(100))
