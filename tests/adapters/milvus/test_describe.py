from __future__ import annotations

from amips_plugins.adapters.milvus.describe import fan_out_notes


def test_few_segments_are_left_alone() -> None:
    assert fan_out_notes(0) == fan_out_notes(7) == ()


def test_of_many_segments_larger_ones_are_the_first_cure() -> None:
    (note,) = fan_out_notes(64)
    assert "all 64 indexed segments" in note
    assert note.index("maxSize") < note.index("--index hnsw")
