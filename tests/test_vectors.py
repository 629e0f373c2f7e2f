from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins.errors import InvalidInput
from amips_plugins.vectors import (
    FloatArray,
    Metric,
    as_queries,
    lift_keys,
    lift_queries,
    lifted_dim,
    native_scores,
    normalise,
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[FloatArray, FloatArray]:
    """One query and some keys; whole numbers, so that IP and L2 are exact in float32."""
    dim = draw(st.integers(1, 6))
    whole = st.integers(-30, 30)
    query = draw(hnp.arrays(np.int64, (1, dim), elements=whole))
    keys = draw(hnp.arrays(np.int64, (draw(st.integers(1, 12)), dim), elements=whole))
    return query.astype(np.float32), keys.astype(np.float32)


@pytest.mark.parametrize("metric", Metric)
@given(problems())
@settings(deadline=None)
def test_the_best_lifted_key_is_the_best_key(
    metric: Metric, problem: tuple[FloatArray, FloatArray]
) -> None:
    query, keys = problem
    lifted = lift_keys(keys, metric) @ lift_queries(query, metric)[0]
    scores = native_scores(query[0], keys, metric)
    best = scores.max() if metric.larger_is_better else scores.min()
    assert lift_keys(keys, metric).shape == (len(keys), lifted_dim(keys.shape[1], metric))
    np.testing.assert_allclose(scores[lifted.argmax()], best, atol=1e-5)


@given(problems())
@settings(deadline=None)
def test_lifted_l2_is_half_the_distance_up_to_the_query(
    problem: tuple[FloatArray, FloatArray],
) -> None:
    query, keys = problem
    lifted = lift_keys(keys, Metric.L2) @ lift_queries(query, Metric.L2)[0]
    expected = 0.5 * (float(query[0] @ query[0]) - native_scores(query[0], keys, Metric.L2))
    np.testing.assert_allclose(lifted, expected, atol=1e-3)


@given(problems())
@settings(deadline=None)
def test_normalised_rows_have_unit_length_and_zeros_stay(
    problem: tuple[FloatArray, FloatArray],
) -> None:
    _, keys = problem
    lengths = np.linalg.norm(normalise(keys), axis=1)
    np.testing.assert_allclose(lengths, keys.any(axis=1).astype(float), atol=1e-6)


def test_metrics_are_their_names() -> None:
    assert [str(metric) for metric in Metric] == ["ip", "cosine", "l2"]
    assert [metric.larger_is_better for metric in Metric] == [True, True, False]


@pytest.mark.parametrize(
    "queries",
    [
        [1.0, 2.0],
        [1.0, 2],
        [np.float64(1.0), 2.0],
        (1, 2),
        np.array([1, 2], dtype=np.float16),
        np.array([1, 2], dtype=np.float64),
        np.array([1, 2], dtype=">f4"),
        np.array([1, 9, 2, 9], dtype=np.float32)[::2],
    ],
)
def test_one_vector_in_any_form(queries: Any) -> None:
    rows, single = as_queries(queries, 2)
    assert single
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(rows, [[1, 2]])


def test_a_tensor_that_wants_a_gradient_is_refused_in_words() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidInput, match="pass a numpy array"):
        as_queries(torch.tensor([1.0, 2.0], requires_grad=True), 2)


@pytest.mark.parametrize(
    "queries", [[[1, 2], [3, 4]], np.array([[1, 3], [2, 4]], dtype=np.float64, order="F").T]
)
def test_many_vectors_in_any_form(queries: Any) -> None:
    rows, single = as_queries(queries, 2)
    assert not single
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(rows, np.asarray(queries))


def test_float32_is_not_copied() -> None:
    queries = np.ones((3, 2), dtype=np.float32)
    assert np.shares_memory(as_queries(queries, 2)[0], queries)


@pytest.mark.parametrize(
    ("queries", "says"),
    [
        ([1.0, 2.0, 3.0], r"shape \(3,\).*dimension 2"),
        (np.zeros((4, 3)), r"shape \(4, 3\).*dimension 2"),
        (np.zeros((1, 1, 2)), r"shape \(1, 1, 2\)"),
        (1.0, r"shape \(\)"),
        (None, r"shape \(\)"),
        ([], r"shape \(0,\)"),
        ([[]], r"shape \(1, 0\)"),
        (np.zeros((0, 2)), "empty"),
        ([1.0, float("nan")], "Query 0 holds a NaN"),
        ([[0.0, 0.0], [1.0, float("inf")]], "Query 1 holds a NaN or infinite"),
        ([float("inf"), float("-inf")], "Query 0"),
        ([1e300, 0.0], "Query 0"),
        ([None, 1.0], "Query 0"),
        ("ab", "must be numbers.*str"),
        (["1", "2"], "must be numbers.*list"),
        (b"ab", "must be numbers.*bytes"),
        ([[1.0, 2.0], [3.0]], "must be numbers.*list"),
        ({1.0, 2.0}, "must be numbers.*set"),
        ([1 + 2j, 0], "must be numbers"),
        ([1.0, 2j], "must be numbers"),
        ([1.0, "2"], "must be numbers"),
        (np.array(["2020-01-01", "2020-01-02"], dtype="M8[D]"), "must be numbers"),
        ([object(), 1.0], "must be numbers"),
    ],
)
def test_bad_queries_get_one_sentence(queries: Any, says: str) -> None:
    with pytest.raises(InvalidInput, match=says) as caught:
        as_queries(queries, 2)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [3.4e38, -3.4e38])
def test_large_finite_values_are_accepted(value: float) -> None:
    rows, _ = as_queries(np.full((3, 4), value, dtype=np.float32), 4)
    assert np.isfinite(rows).all()


def test_large_values_of_both_signs_are_accepted() -> None:
    as_queries(np.array([[3e38, 3e38, -3e38, -3e38]] * 8, dtype=np.float32), 4)


def test_only_the_bad_query_is_named() -> None:
    queries = np.zeros((100, 8), dtype=np.float32)
    queries[73, 5] = np.nan
    with pytest.raises(InvalidInput, match="Query 73 "):
        as_queries(queries, 8)
