"""Files that are cut, damaged, foreign or in a store that fails; a disk that fills up."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter, connect
from amips_plugins.adapters.cell_file import writing
from amips_plugins.adapters.cell_file.collection import CellFileCollection
from amips_plugins.adapters.cell_file.log import log_of
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import CollectionKey, Failure, SearchRequest, collection_key
from amips_plugins.errors import (
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    InvalidInput,
)
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import QueryPlan
from tests.adapters.cell_file.made import (
    COUNT,
    N_CELLS,
    ORIGIN,
    FlakyStore,
    clustered,
    failing,
    queries,
    slow,
    write,
)

PLAN = QueryPlan(cells=np.array([[0, 3, 7]]), layout="abc")
ONE = SearchRequest(queries(1), k=10)


def ids(collection: Any, plan: QueryPlan = PLAN) -> list[Any]:
    return [hit.id for hit in collection.search(ONE, plan)[0]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    FlakyStore.reset()
    return write(tmp_path / "docs.cells")


def test_a_file_that_is_none_or_cut_short_is_refused(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    for size in (0, 3, 100, 4095, 4096, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CollectionError, match="cut short"):
            CellFileCollection(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CollectionError, match="damaged"):
        CellFileCollection(path)
    (tmp_path / "text").write_text("These are no keys. " * 1000)
    with pytest.raises(CollectionError, match="no cell file"):
        CellFileCollection(tmp_path / "text")
    with pytest.raises(CollectionNotFound, match="amips cell-file"):
        CellFileCollection(tmp_path / "nowhere")


def test_another_byte_order_and_another_format(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    for place, number, says in (
        (8, struct.pack(">I", 0x01020304), "another byte order"),
        (12, struct.pack("<I", 1), "has format 1"),
    ):
        changed = whole.copy()
        changed[place : place + 4] = number
        path.write_bytes(changed)
        with pytest.raises(CollectionError, match=says):
            CellFileCollection(path)


def test_a_file_that_grows_short_while_it_is_open(path: Path) -> None:
    collection = CellFileCollection(path)
    os.truncate(path, 10_000)
    with pytest.raises(CollectionError, match="ended too early"):
        ids(collection)


def test_every_damaged_byte_that_is_read_is_noticed(path: Path) -> None:
    whole, sound = path.read_bytes(), CellFileCollection(path)
    header = sound._state.file.header
    rng = np.random.default_rng(1)
    places = [*rng.integers(60, 400, 4), *rng.integers(4096, len(whole), 30)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x40
        path.write_bytes(damaged)
        parts = [n for n, s in header.sections.items() if s.offset <= place < s.offset + s.length]
        with pytest.raises(CollectionError, match="damaged"):
            read_all(path, index=parts == ["index"])


def read_all(path: Path, *, index: bool) -> None:
    opened = CellFileCollection(path)
    if index:
        opened.fetch([1])
    opened.search(SearchRequest(queries(3), k=5))  # all codes
    opened.exact(SearchRequest(queries(3), k=5))  # all rows


def test_a_file_of_another_collection(path: Path) -> None:
    with connect(f"cells://{path}?collection=docs") as collection:
        assert collection_key(collection.info) == ORIGIN
        assert collection.info.database == "cell-file"
    with pytest.raises(CollectionNotFound, match="'docs', not of 'others'"):
        connect(f"cells://{path}?collection=others")
    with pytest.raises(CollectionNotFound, match="vector field"):
        connect(f"cells://{path}?field=title")
    # Another collection's file at the same place: a log of keys is never taken for its own.
    collection = connect(f"cells://{path}")
    collection.upsert([COUNT], clustered()[0][:1])
    write(path, collection=CollectionKey(database="qdrant", name="others", field=""))
    assert collection.count() == COUNT + 1
    now = collection.current()
    assert (now.info.name, now.count()) == ("others", COUNT)


def test_a_full_disk_replaces_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, collection = path.read_bytes(), CellFileCollection(path)
    right = ids(collection)
    put, written = writing._put, [0]

    def full(file: int, data: bytes, offset: int) -> None:
        written[0] += len(data)
        if written[0] > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(file, data, offset)

    monkeypatch.setattr(writing, "_put", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, bits=8)
    collection.upsert([COUNT], clustered()[0][:1])
    spec = LayoutSpec("def", 2, lambda names, _: np.array(names) % 2)
    with pytest.raises(OSError, match="No space left"):
        collection.layouts.build(spec)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp")) + list(path.parent.glob(".*.tmp"))
    again = CellFileCollection(path)
    assert (again.count(), again.layout()) == (COUNT + 1, "abc")
    assert set(ids(again)) <= {*right, COUNT}


WRITES = """
import sys
from pathlib import Path
from amips_plugins.cli import main
from amips_plugins.adapters.cell_file.collection import CellFileCollection
from tests.adapters.cell_file.made import write

path = Path(sys.argv[1]) / "docs.cells"
write(path)
before = path.read_bytes()
try:
    write(path, bits=8)
except OSError as exc:
    print(exc.strerror)
assert path.read_bytes() == before
assert [one.name for one in path.parent.iterdir() if one.name.endswith(".tmp")] == []
print(CellFileCollection(path).count())
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full_replaces_nothing(path: Path, tmp_path: Path) -> None:
    """A file system with room for one file and a half, where this user may make one."""
    mount = tmp_path / "small"
    mount.mkdir()
    room = 3 * path.stat().st_size // 2
    inside = f'mount -t tmpfs -o size={room} tmpfs "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", inside, "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("no file system of one's own can be made here")
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [*command, str(mount), sys.executable, WRITES],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["No space left on device", str(COUNT)]


def test_a_log_that_was_cut_short_loses_only_what_was_not_acknowledged(path: Path) -> None:
    collection, keys = CellFileCollection(path), clustered()[0]
    for number in range(3):
        collection.upsert([COUNT + number], keys[number : number + 1])
    log = log_of(path, collection._state.file.header.identity)
    log.write_bytes(log.read_bytes()[:-1])
    again = CellFileCollection(path)
    assert (again.count(), again.overflow()) == (COUNT + 2, 2)
    again.delete([COUNT])
    assert CellFileCollection(path).count() == COUNT + 1


def test_keys_written_while_somebody_writes_the_file_anew(path: Path) -> None:
    mine, keys = CellFileCollection(path), clustered()[0]
    mine.upsert([COUNT], keys[:1], cells=np.array([3]))
    other = CellFileCollection(path)

    def assign(names: Any, _: Any) -> Any:
        if COUNT + 1 not in mine._state.recent.written:
            mine.upsert([COUNT + 1], keys[1:2], cells=np.array([4]))
            mine.count()
        return np.array(names) % 2

    built = other.layouts.build(LayoutSpec("def", 2, assign))
    assert (built.count(), built.overflow()) == (COUNT + 2, 1)  # written during: of no cell there
    mine.upsert([COUNT + 2], keys[2:3], cells=np.array([4]))  # into the file that serves now
    assert (built.count(), built.overflow()) == (COUNT + 3, 2)
    assert mine.current().count() == COUNT + 3
    with pytest.raises(CollectionError, match="written anew by somebody else"):
        mine.layouts.build(LayoutSpec("ghi", 2, lambda names, _: np.array(names) % 2))


# --- in a store ------------------------------------------------------------------------------


def stored(path: Path, timeout: float = 30.0) -> CellFileCollection:
    return CellFileCollection(f"flaky://{path}", timeout)


def test_a_store_answers_as_a_disk_does(path: Path) -> None:
    collection = connect(f"cells+flaky://{path}")
    assert ids(collection) == ids(CellFileCollection(path))
    assert collection.current() is collection
    shutil.copy(write(path.with_name("other"), version="v2"), path)
    assert collection.current() is not collection
    for work in (
        lambda: collection.upsert([1], clustered()[0][:1]),
        lambda: collection.delete([1]),
        lambda: collection.layouts.backfill(lambda names, _: np.array(names) % 2),
        lambda: collection.layouts.build(LayoutSpec("d", 2, lambda names, _: np.array(names) % 2)),
    ):
        with pytest.raises(InvalidInput, match="only read"):
            work()


def test_a_search_takes_two_rounds(path: Path) -> None:
    collection = stored(path)
    together, left = threading.Barrier(N_CELLS), [N_CELLS]

    def meet() -> None:
        if left[0] > 0:  # the codes; what is read of vectors comes after
            together.wait(30)
            left[0] = 0

    FlakyStore.reset(meet)
    found = collection.search(SearchRequest(queries(8), k=10))  # every cell
    assert len(found) == 8
    assert FlakyStore.most >= N_CELLS
    assert N_CELLS < FlakyStore.reads <= N_CELLS + 8 * 40


def test_a_store_that_fails_midway_is_asked_again(path: Path) -> None:
    collection = stored(path)
    right = ids(collection)
    FlakyStore.reset(failing(7))
    assert ids(collection) == right


@pytest.mark.slow
def test_a_store_that_goes_on_failing_is_said_to_in_time(path: Path) -> None:
    collection = stored(path)
    for before, says in ((failing(10**9), "reset by peer"), (slow(5.0), "no answer")):
        FlakyStore.reset(before)
        started = time.monotonic()
        with pytest.raises(DatabaseUnreachable, match=says) as caught:
            collection.search(SearchRequest(queries(1), k=10, timeout=0.4), PLAN)
        assert time.monotonic() - started < 2.0
        assert collection.failure(caught.value) is Failure.OUTAGE
    FlakyStore.reset(failing(10**9))
    with pytest.raises(DatabaseUnreachable):
        LearnedRouter(collection, hook=NativeHook()).search(queries(1)[0], k=10, timeout=0.3)
    FlakyStore.reset()
    assert ids(collection)


def test_a_store_without_the_file(tmp_path: Path) -> None:
    with pytest.raises(CollectionNotFound, match="flaky://"):
        stored(tmp_path / "nowhere", 0.2)
    for uri, says in (
        ("cells://host/docs.cells", "on this machine"),
        ("cells://", "on this machine"),
        ("cells:///docs.cells?db=x", "Unknown option"),
        ("cells+s3://key:secret@bucket/docs.cells", "Credentials"),
        ("cells+nosuchstore://bucket/docs.cells", "cannot be opened"),
    ):
        with pytest.raises(InvalidInput, match=says) as caught:
            connect(uri)
        assert "secret" not in str(caught.value)


def test_what_a_killed_writer_left_is_removed_and_what_another_writes_is_not(path: Path) -> None:
    left, busy = (path.with_name(f".{path.name}.{part * 16}.tmp") for part in "ab")
    others = path.with_name(f".{path.name}.tmp")
    for one in (left, busy, others):
        one.write_bytes(b"begun")
    with busy.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write(path)
        assert [one.exists() for one in (left, busy, others)] == [False, True, True]
    both = [CellFileCollection(path) for _ in range(2)]
    both[0].upsert([COUNT], clustered()[0][:1])

    def assign(_: Any, vectors: Any) -> Any:
        assert both[1].layouts.backfill(lambda names, _: np.zeros(len(names), dtype=np.int64)) == 1
        return np.zeros(len(vectors), dtype=np.int64)

    with pytest.raises(CollectionError, match="written anew by somebody else"):
        both[0].layouts.backfill(assign)
    assert CellFileCollection(path).count() == COUNT + 1
    assert not busy.exists()
