"""Sketches tell apart what matters, and survive what a database does to a vector."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins.sketch import same_vectors, sketch
from amips_plugins.vectors import FloatArray, Metric, normalise

Draw = Callable[[np.random.Generator, int], FloatArray]


@given(
    keys=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=50),
        elements=st.just(0.0)
        | st.floats(2**-10, 1e3, width=32)
        | st.floats(-1e3, -(2**-10), width=32),
    ),
    scale=st.floats(2**-10, 2**10, width=32),
)
@settings(deadline=None)
def test_what_a_database_does_to_a_vector(keys: FloatArray, scale: float) -> None:
    for metric in Metric:
        expected = sketch(keys, metric)
        rounded = keys.astype(np.float16).astype(np.float32)
        assert same_vectors(sketch(rounded, metric), expected).all()
    cosine = sketch(keys, Metric.COSINE)
    assert same_vectors(sketch(normalise(keys), Metric.COSINE), cosine).all()
    assert same_vectors(sketch(keys * np.float32(scale), Metric.COSINE), cosine).all()


def _histograms(rng: np.random.Generator, dim: int) -> FloatArray:
    return rng.dirichlet(np.full(dim, 0.3), 2000).astype(np.float32)


def _pooled(rng: np.random.Generator, dim: int) -> FloatArray:
    return np.maximum(rng.standard_normal((2000, dim)) + 1.0, 0.01).astype(np.float32)


def _common(rng: np.random.Generator, dim: int) -> FloatArray:
    """Embeddings with a common component: their mean cosine is .91."""
    drawn = normalise(rng.standard_normal((2000, dim)).astype(np.float32))
    shared = normalise(rng.standard_normal((1, dim)).astype(np.float32))
    return normalise(drawn * np.float32(np.sqrt(0.09)) + shared * np.float32(np.sqrt(0.91)))


@pytest.mark.parametrize("draw", [_histograms, _pooled, _common])
@pytest.mark.parametrize("dim", [16, 64, 384])
@pytest.mark.parametrize("metric", list(Metric))
def test_vectors_of_constant_signs_and_a_common_component_are_told_apart(
    draw: Draw, dim: int, metric: Metric
) -> None:
    keys = draw(np.random.default_rng(dim), dim)
    other = np.roll(keys, 1, axis=0)
    taken = same_vectors(sketch(keys, metric), sketch(other, metric))
    assert taken.mean() < 0.005


def test_the_length_counts_but_under_cosine() -> None:
    keys = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float32)
    for metric in (Metric.IP, Metric.L2):
        assert not same_vectors(sketch(keys, metric), sketch(2 * keys, metric)).any()
    assert same_vectors(sketch(keys, Metric.COSINE), sketch(2 * keys, Metric.COSINE)).all()
    assert not same_vectors(sketch(keys, Metric.COSINE), sketch(-keys, Metric.COSINE)).any()


def test_no_vectors_and_more_than_a_block() -> None:
    assert sketch(np.zeros((0, 3), dtype=np.float32), Metric.IP).shape == (0,)
    keys = np.random.default_rng(0).standard_normal((16_400, 4)).astype(np.float32)
    whole = sketch(keys, Metric.IP)
    assert same_vectors(whole[[0, -1]], sketch(keys[[0, -1]], Metric.IP)).all()
