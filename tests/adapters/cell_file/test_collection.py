"""What is written to a cell file comes back as it will after a backfill, or is refused at once."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.cell_file.collection import CellFileCollection
from amips_plugins.adapters.cell_file.key_ids import ids_as_array
from amips_plugins.adapters.cell_file.log import log_of
from amips_plugins.adapters.cell_file.writing import CellFileSpec, Keys, write_cell_file
from amips_plugins.collection import Id, SearchRequest
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.vectors import FloatArray, IntArray, Metric
from tests.adapters.cell_file.made import ORIGIN

DIM = 6


def keys(count: int) -> FloatArray:
    return np.random.default_rng(3).standard_normal((count, DIM)).astype(np.float32)


def written(path: Path, ids: list[Id]) -> CellFileCollection:
    """A file of two cells."""
    spec = CellFileSpec(
        collection=ORIGIN, metric=Metric.IP, dim=DIM, bits=4, layout="abc", n_cells=2
    )
    vectors, cells = keys(len(ids)), np.arange(len(ids)) % 2
    write_cell_file(path, spec, Keys(ids_as_array(ids), lambda rows: vectors[rows]), cells)
    return CellFileCollection(path)


def first_cell(ids: Any, vectors: Any) -> IntArray:  # noqa: ARG001 - the shape of an assignment
    return np.zeros(len(ids), dtype=np.int64)


def there(collection: CellFileCollection) -> list[Id]:
    return [one for batch in collection.scan(3) for one in batch.ids]


REFUSED: dict[str, tuple[list[Id], Any]] = {
    "no text": (["\ud800"], [{}]),
    "empty": (["", "b"], [{}, {}]),
    "an object": (["b"], [{"a": object()}]),
    "a number of numpy": (["b"], [{"a": np.float32(1)}]),
    "a number too large": (["b"], [{"a": 2**70}]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_file_can_hold_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    collection = written(tmp_path / "x", ["a", "c"])
    ids, fields = REFUSED[case]
    with pytest.raises(InvalidInput):
        collection.upsert(ids, keys(len(ids)), fields)
    with pytest.raises(InvalidInput, match="finite"):
        collection.upsert(["b"], np.full((1, DIM), np.nan, dtype=np.float32))
    assert there(CellFileCollection(tmp_path / "x")) == ["a", "c"]


def test_fields_come_back_before_a_backfill_as_behind_it(tmp_path: Path) -> None:
    """Names that are no texts once made a log that nobody could read again."""
    collection = written(tmp_path / "x", ["a", "c"])
    collection.upsert(["b"], keys(1), [{1: "one", "raw": b"12", "some": (1, 2)}])  # type: ignore[dict-item]
    request = SearchRequest(keys(1), k=3, fields=("1", "raw", "some"))
    before = collection.search(request)[0]
    assert {"1": "one", "raw": "MTI=", "some": [1, 2]} in [hit.fields for hit in before]
    collection.layouts.backfill(first_cell)
    behind = CellFileCollection(tmp_path / "x").search(request)[0]
    assert {hit.id: hit.fields for hit in behind} == {hit.id: hit.fields for hit in before}


def test_a_file_keeps_ids_of_one_kind_that_it_can_be_written_with(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not some of each"):
        ids_as_array([1, "a"])
    emptied = written(tmp_path / "emptied", [1])
    emptied.delete([1])
    emptied.layouts.backfill(first_cell)
    emptied.upsert(["a"], keys(1))
    with pytest.raises(InvalidInput, match="one kind"):
        emptied.upsert([2], keys(1))
    assert there(emptied) == ["a"]
    signed = written(tmp_path / "signed", [-5, 7])
    with pytest.raises(InvalidInput, match="whole numbers"):
        signed.upsert([2**63], keys(1))
    signed.upsert([8], keys(1))
    assert signed.layouts.backfill(first_cell) == 1


@pytest.mark.parametrize("ids", [["a", "c"], [1, 2]], ids=["text", "int"])
def test_ids_that_no_file_can_hold_are_not_there(ids: list[Id], tmp_path: Path) -> None:
    collection = written(tmp_path / "x", ids)
    for odd in ("a\0", "", "\ud800", "x" * 2000, 2**64, -(2**63) - 1):
        assert not collection.fetch([odd]).ids
        collection.delete([odd])
    assert there(collection) == ids


def test_a_log_that_a_crash_filled_with_zeros_ends_before_them(tmp_path: Path) -> None:
    collection = written(tmp_path / "x", [1, 2])
    collection.upsert([3], keys(1))
    log = log_of(tmp_path / "x", collection._state.file.header.identity)
    log.write_bytes(log.read_bytes() + bytes(100))
    again = CellFileCollection(tmp_path / "x")
    assert there(again) == [1, 2, 3]
    again.upsert([4], keys(1))
    assert there(CellFileCollection(tmp_path / "x")) == [1, 2, 3, 4]


def test_a_log_of_another_version_is_told_in_a_sentence(tmp_path: Path) -> None:
    collection = written(tmp_path / "x", [1, 2])
    content = b"\x81\xa3odd\x01"
    head = len(content).to_bytes(4, "little") + zlib.crc32(content).to_bytes(4, "little")
    log_of(tmp_path / "x", collection._state.file.header.identity).write_bytes(head + content)
    with pytest.raises(CollectionError, match="cannot read"):
        collection.count()
