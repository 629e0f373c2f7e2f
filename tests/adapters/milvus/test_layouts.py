"""Laying out in Milvus: what the contract does not say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.layout_plan import choose_storage, has_clustering_keys
from amips_plugins.cell_layout import CellIndex, Storage
from amips_plugins.collection import Id
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.vectors import FloatArray, IntArray
from tests.support.milvus_collection import COUNT, make, pymilvus, search, spec, vectors
from tests.support.milvus_crashing import Killed, Watched, contents
from tests.support.progress_recorder import Recorder

pytestmark = pytest.mark.slow


def aliased(client: Any) -> MilvusCollection:
    make(client)
    client.create_alias("docs", "live")
    return MilvusCollection(client, "live")


def test_generations_follow_one_another(client: Any) -> None:
    first = make(client)
    second = first.layouts.build(spec())
    third = second.layouts.build(spec("def"))
    assert [c.info.name for c in (second, third)] == ["docs__g2", "docs__g3"]
    assert [c.layout() for c in (first, second, third)] == [None, "abc", "def"]
    assert MilvusCollection(client, "docs__g3").layouts.status().older == ("docs", "docs__g2")
    client.drop_collection("docs__g2")
    assert [c.count() for c in (first, third)] == [COUNT] * 2
    assert third.layouts.roll_back().info.name == "docs"


@pytest.mark.parametrize("storage", ["partitions", "field"])
def test_a_copy_keeps_rows_ids_and_other_indexes(client: Any, storage: Storage) -> None:
    make(client, fields=("body", "heading"), auto_id=True)
    source = MilvusCollection(client, "docs", "body")
    ids = [key for batch in source.scan(100) for key in batch.ids]
    of_four = lambda keys, _: np.arange(len(keys)) % 4 - 1  # noqa: E731
    copy = source.layouts.build(spec(n_cells=3, assign=of_four, storage=storage))
    everything = {"filter": "", "output_fields": ["*"], "limit": COUNT}
    rows, copied = (
        sorted(client.query(name, **everything), key=lambda row: row["key"])
        for name in ("docs", copy.info.name)
    )
    assert [row["key"] for row in copied] == sorted(ids)
    assert [copy.table().bare(row) for row in copied] == rows
    assert client.describe_index(copy.info.name, "body")["index_type"] == "FLAT"
    assert client.describe_index(copy.info.name, "heading")["index_type"] == "HNSW"
    assert copy.overflow() == COUNT // 4  # -1 is no cell
    assert "amips_cell" not in copy.info.schema
    other = search(MilvusCollection(client, copy.info.name, "heading"))
    assert [hit.id for hit in other[0]] == [
        hit.id for hit in search(MilvusCollection(client, "docs", "heading"))[0]
    ]


def test_the_cells_may_keep_the_index(client: Any) -> None:
    make(client).layouts.build(spec(index="auto"))
    kept, own = (client.describe_index(name, "embedding") for name in ("docs__g2", "docs"))
    assert kept["index_type"] == "HNSW"
    assert {name: kept.get(name) for name in own} == own


@pytest.mark.parametrize("index", ["flat", "hnsw", "ivf_flat", "ivf_sq8"])
def test_the_cells_may_have_an_index_of_another_kind(client: Any, index: CellIndex) -> None:
    source = make(client)
    plan = source.layouts.plan(spec(index=index))
    assert f"a {index.upper()} index" in plan.steps[0]
    assert any("misses keys" in note for note in plan.notes) == (index == "hnsw")
    assert any("all lists" in note for note in plan.notes) == index.startswith("ivf")
    assert any("by their codes" in note for note in plan.notes) == (index == "ivf_sq8")
    copy = source.layouts.build(spec(index=index))
    assert client.describe_index("docs__g2", "embedding")["index_type"] == index.upper()
    assert copy.count() == COUNT


def test_a_copy_through_connect_owns_its_client(client: Any, path: Path) -> None:
    make(client)
    source = MilvusCollection.connect(str(path), "docs")
    copy = source.layouts.build(spec())
    source.close()
    assert copy.count() == COUNT
    copy.close()


def wrong_shape(ids: Sequence[Id], _: FloatArray) -> IntArray:
    return np.zeros(len(ids) - 1, dtype=np.int64)


def too_large(ids: Sequence[Id], _: FloatArray) -> IntArray:
    return np.full(len(ids), 2, dtype=np.int64)


def fractions(ids: Sequence[Id], _: FloatArray) -> Any:
    return np.zeros(len(ids))


@pytest.mark.parametrize("assign", [wrong_shape, too_large, fractions])
def test_cells_that_cannot_be_are_refused(client: Any, assign: Any) -> None:
    source = make(client)
    with pytest.raises(InvalidInput, match="assign"):
        source.layouts.build(spec(assign=assign))
    assert source.count() == COUNT
    assert source.layouts.status().unfinished == ("docs__building_abc",)
    assert source.layouts.drop_old() == ["docs__building_abc"]
    assert client.list_collections() == ["docs"]


def test_a_copy_has_no_generation_name_before_it_is_complete(client: Any) -> None:
    def look(ids: Sequence[Id], _: FloatArray) -> IntArray:
        assert sorted(client.list_collections()) == ["docs", "docs__building_abc"]
        unfinished = MilvusCollection(client, "docs__building_abc")
        assert (unfinished.layout(), unfinished.overflow()) == (None, 0)
        return np.asarray(ids, dtype=np.int64) % 2

    assert make(client).layouts.build(spec(assign=look)).info.name == "docs__g2"


def test_an_unfinished_copy_with_other_options_is_begun_again(client: Any) -> None:
    source = make(client)
    with pytest.raises(InvalidInput):
        source.layouts.build(spec(assign=too_large))
    copy = source.layouts.build(spec(storage="field"))
    assert copy.layouts.status().storage == "field"
    assert copy.layouts.status().unfinished == ()


def test_what_a_copy_would_lose_is_refused_before_anything_is_made(client: Any) -> None:
    source = make(client)
    with pytest.raises(InvalidInput, match="at most 1024"):
        source.layouts.build(spec(n_cells=1025, storage="partitions"))
    with pytest.raises(InvalidInput, match="'docs' is a collection"):
        source.layouts.build(spec(alias="docs"))
    client.create_partition("docs", "archive")
    with pytest.raises(InvalidInput, match="archive"):
        source.layouts.build(spec())
    with pytest.raises(InvalidInput, match="partition key"):
        make(client, "tenants", partition_key=True).layouts.build(spec())
    assert sorted(client.list_collections()) == ["docs", "tenants"]


def test_a_field_of_that_name_is_refused(client: Any) -> None:
    schema = client.create_schema()
    schema.add_field("key", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("v", pymilvus.DataType.FLOAT_VECTOR, dim=4)
    schema.add_field("amips_cell", pymilvus.DataType.INT64)
    index = client.prepare_index_params()
    index.add_index("v", index_type="FLAT", metric_type="IP")
    client.create_collection("docs", schema=schema, index_params=index)
    with pytest.raises(InvalidInput, match="amips_cell"):
        MilvusCollection(client, "docs").layouts.plan(spec())


def test_too_little_disk_is_found_out_before(
    client: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(client)
    collection = MilvusCollection.connect(str(path), "docs")
    plan = collection.layouts.plan(spec())
    usage = type("usage", (), {"free": plan.n_bytes})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CollectionError, match="make room"):
        collection.layouts.build(spec())
    assert client.list_collections() == ["docs"]
    collection.close()


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["partitions", "field"])
def test_a_copy_in_a_file_takes_about_what_its_plan_says(tmp_path: Path, storage: Storage) -> None:
    own = pymilvus.MilvusClient(str(tmp_path / "own.db"))
    own.create_collection("docs", dimension=64, auto_id=False)
    keys = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32)
    own.insert("docs", [{"id": row, "vector": key} for row, key in enumerate(keys)])
    own.flush("docs")

    def taken() -> int:
        return sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())

    before, source = taken(), MilvusCollection(own, "docs")
    plan = source.layouts.plan(spec(n_cells=16, storage=storage))
    source.layouts.build(spec(n_cells=16, storage=storage))
    assert 0.3 < (taken() - before) / plan.n_bytes < 1.2  # as much has to be free
    own.close()


def test_a_plan_says_what_an_operator_should_know(client: Any) -> None:
    source = make(client, auto_id=True)
    plan = source.layouts.plan(spec(n_cells=200, storage="partitions"))
    assert "docs__g2" in plan.steps[0]
    assert ["200 partitions" in note for note in plan.notes] == [True, False, False]
    assert "bring their own" in plan.notes[1]
    assert "no alias" in plan.notes[2]
    assert plan.n_bytes > COUNT * 4 * 4
    with pytest.raises(InvalidInput, match="bring their own"):
        source.layouts.plan(spec(alias="live"))


def test_a_plan_says_which_alias_moves(client: Any) -> None:
    assert "'live'" in aliased(client).layouts.plan(spec()).steps[3]


def test_cells_go_where_they_fit() -> None:
    assert choose_storage(spec(n_cells=128)) == "partitions"
    assert choose_storage(spec(n_cells=129)) == "field"
    assert choose_storage(spec(n_cells=2, storage="field")) == "field"
    versions = ("v2.3.5-lite", "milvus_lite-3.2.2", "v2.4.0", "2.6.9", "v3.0")
    assert [has_clustering_keys(version) for version in versions] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_progress_is_told_of_every_key(client: Any) -> None:
    recorder = Recorder()
    make(client).layouts.build(spec(), recorder)
    assert recorder.totals == [COUNT, COUNT]  # the copy, and the pass that finds nothing to do
    assert recorder.done == COUNT


def test_the_alias_moves_and_back_again(client: Any, tmp_path: Path) -> None:
    before = aliased(client)
    assert before.info.name == "docs"
    after = before.layouts.build(spec(work=tmp_path))
    assert client.describe_alias("live")["collection_name"] == after.info.name == "docs__g2"
    assert (before.info.name, before.layout()) == ("docs", None)  # stays where it was
    moved = before.current()
    assert (moved.info.name, moved.layout(), moved.alias) == ("docs__g2", "abc", "live")
    assert list(tmp_path.iterdir()) == []

    moved.upsert([100], vectors()[:1], [{"extra": {}}], np.array([1]))
    moved.upsert([1], vectors()[:1], [{"extra": {}}], np.array([0]))
    moved.delete([2])
    with pytest.raises(CollectionError, match="--anyway"):
        moved.layouts.roll_back()
    back = moved.layouts.roll_back(anyway=True)
    assert client.describe_alias("live")["collection_name"] == back.info.name == "docs"
    ids = [key for batch in back.scan(100) for key in batch.ids]
    assert ids == [key for key in range(COUNT) if key != 2] + [100]
    rewritten = next(iter(back.scan(100, after=0))).vectors[0]  # of key 1
    np.testing.assert_array_equal(rewritten, vectors()[0])


def test_a_new_alias_is_made(client: Any) -> None:
    copy = make(client).layouts.build(spec(alias="live"))
    assert client.describe_alias("live")["collection_name"] == copy.info.name


def test_an_old_generation_that_has_what_the_new_one_lacks_is_not_dropped(client: Any) -> None:
    copy = make(client).layouts.build(spec())
    client.create_alias("docs", "still")
    with pytest.raises(CollectionError, match="'still'"):
        copy.layouts.drop_old()
    client.drop_alias("still")
    client.insert("docs", [{"key": 77, "embedding": vectors()[0], "extra": {}}])
    with pytest.raises(CollectionError, match="77"):
        copy.layouts.drop_old()
    assert copy.layouts.drop_old(anyway=True) == ["docs"]
    assert client.list_collections() == ["docs__g2"]


def test_a_complete_copy_is_not_overwritten(client: Any, tmp_path: Path) -> None:
    source = make(client)
    copy = source.layouts.build(spec(work=tmp_path))
    plan = source.layouts.plan(spec())
    assert (plan.steps, plan.notes) == (
        (),
        ("'docs__g2' has these cells already: nothing is left to copy",),
    )
    assert source.layouts.build(spec()).info.name == "docs__g2"
    # With what it remembers of the copy, it brings over what changed in the source since.
    source.upsert([1000], vectors()[:1], [{"extra": {}}])
    source.delete([3])
    copy.delete([4])
    again = source.layouts.build(spec(work=tmp_path))
    assert again.info.name == "docs__g2"
    ids = [key for batch in again.scan(100) for key in batch.ids]
    assert ids == [key for key in range(COUNT) if key not in (3, 4)] + [1000]


def test_ids_that_come_twice_are_refused(client: Any) -> None:
    copy = make(client).layouts.build(spec())
    rows = [{"key": 0, "embedding": vectors()[0], "extra": {}}]
    client.upsert("docs__g2", rows)  # Milvus Lite shows one of the two rows only
    plan = copy.layouts.plan(spec("def"))
    assert plan.keys == COUNT


def test_a_copy_that_finds_worse_neighbours_is_not_switched_to(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = aliased(client)
    monkeypatch.setattr(
        "amips_plugins.adapters.milvus.copying._nearest",
        lambda table, queries, _: (
            [{table.name: float("building" not in table.name)}] * len(queries)
        ),
    )
    with pytest.raises(CollectionError, match=r"only 0% .* 32 sampled keys"):
        source.layouts.build(spec())
    assert client.describe_alias("live")["collection_name"] == "docs"


class Busy:
    """A client with another one writing: at each reading of rows something is called first."""

    def __init__(self, client: Any, meanwhile: Any) -> None:
        self._client = client
        self._meanwhile = meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def query(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._client.query(*args, **kwargs)
        if "iterator" in kwargs and answer:
            self._meanwhile()
        return answer


def test_keys_that_come_and_go_are_no_double_ids(client: Any) -> None:
    make(client)
    numbers = iter(range(1, 100))

    def meanwhile() -> None:  # behind what has been read, and ahead of it
        number = next(numbers)
        row = {"key": -number, "embedding": vectors()[0], "extra": {}}
        client.insert("docs", [row, {**row, "key": 1000 + number}])
        client.delete("docs", ids=[1000 + number])
        client.delete("docs", ids=[COUNT - number])

    plan = MilvusCollection(Busy(client, meanwhile), "docs").layouts.plan(spec())
    assert plan.keys <= COUNT


def row(key: int) -> dict[str, Any]:
    return {"key": key, "embedding": vectors()[0], "extra": {}}


def around_the_switch(client: Any, before: Any, after: Any) -> MilvusCollection:
    """Open ``live`` so that something happens just before and just after the alias moves."""

    def told(name: str, done: bool) -> None:
        if name == "alter_alias":
            (after if done else before)()

    return MilvusCollection(Watched(client, told), "live")


def die() -> None:
    raise Killed


def test_a_rollback_waits_for_the_end_of_the_build(client: Any, tmp_path: Path) -> None:
    aliased(client)
    dying = around_the_switch(client, lambda: client.insert("docs", [row(777)]), die)
    with pytest.raises(Killed):
        dying.layouts.build(spec(work=tmp_path))
    live = MilvusCollection(client, "live")
    with pytest.raises(InvalidInput, match=r"'docs' .* is not copied yet; lay out .* again"):
        live.layouts.roll_back()
    back = live.layouts.build(spec(work=tmp_path)).layouts.roll_back()
    assert 777 in contents(back)


def test_a_rollback_that_died_is_finished_by_another_one(client: Any, tmp_path: Path) -> None:
    aliased(client).layouts.build(spec(work=tmp_path))
    dying = around_the_switch(client, lambda: client.insert("docs__g2", [row(777)]), die)
    with pytest.raises(Killed):
        dying.layouts.roll_back()
    live = MilvusCollection(client, "live")
    assert live.layouts.status().unfinished == ("docs__draining",)
    with pytest.raises(InvalidInput, match="roll back again"):
        live.layouts.build(spec("def"))
    back = live.layouts.roll_back()
    assert back.info.name == "docs"
    assert MilvusCollection(client, "live").layouts.status().unfinished == ("docs__g2",)
    assert 777 in contents(back)


def test_cells_that_were_rolled_back_are_built_again_when_they_are_dropped(
    client: Any, tmp_path: Path
) -> None:
    aliased(client).layouts.build(spec(work=tmp_path))
    MilvusCollection(client, "live").layouts.roll_back()
    live = MilvusCollection(client, "live")
    for refused in (live.layouts.plan, live.layouts.build):
        with pytest.raises(InvalidInput, match="drop-old"):
            refused(spec(work=tmp_path))
    assert live.layouts.drop_old() == ["docs__g2"]
    assert live.layouts.build(spec(work=tmp_path)).layout() == "abc"


def test_an_alias_that_somebody_moved_meanwhile_stays_there(client: Any) -> None:
    aliased(client)
    make(client, "other")

    def told(name: str, done: bool) -> None:
        if (name, done) == ("rename_collection", True):
            client.alter_alias("other", "live")

    with pytest.raises(CollectionError, match="from 'docs' to 'other' meanwhile"):
        MilvusCollection(Watched(client, told), "live").layouts.build(spec())
    assert client.describe_alias("live")["collection_name"] == "other"


def test_what_is_remembered_of_one_source_is_not_used_for_another(
    client: Any, tmp_path: Path
) -> None:
    second = make(client).layouts.build(spec(work=tmp_path))
    third = second.layouts.build(spec("def", work=tmp_path))
    third.upsert([1], 9 * vectors()[:1], [{"extra": {}}], np.array([1]))
    with pytest.raises(InvalidInput, match="'docs__g2' has these cells already"):
        third.layouts.build(spec(work=tmp_path))


def test_every_old_generation_is_looked_at_before_any_is_dropped(client: Any) -> None:
    third = make(client).layouts.build(spec()).layouts.build(spec("def"))
    client.insert("docs", [row(777)])
    with pytest.raises(CollectionError, match=r"'docs' holds 1 ids .* 777"):
        third.layouts.drop_old()


def test_anothers_collection_is_not_dropped_for_its_name(client: Any) -> None:
    copy = make(client).layouts.build(spec())
    for name in ("docs__building_permits", "docs__g1"):
        make(client, name)
    assert copy.layouts.status().unfinished == ()
    assert copy.layouts.drop_old() == ["docs"]


def test_a_finished_layout_again_is_a_success_that_names_nothing_for_dropping(client: Any) -> None:
    aliased(client).layouts.build(spec())
    # By the alias, by the source's own name with the alias, and by the generation's own name.
    again = [
        (MilvusCollection(client, "live"), spec()),
        (MilvusCollection(client, "docs"), spec(alias="live")),
        (MilvusCollection(client, "docs"), spec()),
        (MilvusCollection(client, "docs__g2"), spec()),
    ]
    for collection, wanted in again:
        plan = collection.layouts.plan(wanted)
        assert plan.steps == ()
        assert "drop" not in plan.notes[0]
        assert collection.layouts.build(wanted).info.name == "docs__g2"
    assert sorted(client.list_collections()) == ["docs", "docs__g2"]
    assert client.describe_alias("live")["collection_name"] == "docs__g2"


def test_a_finished_layout_may_still_get_its_alias(client: Any) -> None:
    copy = make(client).layouts.build(spec())
    assert copy.layouts.plan(spec(alias="live")).steps == ("point alias 'live' at 'docs__g2'",)
    copy.layouts.build(spec(alias="live"))
    assert client.describe_alias("live")["collection_name"] == "docs__g2"


def test_what_rollback_needs_is_never_named_for_dropping(client: Any, tmp_path: Path) -> None:
    aliased(client).layouts.build(spec(work=tmp_path))
    MilvusCollection(client, "live").layouts.build(spec("def", work=tmp_path))
    with pytest.raises(InvalidInput, match="roll back to it") as caught:
        MilvusCollection(client, "live").layouts.build(spec())
    assert "drop" not in str(caught.value)


def test_a_collection_is_of_the_family_that_it_says(client: Any) -> None:
    for name in ("events", "events__g1", "events__g2"):  # the user's own
        make(client, name)
    copy = MilvusCollection(client, "events__g2").layouts.build(spec())
    assert copy.info.name == "events__g2__g2"
    assert copy.layouts.status().older == ("events__g2",)
    assert MilvusCollection(client, "events").layouts.status().older == ()
    assert copy.layouts.drop_old() == ["events__g2"]
    assert sorted(client.list_collections()) == ["events", "events__g1", "events__g2__g2"]


def test_a_server_gets_no_other_fields_behind_an_alias_that_clients_know(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = aliased(client)
    monkeypatch.setattr(type(client), "get_server_version", lambda _: "v2.3.5")
    with pytest.raises(InvalidInput, match="'live' remember the fields of 'docs'"):
        live.layouts.plan(spec(storage="field"))
    with pytest.raises(InvalidInput, match="'live' remember the fields of 'docs'"):
        MilvusCollection(client, "live").layouts.plan(spec(n_cells=200))
    monkeypatch.undo()
    # On Milvus Lite, and behind a name that nobody has used, it is done; the names differ for each.
    assert MilvusCollection(client, "live").layouts.build(spec(storage="field")).alias is None
    assert MilvusCollection(client, "live").info.name == "docs__g2f"
    live = MilvusCollection(client, "live")
    monkeypatch.setattr(type(client), "get_server_version", lambda _: "v2.3.5")
    with pytest.raises(InvalidInput, match="'live' remember the fields of 'docs__g2f'"):
        live.layouts.roll_back()


def test_an_unfinished_copy_of_each_storage_has_its_own_name(client: Any) -> None:
    source, seen = make(client), []
    for storage in ("partitions", "field", "partitions"):
        with pytest.raises(InvalidInput):
            source.layouts.build(spec(assign=too_large, storage=storage))
        seen.append(source.layouts.status().unfinished)
    assert seen == [("docs__building_abc",), ("docs__building_abc_field",), ("docs__building_abc",)]
