from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from amips_plugins.tune.measuring import Trial
from amips_plugins.tune.rows import FOUND, NATIVE_ROW, Row, choose, compared, dropped


def row(search: str, cost: float, recall: float = 0.96, **more: Any) -> Row:
    known: dict[str, Any] = {
        "search": search,
        "parameter": "hnsw_ef",
        "effort": 64,
        "best_promise": 0.97,
        "recall": recall,
        "recall_low": recall - 0.01,
        "recall_high": recall + 0.01,
        "cost": cost,
        "cost_high": cost,
        "ratio": cost,
        "ratio_low": cost,
        "ratio_high": cost,
        "applies": True,
    }
    return Row(**known | more)


IS = row(FOUND, 1.0, 0.97, effort=None, best_promise=None)


@pytest.mark.parametrize(
    ("rows", "answer", "search"),
    [
        ([IS, row(NATIVE_ROW, 0.8)], "tune", NATIVE_ROW),
        ([IS, row(NATIVE_ROW, 0.99)], "leave", FOUND),
        ([row(FOUND, 1.0, 0.9), row(NATIVE_ROW, 1.6)], "tune", NATIVE_ROW),
        ([IS, row(NATIVE_ROW, 0.8), row("int8", 0.4)], "rebuild", "int8"),
        ([IS, row(NATIVE_ROW, 0.8), row("int8", 0.75)], "tune", NATIVE_ROW),
        ([IS, row(NATIVE_ROW, 0.8), row("int8", 0.725)], "rebuild", "int8"),
        ([IS, row(NATIVE_ROW, 0.8), row("int8", 0.6, cost_high=0.9)], "tune", NATIVE_ROW),
        ([IS, row(NATIVE_ROW, 0.8), row("int8", 0.4, 0.9)], "tune", NATIVE_ROW),
        ([IS, row(NATIVE_ROW, 0.8), row("int8", 0.4, effort=None)], "tune", NATIVE_ROW),
        ([IS, row(NATIVE_ROW, 0.8), row("IVF", 0.4, applies=False)], "tune", NATIVE_ROW),
        ([IS, row(NATIVE_ROW, 0.8), dropped("int8", "no")], "tune", NATIVE_ROW),
        ([IS, row(NATIVE_ROW, 0.8, effort=None), row("int8", 0.9)], "rebuild", "int8"),
        ([IS, row(NATIVE_ROW, 0.8, effort=None)], "unclear", None),
        ([IS, dropped(NATIVE_ROW, "FLAT"), row("HNSW", 0.3)], "rebuild", "HNSW"),
        ([IS, dropped(NATIVE_ROW, "FLAT"), row("HNSW", 0.95)], "leave", FOUND),
        ([IS, dropped(NATIVE_ROW, "FLAT"), row("HNSW", 0.3, applies=False)], "leave", FOUND),
        ([IS, dropped(NATIVE_ROW, "FLAT"), dropped("HNSW", "no")], "leave", FOUND),
        # What the server counts is the same on every run, where times are in doubt.
        (
            [
                row(FOUND, 1.0, 0.97, effort=None, bytes_scored=4.0),
                row(NATIVE_ROW, 0.99, bytes_scored=3.0),
            ],
            "tune",
            NATIVE_ROW,
        ),
        # But what is surely dearer is not set where all is well.
        (
            [
                row(FOUND, 1.0, 0.97, effort=None, bytes_scored=4.0),
                row(NATIVE_ROW, 1.3, bytes_scored=3.0),
            ],
            "leave",
            FOUND,
        ),
        (
            [
                IS,
                row(NATIVE_ROW, 0.8, bytes_scored=4.0),
                row("int8", 0.6, cost_high=0.9, bytes_scored=1.0),
            ],
            "rebuild",
            "int8",
        ),
        (
            [IS, row(NATIVE_ROW, 9.0, effort=None), row("IVF", 0.4, applies=False)],
            "leave",
            FOUND,
        ),
    ],
)
def test_the_cheapest_that_holds_and_the_simplest_of_those_about_as_cheap(
    rows: list[Row], answer: str, search: str | None
) -> None:
    choice = choose(rows, 0.95, 10)
    assert (choice.answer, choice.search) == (answer, search)


def test_it_says_what_cannot_be_promised_what_misses_and_what_is_not_built_here() -> None:
    text = choose([IS, row(NATIVE_ROW, 0.8, effort=None, best_promise=0.9349)], 0.95, 10).text
    assert "the best target is 0.934" in text
    missing = choose([row(FOUND, 1.0, 0.9), row(NATIVE_ROW, 1.6)], 0.95, 10).text
    assert "finds 0.900 and misses the target" in missing
    other = choose([IS, row(NATIVE_ROW, 0.8), row("IVF", 0.4, applies=False)], 0.95, 10).text
    assert "IVF would cost 0.40" in other
    assert "move the alias" in other
    rows = [IS, row(NATIVE_ROW, 0.8), row("IVF", 0.4, applies=False)]
    declined = choose(rows, 0.95, 10, agreed=False).text
    assert "was not agreed to" in declined
    assert "move the alias" not in declined


def test_costs_are_ratios_taken_side_by_side_times_the_cost_of_the_base() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(1.0, 2.0, 300)
    first = compared(row(FOUND, 0), Trial(np.ones(300), base), Trial(np.ones(300), base), None)
    assert first.ratio == 1.0
    assert first.cost == pytest.approx(1e3 * base.mean())
    # While the machine is three times as slow, for both.
    noise = rng.uniform(0.9, 1.1, 300)
    ours, theirs = Trial(np.ones(300), 1.5 * base * noise), Trial(np.ones(300), 3 * base)
    second = compared(row("int8", 0), ours, theirs, first)
    assert second.ratio == pytest.approx(0.5, rel=0.02)
    assert first.cost is not None
    assert second.cost == pytest.approx(0.5 * first.cost, rel=0.02)
    assert second.ratio_low is not None
    assert second.ratio_high is not None
    assert second.ratio is not None
    assert second.ratio_low < second.ratio < second.ratio_high


def test_what_the_machine_did_besides_is_not_counted() -> None:
    steady = np.full(200, 1.0)
    spiked = np.where(np.arange(200) % 20 == 0, 100.0, 1.0)
    first = compared(row(FOUND, 0), Trial(np.ones(200), steady), Trial(np.ones(200), steady), None)
    second = compared(row("x", 0), Trial(np.ones(200), spiked), Trial(np.ones(200), steady), first)
    assert second.ratio is not None
    assert second.ratio < 1.2
    coarse = Trial(np.ones(4), np.array([0.0, 0.0, 0.0, 0.01]))  # a clock that seldom ticks
    assert coarse.calm.mean() == pytest.approx(0.0025)


def test_a_clock_that_stands_still_says_nothing_for_any_way() -> None:
    still = Trial(np.ones(400), np.zeros(400))
    first = compared(row(FOUND, 0, 0.97, effort=None), still, still, None)
    rows = [first, *(compared(row(name, 0), still, still, first) for name in (NATIVE_ROW, "int8"))]
    assert [(one.cost, one.ratio, one.ratio_low, one.ratio_high) for one in rows] == [
        (0, 1, 1, 1)
    ] * 3
    assert choose(rows, 0.95, 10).answer == "leave"


def test_what_a_server_has_counted_scales_with_what_it_counts_of_the_collection() -> None:
    ones, ms = np.ones(100), np.full(100, 1e-3)
    first = compared(row(FOUND, 0), Trial(ones, ms, 8.0), Trial(ones, ms, 8.0), None)
    assert first.bytes_scored == 8.0
    sampled = compared(row("int8", 0), Trial(ones, ms, 1.0), Trial(ones, ms, 4.0), first)
    assert sampled.bytes_scored == 2.0
    assert compared(row("x", 0), Trial(ones, ms), Trial(ones, ms), first).bytes_scored is None


def test_a_rebuild_says_what_it_takes_in_memory() -> None:
    now = row(FOUND, 1.0, 0.97, effort=None, memory_bytes=172_000_000)
    rows = [now, row(NATIVE_ROW, 0.8), row("int8", 0.4, memory_bytes=210_400_000)]
    assert "about 210 MB, where it is now 172." in choose(rows, 0.95, 10).text
    assert "In memory" not in choose(rows[:2], 0.95, 10).text
