from __future__ import annotations

import msgspec

from benchmarks.tune import Against, Situation, Swept, show


def situation(answer: str, chosen: str, effort: int | None) -> Situation:
    swept = [
        Swept(build="native, tuned", effort=64, recall=0.94, ratio=0.5),
        Swept(build="native, tuned", effort=100, recall=0.96, ratio=0.7),
        Swept(build="int8 codes", effort=100, recall=0.955, ratio=0.35),
    ]
    return Situation(
        name="edge",
        keys=1000,
        unit="cpu",
        recall=0.95,
        as_found_recall=0.97,
        as_found_ms=1.0,
        answer=answer,
        chosen=chosen,
        effort=effort,
        minutes=1.0,
        swept=swept,
    )


def test_a_choice_is_held_against_the_cheapest_that_reaches_the_target() -> None:
    tuned = situation("tune", "native, tuned", 100)
    assert tuned.best == Swept(build="int8 codes", effort=100, recall=0.955, ratio=0.35)
    assert tuned.taken.ratio / tuned.best.ratio == 2.0
    left = situation("leave", "as it is", None)
    assert (left.taken.recall, left.taken.ratio) == (0.97, 1.0)
    shown = show([tuned, left]).splitlines()[2]
    assert shown.endswith("| 0.70 | - | - | int8 codes 100 | 0.35 | 2.00 | 0 |")
    efforts = {"native, tuned": 100, "HNSW": 64}
    sure = msgspec.structs.replace(tuned, efforts=efforts)
    assert sure.promised == tuned.taken
    assert "| native, tuned 100 | 0.70 | int8 codes 100 |" in show([sure])
    beside = msgspec.structs.replace(tuned, against=Against(ratio=1.9, low=1.8, high=2.0))
    assert show([beside]).endswith("| int8 codes 100 | 0.35 | 1.90 (1.80 to 2.00) | 0 |")
