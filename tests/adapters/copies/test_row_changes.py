from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amips_plugins.adapters.copies.row_changes import Row, SourceBaseline, diff_rows, digest
from amips_plugins.collection import Id
from amips_plugins.errors import InvalidInput

contents = st.dictionaries(st.integers(0, 12), st.integers(0, 3))


def rows(content: dict[int, int]) -> list[Row]:
    return [Row(key, digest({"v": content[key]}), {"v": content[key]}) for key in sorted(content)]


def base_of(content: dict[int, int]) -> SourceBaseline:
    base = SourceBaseline()
    for row in rows(content):
        base.add(row)
    return base


def apply(
    source: dict[int, int], copy: dict[int, int], base: SourceBaseline | None = None
) -> dict[Id, int]:
    result: dict[Id, int] = dict(copy.items())
    for change in diff_rows(rows(source), rows(copy), base):
        assert (change.old is None) == (change.id not in copy)
        if change.row is None:
            del result[change.id]
        else:
            result[change.id] = change.row.values["v"]
    return result


@given(contents, contents)
def test_a_pass_makes_the_copy_equal(source: dict[int, int], copy: dict[int, int]) -> None:
    assert apply(source, copy) == source
    assert list(diff_rows(rows(source), rows(source))) == []


@given(contents, contents, contents)
def test_with_a_base_the_last_writer_wins(
    base: dict[int, int], source: dict[int, int], copy: dict[int, int]
) -> None:
    result = apply(source, copy, base_of(base))
    for key in {*base, *source, *copy}:
        untouched_copy = copy.get(key) == base.get(key)
        assert result.get(key) == (source if untouched_copy else copy).get(key)


def test_equal_values_have_equal_digests() -> None:
    vector = np.arange(3, dtype=np.float32)
    row = {"id": 1, "v": vector.tolist(), "extra": {"b": [1, None], "a": float("nan")}}
    again = {"extra": {"a": float("nan"), "b": [1, None]}, "v": list(vector), "id": np.int64(1)}
    assert digest(row) == digest(again)
    assert digest(row) != digest({**row, "id": 2})
    assert digest({"sparse": {7: 0.5, 11: 1.0}}) == digest({"sparse": {11: 1.0, 7: 0.5}})


def test_a_base_survives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "work" / "docs.base"
    assert SourceBaseline.load(path) is None
    for content in ({}, {3: 1, 1: 2}):
        base_of(content).save(path)
        assert SourceBaseline.load(path) == base_of(content)
    named = SourceBaseline(["ä", "b"], [2**64 - 1, 0])
    named.save(path)
    assert SourceBaseline.load(path) == named


def test_a_damaged_base_is_named(tmp_path: Path) -> None:
    path = tmp_path / "docs.base"
    base_of({3: 1, 1: 2}).save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:-8], b"\xc1" * 30, whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(InvalidInput, match=r"docs\.base is damaged"):
            SourceBaseline.load(path)
