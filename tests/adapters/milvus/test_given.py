"""Milvus' own partitions, and fields of other kinds, as the cells of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.collection import Hit, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray

pymilvus = pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")
KEYS: FloatArray = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
PARTS = ("_default", "north", "south", "west")
NORTH_SOUTH = Partitions(None, ("north", "south"))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    opened = pymilvus.MilvusClient(str(tmp_path / "docs.db"))
    schema = opened.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("key", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("embedding", pymilvus.DataType.FLOAT_VECTOR, dim=4)
    schema.add_field("topic", pymilvus.DataType.VARCHAR, max_length=9, nullable=True)
    schema.add_field("weight", pymilvus.DataType.FLOAT)
    opened.create_collection("docs", schema=schema)
    for part in PARTS[1:]:
        opened.create_partition("docs", part)
    for row, key in enumerate(KEYS):
        more = {} if row % 5 == 0 else {"year": 2000 + row % 5}
        topic = None if row % 4 == 3 else f"t{row % 4}"
        one = {"key": row, "embedding": key, "topic": topic, "weight": 0.5, **more}
        opened.insert("docs", [one], partition_name=PARTS[row % 4])
    index = opened.prepare_index_params()
    index.add_index("embedding", index_type="FLAT", metric_type="IP")
    opened.create_index("docs", index)
    opened.load_collection("docs")
    yield opened
    opened.close()


def found_by(seen: MilvusCollection, cells: list[int], **more: Any) -> list[int]:
    plan = QueryPlan(cells=np.array([cells]), layout=seen.layout())
    hits: list[Hit]
    (hits,) = seen.search(SearchRequest(KEYS[:1], len(KEYS), **more), plan)
    return sorted(int(hit.id) for hit in hits)


def rows_of(*parts: int, of: int = 4) -> list[int]:
    return [row for row in range(len(KEYS)) if row % of in parts]


def test_partitions_of_the_user_are_cells(client: Any) -> None:
    seen = MilvusCollection(client, "docs").partitioned(NORTH_SOUTH)
    assert (seen.break_even, seen.overflow()) == (1.0, 20)
    assert seen.layouts.status().sizes == (10, 10)
    assert found_by(seen, [0]) == rows_of(0, 1, 3)  # what is in others is always searched
    assert found_by(seen, [1, 0]) == rows_of(0, 1, 2, 3)
    assert found_by(seen, [1], filter="key < 12") == [r for r in rows_of(0, 2, 3) if r < 12]
    assert seen.current() is seen


def test_they_are_read_one_after_the_other(client: Any) -> None:
    seen = MilvusCollection(client, "docs").partitioned(Partitions(None))
    batches = list(seen.scan(7))
    pairs = [pair for one in batches for pair in zip(one.ids, one.values or (), strict=True)]
    wanted = {row: None if row % 4 == 0 else PARTS[row % 4] for row in range(len(KEYS))}
    assert (len(pairs), dict(pairs)) == (len(KEYS), wanted)
    for place in (0, 1, len(batches) - 2):
        after = next(iter(seen.scan(7, after=batches[place].cursor)))
        assert after.ids == batches[place + 1].ids


@pytest.mark.slow
def test_what_comes_or_goes_while_it_serves_is_found_or_gone(client: Any) -> None:
    seen = MilvusCollection(client, "docs").partitioned(NORTH_SOUTH)
    assert found_by(seen, [0]) == rows_of(0, 1, 3)
    client.create_partition("docs", "east")
    one = {"key": 99, "embedding": KEYS[0], "topic": "t0", "weight": 1.0}
    client.insert("docs", [one], partition_name="east")
    assert found_by(seen, [0]) == [*rows_of(0, 1, 3), 99]
    assert seen.overflow() == 21
    client.drop_partition("docs", "north")
    assert found_by(seen, [0, 1]) == [*rows_of(0, 2, 3), 99]
    assert found_by(seen, [0]) == [*rows_of(0, 3), 99]
    assert seen.layouts.status().sizes == (0, 10)


@pytest.mark.parametrize("values", [("t0", "t1"), ("t2",)])
def test_rows_without_a_value_are_always_found(client: Any, values: tuple[str, ...]) -> None:
    seen = MilvusCollection(client, "docs").partitioned(Partitions("topic", values))
    known = [int(value[1]) for value in values]
    others = [part for part in range(4) if part not in known]
    assert seen.overflow() == 10 * len(others)
    assert found_by(seen, [0]) == rows_of(known[0], *others)
    read = {k: v for b in seen.scan(9) for k, v in zip(b.ids, b.values or (), strict=True)}
    assert read == {r: None if r % 4 == 3 else f"t{r % 4}" for r in range(len(KEYS))}


def test_a_dynamic_field_tells_partitions_apart_too(client: Any) -> None:
    seen = MilvusCollection(client, "docs").partitioned(Partitions("year", (2001, 2002)))
    assert seen.overflow() == 24
    assert found_by(seen, [0]) == rows_of(0, 1, 3, 4, of=5)
    assert seen.layouts.status().sizes == (8, 8)


def test_what_tells_nothing_apart_is_refused(client: Any) -> None:
    opened = MilvusCollection(client, "docs")
    for field in ("weight", "embedding", "no name"):
        with pytest.raises(InvalidInput, match="texts or whole numbers; name one of: key, topic"):
            opened.partitioned(Partitions(field))
    for part in PARTS[1:]:
        client.drop_partition("docs", part)
    with pytest.raises(InvalidInput, match="no partitions"):
        opened.partitioned(NORTH_SOUTH)
