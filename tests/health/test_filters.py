"""Which filters are of one class, and when a class is routed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amips_plugins.health.filters import FilterClasses, FilterTrial, shape_of

models = pytest.importorskip("qdrant_client.models")


def tenant(value: Any, low: float | None = None) -> Any:
    must = [models.FieldCondition(key="tenant", match=models.MatchValue(value=value))]
    if low is not None:
        must.append(models.FieldCondition(key="year", range=models.Range(gte=low)))
    return models.Filter(must=must)


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ('tenant == "a" and n > 3', "tenant == 'b b' and  n > -4.5e3", 'tenant == "a" or n > 3'),
        ("n in [1, 2, 3]", "n in [7]", "m in [7]"),
        ('year1 == 1 and s like "x \\" 1%"', 'year1 == 22 and s like ""', "year2 == 1"),
        (tenant("a"), tenant(7), tenant("a", 3.0)),
        (tenant("a", 3.0), tenant("b", 9.5), models.Filter(must_not=tenant("a", 3.0).must)),
        ({"tenant": "a", "n": 1}, {"n": 5, "tenant": "b"}, {"tenant": "a"}),
        (
            {"must": [{"key": "a", "match": {"any": [1, 2]}}]},
            {"must": [{"key": "a", "match": {"any": [3]}}]},
            {"must": [{"key": "b", "match": {"any": [3]}}]},
        ),
    ],
)
def test_a_class_is_fields_and_operators(one: Any, same: Any, other: Any) -> None:
    assert shape_of(one) == shape_of(same) != shape_of(other)


def test_a_shape_holds_no_value_and_is_short() -> None:
    assert "secret" not in shape_of('owner == "secret" and x in ["secret", "b"]')
    assert "secret" not in shape_of(tenant("secret"))
    assert "secret" not in shape_of({"owner": "secret"})
    long = [shape_of(" or ".join(f"field{n} == 1" for n in range(start, 90))) for start in (0, 1)]
    assert all(len(shape) <= 200 for shape in long)
    assert long[0] != long[1]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_has_a_shape(anything: Any) -> None:
    assert len(shape_of(anything)) <= 200
    assert shape_of(anything) == shape_of(anything)


def run(classes: FilterClasses, recall: float, ratio: float, n: int, seed: int = 0) -> bool:
    rng = np.random.default_rng(seed)
    for found in rng.binomial(10, recall, n) / 10:
        classes.add("a", FilterTrial(float(found), 0.95, ratio * float(rng.uniform(0.8, 1.2))))
    return classes.routed("a")


def test_a_new_class_is_native_and_a_good_one_is_routed() -> None:
    classes = FilterClasses()
    assert not classes.routed("a")
    assert run(classes, 0.98, 0.5, 600)
    assert not classes.routed("b")
    assert list(classes.summary()) == [("a", True, 600)]


@pytest.mark.parametrize(("recall", "ratio"), [(0.87, 0.3), (0.98, 1.3), (0.9, 1.3)])
def test_a_class_that_misses_or_costs_more_stays_native(recall: float, ratio: float) -> None:
    assert not run(FilterClasses(), recall, ratio, 3_000)


@pytest.mark.parametrize(("recall", "ratio"), [(0.8, 0.5), (0.98, 1.8)])
def test_a_routed_class_goes_back_when_it_misses_or_costs_more(recall: float, ratio: float) -> None:
    classes = FilterClasses()
    assert run(classes, 0.99, 0.4, 600)
    assert not run(classes, recall, ratio, 300, seed=1)


def test_the_number_of_classes_is_bounded() -> None:
    classes = FilterClasses(most=3)
    for name in "abcda":
        classes.add(name, FilterTrial(1.0, 0.9, 0.5))
    assert [name for name, _, _ in classes.summary()] == ["c", "d", "a"]
