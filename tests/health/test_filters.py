"""Which filters are of one class, and when a class is routed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins.health.filters import (
    DEARER,
    MISSES,
    NOT_MEASURED,
    FilterClasses,
    FilterTrial,
    narrows,
    shape_of,
)

models = pytest.importorskip("qdrant_client.models")
edge = pytest.importorskip("qdrant_edge")


def tenant(value: Any, low: float | None = None) -> Any:
    must = [models.FieldCondition(key="tenant", match=models.MatchValue(value=value))]
    if low is not None:
        must.append(models.FieldCondition(key="year", range=models.Range(gte=low)))
    return models.Filter(must=must)


def on_edge(value: Any, key: str = "tenant") -> Any:
    return edge.Filter(must=[edge.FieldCondition(key, match=edge.MatchValue(value))])


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ('tenant == "a" and n > 3', "tenant == 'b b' and  n > -4.5e3", 'tenant == "a" or n > 3'),
        ("n in [1, 2, 3]", "n in [7]", "m in [7]"),
        ('n in["a"]', 'n in["b", "c"]', 'm in["a"]'),
        ('year1 == 1 and s like "x \\" 1%"', 'year1 == 22 and s like ""', "year2 == 1"),
        ('meta["lang"] == "en"', 'meta["lang"] == "de"', 'meta["kind"] == "en"'),
        ("list[0] == 1", "list[0] == 2", "list[1] == 1"),
        (tenant("a"), tenant(7), tenant("a", 3.0)),
        (tenant("a", 3.0), tenant("b", 9.5), models.Filter(must_not=tenant("a", 3.0).must)),
        (tenant("a"), models.Filter(must=tenant("b").must, should=[]), models.Filter()),
        (on_edge("a"), on_edge("b b"), on_edge("a", "owner")),
        ({"tenant": "a", "n": 1}, {"n": 5, "tenant": "b"}, {"tenant": "a"}),
        (
            {"must": [{"key": "a", "match": {"any": [1, 2]}}]},
            {"must": [{"key": "a", "match": {"any": [3]}}]},
            {"must": [{"key": "b", "match": {"any": [3]}}]},
        ),
        (["shard_key", tenant("a")], ["shard_key", tenant("b")], tenant("a")),
    ],
)
def test_a_class_is_fields_and_operators(one: Any, same: Any, other: Any) -> None:
    assert shape_of(one) == shape_of(same) != shape_of(other)


@pytest.mark.parametrize(
    "filter_",
    [
        'owner == "secret" and x in ["secret", "b"]',
        tenant("secret"),
        on_edge("secret"),
        {"owner": "secret"},
        edge.Filter(should=[edge.FieldCondition("x", match=edge.MatchAny(["secret", "b"]))]),
    ],
)
def test_a_shape_holds_no_value(filter_: Any) -> None:
    assert "secret" not in shape_of(filter_)


def test_a_shape_is_short() -> None:
    long = [shape_of(" or ".join(f"field{n} == 1" for n in range(start, 90))) for start in (0, 1)]
    assert all(len(shape) <= 200 for shape in long)
    assert long[0] != long[1]


def test_what_lets_everything_pass_is_no_filter() -> None:
    empty: list[Any] = [None, "", {}, models.Filter(), models.Filter(must=[]), edge.Filter(must=[])]
    assert not any(narrows(one) for one in empty)
    full: list[Any] = ["n > 3", tenant("a"), on_edge("a"), {"a": 1}, len]
    assert all(narrows(one) for one in full)


@settings(max_examples=30)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_has_a_shape(anything: Any) -> None:
    assert len(shape_of(anything)) <= 200
    assert shape_of(anything) == shape_of(anything)


class Traffic:
    """Trials of one class, whose recall and time are so on average at every step of widening."""

    def __init__(self, seed: int = 0, native: float | None = None) -> None:
        self.native = native  # recall of the native search, where the plan is that search
        self.classes = FilterClasses()
        self.rng = np.random.default_rng(seed)

    def run(self, n: int, recall: Any, ratio: Any) -> float | None:
        """Pass so many samples; recall and time may be functions of the widening."""
        for _ in range(n):
            widen = self.classes.to_try("a == ?")
            if widen is None:
                continue
            mean = recall(widen) if callable(recall) else recall
            slow = ratio(widen) if callable(ratio) else ratio
            noisy = slow * float(self.rng.uniform(0.7, 1.3))
            found = float(self.rng.binomial(10, mean) / 10)
            own = None if self.native is None else float(self.rng.binomial(10, self.native) / 10)
            trial = FilterTrial(found, 0.95, noisy, widen, native=own)
            self.classes.add("a == ?", trial)
        return self.classes.verdict("a == 1").widen

    @property
    def reason(self) -> str | None:
        return self.classes.verdict("a == 1").reason


def test_a_new_class_is_native_and_a_good_one_is_routed() -> None:
    traffic = Traffic()
    assert traffic.classes.verdict("a == 1") == (None, NOT_MEASURED)
    assert traffic.run(500, 0.98, 0.5) == 1.0
    assert traffic.classes.verdict("b == 1") == (None, NOT_MEASURED)
    (known,) = traffic.classes.summary()
    assert (known.shape, known.widen, known.reason, known.samples) == ("a == ?", 1.0, None, 500)


def test_a_class_that_needs_more_cells_gets_them() -> None:
    traffic = Traffic()
    assert traffic.run(1500, lambda widen: 0.90 if widen < 2 else 0.985, 0.5) == 2.0


@pytest.mark.parametrize(
    ("recall", "ratio", "reason"),
    [(0.87, 0.3, MISSES), (0.98, 1.3, DEARER), (0.98, 0.95, DEARER)],
)
def test_a_class_that_misses_or_costs_more_stays_native(
    recall: float, ratio: float, reason: str
) -> None:
    for seed in range(5):
        traffic = Traffic(seed)
        assert traffic.run(900, recall, ratio) is None
        assert traffic.reason == reason


def test_a_parameter_that_alone_holds_the_target_is_set_though_it_takes_longer() -> None:
    for seed in range(5):
        held = Traffic(seed, native=0.85)
        assert held.run(900, 0.98, 1.4) == 1.0
        assert held.run(2_000, 0.98, 1.4) == 1.0
        more = Traffic(seed, native=0.85)
        assert more.run(2_000, lambda widen: 0.90 if widen < 2 else 0.985, 1.4 * 2) == 2.0


def test_a_parameter_that_is_not_needed_is_not_set_where_it_takes_longer() -> None:
    for seed in range(5):
        fine = Traffic(seed, native=0.985)
        assert fine.run(900, 0.985, 1.4) is None
        assert fine.reason == DEARER
    aged = Traffic(native=0.85)
    assert aged.run(900, 0.98, 1.4) == 1.0
    aged.native = 0.985  # the index was built anew
    assert aged.run(1_500, 0.98, 1.4) is None


def test_what_did_not_do_is_left_alone_for_longer_and_longer() -> None:
    traffic = Traffic()
    traffic.run(500, 0.98, 1.5)
    (first,) = traffic.classes.summary()
    assert first.samples < 100
    traffic.run(1_000, 0.98, 1.5)
    (second,) = traffic.classes.summary()
    assert first.samples < second.samples < 2.5 * first.samples
    assert traffic.run(3_000, 0.98, 0.5) == 1.0  # an index has gone, say


@pytest.mark.parametrize(("recall", "ratio"), [(0.8, 0.5), (0.98, 1.5)])
def test_a_routed_class_goes_back_when_it_misses_or_costs_more(recall: float, ratio: float) -> None:
    traffic = Traffic()
    assert traffic.run(600, 0.99, 0.4) == 1.0
    assert traffic.run(100, recall, ratio) is None


def test_below_its_target_a_class_is_hardly_ever_routed() -> None:
    routed = [Traffic(seed).run(500, 0.94, 0.3) is not None for seed in range(10)]
    assert sum(routed) <= 1


def test_a_class_that_is_known_begins_routed_and_goes_back() -> None:
    classes = FilterClasses(["a == 3"])
    assert classes.verdict("a == 4") == (1.0, None)
    for _ in range(50):
        classes.add("a == ?", FilterTrial(0.5, 0.95, 0.5))
    assert classes.verdict("a == 4") == (None, MISSES)


def test_a_trial_of_another_step_says_nothing() -> None:
    classes = FilterClasses()
    for _ in range(500):
        assert not classes.add("a == ?", FilterTrial(1.0, 0.9, 0.1, widen=2.0))
    assert classes.verdict("a == 1").widen is None


def test_a_keynet_is_held_to_the_native_search() -> None:
    classes = FilterClasses(widens=False)
    for _ in range(500):
        classes.add("a == ?", FilterTrial(0.9, 0.85, 0.5, relative=True))
    assert classes.verdict("a == 1").widen == 1.0


def test_the_number_of_classes_is_bounded() -> None:
    classes = FilterClasses(most=3)
    for name in "abcda":
        classes.add(name, FilterTrial(1.0, 0.9, 0.5))
    assert [known.shape for known in classes.summary()] == ["c", "d", "a"]
