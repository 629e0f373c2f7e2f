from __future__ import annotations

import itertools
import json
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.collection import Cursor, Id, KeyBatch
from amips_plugins.errors import DatabaseUnreachable, SnapshotError
from amips_plugins.export import snapshot_manifest as module
from amips_plugins.export.snapshot import Snapshot, take_snapshot
from amips_plugins.files import replace_file
from amips_plugins.vectors import FloatArray, Metric
from tests.support.progress_recorder import Recorder
from tests.support.training_data import gaussian

N, DIM, BATCH = 25, 3, 4
BATCHES = 7
FILES = {"snapshot.json", "vectors.f32", "ids.jsonl"}


class Breaking(MemoryCollection):
    """A collection whose scan breaks after some batches."""

    def __init__(self, keys: FloatArray, after: int, error: BaseException) -> None:
        super().__init__(keys)
        self.after = after
        self.error = error

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        yield from itertools.islice(super().scan(batch_size, after), self.after)
        raise self.error


class Moving(MemoryCollection):
    """A collection that somebody changes while it is read: ``change`` runs after each batch."""

    def __init__(self, keys: FloatArray, change: Callable[[Moving], None]) -> None:
        super().__init__(keys, list(range(0, 10 * len(keys), 10)))
        self.change = change

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        while batch := next(super().scan(batch_size, after), None):
            yield batch
            after = batch.cursor
            self.change(self)

    def delete_last(self) -> None:
        self._ids.pop()
        self._fields.pop()
        self._vectors = self._vectors[:-1]
        self._cells = self._cells[:-1]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fingerprint(keys: FloatArray, folder: Path) -> str:
    return take_snapshot(MemoryCollection(keys), folder, BATCH).manifest.fingerprint


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize(
    "ids",
    [
        list(range(N)),
        [-(2**63), 2**63 - 1, *range(N - 2)],
        [f"key {n}" for n in range(N)],
        [str(uuid.UUID(int=n)) for n in range(N)],
        [
            "7",
            "07",
            "",
            "a\nb",
            'quote"',
            "ümläut",
            "日本",
            "\u2028",
            *(f"n{n}" for n in range(N - 8)),
        ],
    ],
    ids=["int", "large int", "str", "uuid", "odd str"],
)
def test_round_trip(ids: Sequence[Id], metric: Metric, tmp_path: Path) -> None:
    keys = gaussian(N, DIM)
    collection = MemoryCollection(keys, ids, metric, name="docs")
    recorder = Recorder()
    take_snapshot(collection, tmp_path / "s", BATCH, recorder)
    snapshot = Snapshot.open(tmp_path / "s")
    read = list(snapshot.ids())
    assert read == sorted(ids)
    assert [type(key) for key in read] == [type(ids[0])] * N
    order = sorted(range(N), key=list(ids).__getitem__)
    np.testing.assert_array_equal(snapshot.vectors(), keys[order])
    assert snapshot.vectors().dtype == np.float32
    assert not snapshot.vectors().flags.writeable
    manifest = snapshot.manifest
    assert (manifest.metric, manifest.dim, manifest.count) == (metric, DIM, N)
    assert manifest.collection.name == "docs"
    assert manifest.complete
    assert not manifest.moved
    assert manifest.started <= manifest.finished
    assert manifest.tools["amips-plugins"]
    assert len(snapshot.ids_bytes().split(b"\n")) == N + 1
    assert names(tmp_path / "s") == FILES
    assert recorder.totals == [recorder.done] == [N]


def test_the_fingerprint_tells_the_content_and_nothing_else(tmp_path: Path) -> None:
    keys = gaussian(N, DIM)
    wanted = fingerprint(keys, tmp_path / "a")
    other_batches = take_snapshot(MemoryCollection(keys), tmp_path / "b", 1000)
    assert other_batches.manifest.fingerprint == wanted
    changed = keys.copy()
    changed[17, 1] += 1e-3
    assert fingerprint(changed, tmp_path / "c") != wanted
    renamed = MemoryCollection(keys, [str(n) for n in range(N)])
    assert take_snapshot(renamed, tmp_path / "d", BATCH).manifest.fingerprint != wanted


@pytest.mark.parametrize("batches", range(BATCHES + 1))
@pytest.mark.parametrize("error", [KeyboardInterrupt(), DatabaseUnreachable("gone")], ids=repr)
def test_an_interrupted_copy_is_resumed(error: BaseException, batches: int, tmp_path: Path) -> None:
    keys = gaussian(N, DIM)
    with pytest.raises(type(error)):
        take_snapshot(Breaking(keys, batches, error), tmp_path / "s", BATCH)
    with pytest.raises(SnapshotError, match=r"not finished.*of 25 keys.*run the same .* again"):
        Snapshot.open(tmp_path / "s")
    recorder = Recorder()
    resumed = take_snapshot(MemoryCollection(keys), tmp_path / "s", BATCH, recorder)
    assert recorder.started_at == [min(batches * BATCH, N)]
    assert recorder.done == N
    assert resumed.manifest.fingerprint == fingerprint(keys, tmp_path / "straight")
    assert not resumed.manifest.moved
    np.testing.assert_array_equal(resumed.vectors(), keys)


def test_a_copy_interrupted_many_times_ends_the_same(tmp_path: Path) -> None:
    keys = gaussian(N, DIM)
    for _ in range(BATCHES):
        with pytest.raises(KeyboardInterrupt):
            take_snapshot(Breaking(keys, 1, KeyboardInterrupt()), tmp_path / "s", BATCH)
    resumed = take_snapshot(MemoryCollection(keys), tmp_path / "s", BATCH)
    assert resumed.manifest.fingerprint == fingerprint(keys, tmp_path / "straight")


@pytest.mark.parametrize("write", range(BATCHES + 2))
def test_a_kill_between_the_files_and_the_manifest_leaves_a_tail_that_is_cut(
    write: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, writes = gaussian(N, DIM), iter(range(100))

    def killed(path: Path, data: bytes) -> None:
        if next(writes) == write:
            raise KeyboardInterrupt
        replace_file(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(module, "replace_file", killed)
        with pytest.raises(KeyboardInterrupt):
            take_snapshot(MemoryCollection(keys), tmp_path / "s", BATCH)
    resumed = take_snapshot(MemoryCollection(keys), tmp_path / "s", BATCH)
    assert resumed.manifest.fingerprint == fingerprint(keys, tmp_path / "straight")


def test_a_torn_tail_is_cut(tmp_path: Path) -> None:
    keys = gaussian(N, DIM)
    with pytest.raises(KeyboardInterrupt):
        take_snapshot(Breaking(keys, 2, KeyboardInterrupt()), tmp_path / "s", BATCH)
    for name, tail in (("vectors.f32", b"\x00" * 7), ("ids.jsonl", b'8\n"hal')):
        with (tmp_path / "s" / name).open("ab") as file:
            file.write(tail)
    resumed = take_snapshot(MemoryCollection(keys), tmp_path / "s", BATCH)
    assert resumed.manifest.fingerprint == fingerprint(keys, tmp_path / "straight")


@pytest.mark.parametrize("name", ["vectors.f32", "ids.jsonl"])
@pytest.mark.parametrize("damage", ["short", "gone"])
def test_an_unfinished_copy_that_lost_keys_is_not_resumed(
    damage: str, name: str, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        take_snapshot(Breaking(gaussian(N, DIM), 3, KeyboardInterrupt()), tmp_path / "s", BATCH)
    path = tmp_path / "s" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SnapshotError, match="damaged; take the snapshot again in another"):
        take_snapshot(MemoryCollection(gaussian(N, DIM)), tmp_path / "s", BATCH)


def insert_first(collection: Moving) -> None:
    if collection.count() == N:
        collection.upsert([-1], gaussian(1, DIM, 9))


def insert_last(collection: Moving) -> None:
    if collection.count() == N:
        collection.upsert([10_000], gaussian(1, DIM, 9))


def shrink(collection: Moving) -> None:
    if collection.count() == N:
        collection.delete_last()


@pytest.mark.parametrize("change", [insert_first, insert_last, shrink])
def test_a_count_that_moved_is_told(change: Callable[[Moving], None], tmp_path: Path) -> None:
    manifest = take_snapshot(Moving(gaussian(N, DIM), change), tmp_path / "s", BATCH).manifest
    assert manifest.complete
    assert manifest.moved
    assert manifest.count_before == N
    assert manifest.count_after != N
    assert not take_snapshot(
        Moving(gaussian(N, DIM), lambda _: None), tmp_path / "still", BATCH
    ).manifest.moved


def test_a_count_that_moved_before_the_copy_was_resumed_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        take_snapshot(Breaking(gaussian(N, DIM), 3, KeyboardInterrupt()), tmp_path / "s", BATCH)
    grown = MemoryCollection(gaussian(N + 2, DIM))
    assert take_snapshot(grown, tmp_path / "s", BATCH).manifest.moved


def test_the_folder_of_another_collection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        take_snapshot(Breaking(gaussian(N, DIM), 1, KeyboardInterrupt()), tmp_path / "s", BATCH)
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    others = [
        MemoryCollection(gaussian(N, DIM), name="other"),
        MemoryCollection(gaussian(N, DIM), metric=Metric.L2),
        MemoryCollection(gaussian(N, DIM + 1)),
    ]
    for other in others:
        with pytest.raises(SnapshotError, match=r"unfinished snapshot of 'memory'.*delete it or"):
            take_snapshot(other, tmp_path / "s", BATCH)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before


def test_a_finished_snapshot_is_not_overwritten(tmp_path: Path) -> None:
    take_snapshot(MemoryCollection(gaussian(N, DIM)), tmp_path / "s")
    with pytest.raises(SnapshotError, match=r"already holds a finished snapshot; delete it or"):
        take_snapshot(MemoryCollection(gaussian(N, DIM)), tmp_path / "s")
    Snapshot.open(tmp_path / "s")


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(SnapshotError, match="name another folder"):
            take_snapshot(MemoryCollection(gaussian(N, DIM)), out)
    assert names(tmp_path) == {"thesis.tex"}
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_serves(tmp_path: Path) -> None:
    assert take_snapshot(MemoryCollection(gaussian(N, DIM)), tmp_path).manifest.count == N


def test_an_empty_collection_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="'memory' is empty; there is nothing to copy"):
        take_snapshot(MemoryCollection(gaussian(0, DIM)), tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_key_that_is_not_finite_is_named_and_can_be_mended(value: float, tmp_path: Path) -> None:
    keys = gaussian(N, DIM)
    broken = keys.copy()
    broken[13, 2] = value
    with pytest.raises(SnapshotError, match=r"Key 13 holds a NaN or infinite number; mend"):
        take_snapshot(MemoryCollection(broken), tmp_path / "s", BATCH)
    resumed = take_snapshot(MemoryCollection(keys), tmp_path / "s", BATCH)
    assert resumed.manifest.fingerprint == fingerprint(keys, tmp_path / "straight")


def test_what_is_no_snapshot_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(SnapshotError, match=r"There is no snapshot in .*run: amips snapshot"):
            Snapshot.open(path)


@pytest.mark.parametrize("name", ["vectors.f32", "ids.jsonl"])
def test_damaged_files_are_noticed(name: str, tmp_path: Path) -> None:
    take_snapshot(MemoryCollection(gaussian(N, DIM)), tmp_path)
    data = (tmp_path / name).read_bytes()
    for damaged in (data[:-1], data + b"\n", b""):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(SnapshotError, match="damaged; take the snapshot again"):
            Snapshot.open(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(SnapshotError, match=f"{name} is missing; take the snapshot again"):
        Snapshot.open(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\xff\xfe"])
def test_a_damaged_manifest_is_noticed(content: bytes, tmp_path: Path) -> None:
    take_snapshot(MemoryCollection(gaussian(N, DIM)), tmp_path)
    (tmp_path / "snapshot.json").write_bytes(content)
    with pytest.raises(SnapshotError, match=r"snapshot\.json cannot be read .*take the snapshot"):
        Snapshot.open(tmp_path)
    with pytest.raises(SnapshotError, match=r"snapshot\.json cannot be read"):
        take_snapshot(MemoryCollection(gaussian(N, DIM)), tmp_path)


def test_the_manifest_is_json_that_people_can_read(tmp_path: Path) -> None:
    take_snapshot(MemoryCollection(gaussian(N, DIM)), tmp_path)
    text = (tmp_path / "snapshot.json").read_text()
    assert json.loads(text)["count"] == N
    assert text.count("\n") > 10


def test_memory_stays_at_a_few_batches(tmp_path: Path) -> None:
    references: list[weakref.ref[FloatArray]] = []
    most = 0

    class Endless(MemoryCollection):
        def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
            nonlocal most
            for batch in super().scan(batch_size, after):
                references.append(weakref.ref(batch.vectors))
                yield batch
                del batch
                most = max(most, sum(reference() is not None for reference in references))

    take_snapshot(Endless(gaussian(400, DIM)), tmp_path / "s", BATCH)
    assert len(references) == 100
    assert most <= 2
