"""A verification of cells that is killed goes on where it was, and loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.cell_layout import Storage
from tests.support.milvus_collection import COUNT, make, spec, vectors
from tests.support.milvus_crashing import Killed, Watched, contents
from tests.support.progress_recorder import Recorder

pytestmark = pytest.mark.slow

STALE = [0, 1, 34, 35]
BOTH = pytest.mark.parametrize("storage", ["partitions", "field"])


@pytest.fixture(autouse=True)
def notes_come_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amips_plugins.adapters.milvus.upkeep._PAGE", 5)
    monkeypatch.setattr("amips_plugins.adapters.milvus.upkeep._NOTE_EVERY", 5)
    monkeypatch.setattr("amips_plugins.adapters.milvus.table._FIRST_PAGE", 5)


def by_sign(_: Any, keys: Any) -> Any:
    return (keys[:, 0] > 0).astype("int64")


def stale(client: Any, storage: Storage) -> MilvusCollection:
    """Cells by the sign of a number, some of whose keys lie in the other one."""
    wrong = lambda ids, keys: [  # noqa: E731
        1 - cell if key in STALE else cell
        for key, cell in zip(ids, by_sign(ids, keys).tolist(), strict=True)
    ]
    built = make(client).layouts.build(spec(assign=wrong, storage=storage))
    if storage == "field":  # of another vector than the one beside the cell
        rows = client.query("docs__g2f", filter=f"key in {STALE}", output_fields=["*"])
        client.upsert("docs__g2f", [{**row, "amips_sketch": 7} for row in rows])
    assert built.layouts.audit(COUNT, by_sign).stale == len(STALE)
    return built


def note(client: Any, name: str) -> str:
    return str(client.describe_collection(name)["properties"].get("amips.verified", ""))


def check(built: MilvusCollection) -> None:
    assert contents(built) == {row: vector.tolist() for row, vector in enumerate(vectors())}
    assert (built.overflow(), built.layouts.audit(COUNT, by_sign).stale) == (0, 0)
    assert note(built.client, built.info.name) == ""


@BOTH
def test_it_goes_on_where_it_was_killed(client: Any, storage: Storage) -> None:
    built = stale(client, storage)
    with pytest.raises(KeyboardInterrupt):
        built.layouts.backfill(by_sign, Recorder(stop_after=25), verify=True)
    read = json.loads(note(client, built.info.name))["at"][-1]
    assert 15 <= read < 25
    again = MilvusCollection(client, built.info.name)
    left, recorder = again.layouts.audit(COUNT, by_sign).stale, Recorder()
    assert again.layouts.backfill(by_sign, recorder, verify=True) == left < len(STALE)
    assert recorder.started_at[0] == read
    check(again)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: {**found, "of": ["another", 0, "abc"]},
        lambda found: {**found, "when": found["when"] - 90_000},
        lambda found: {**found, "at": "elsewhere"},
        lambda _: 7,
    ],
    ids=["of another collection", "too old", "odd", "no note"],
)
def test_a_note_that_does_not_count_is_not_believed(
    client: Any, change: Callable[[Any], Any]
) -> None:
    built = stale(client, "field")
    with pytest.raises(KeyboardInterrupt):
        built.layouts.backfill(by_sign, Recorder(stop_after=35), verify=True)
    found = change(json.loads(note(client, built.info.name)))
    client.alter_collection_properties(built.info.name, {"amips.verified": json.dumps(found)})
    recorder = Recorder()
    built.layouts.backfill(by_sign, recorder, verify=True)
    assert recorder.started_at[0] == 0
    check(built)


@BOTH
def test_who_may_not_write_notes_verifies_all_the_same(client: Any, storage: Storage) -> None:
    name = stale(client, storage).info.name

    def refuse(called: str, _: bool) -> None:
        if called == "alter_collection_properties":
            raise PermissionError

    watched = MilvusCollection(Watched(client, refuse), name)
    assert watched.layouts.backfill(by_sign, verify=True) == len(STALE)
    check(MilvusCollection(client, name))


@pytest.mark.parametrize(
    "storage", [pytest.param("partitions", marks=pytest.mark.nightly), "field"]
)
def test_killed_at_every_step(client: Any, storage: Storage) -> None:
    told: list[str] = []
    name = stale(client, storage).info.name
    watched = Watched(client, lambda called, _: told.append(called))
    MilvusCollection(watched, name).layouts.backfill(by_sign, verify=True)
    assert told.count("alter_collection_properties") > 4
    assert "insert" in told
    for deadly in range(len(told)):
        # To Milvus Lite an upsert into a partition is a delete and an insert.
        if storage == "partitions" and told[max(0, deadly - 1)] in ("delete", "flush"):
            continue
        for old in client.list_collections():
            client.drop_collection(old)
        stale(client, storage)
        left = [deadly]

        def die(_: str, __: bool, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        with pytest.raises(Killed):
            MilvusCollection(Watched(client, die), name).layouts.backfill(by_sign, verify=True)
        again = MilvusCollection(client, name)
        again.layouts.backfill(by_sign, verify=True)
        check(again)
