"""The query log: a uniform sample, within its bounds, off the caller's path."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins import LearnedRouter, MemoryCollection
from amips_plugins.cli.queries import load_query_log
from amips_plugins.collection import CollectionKey
from amips_plugins.errors import InvalidInput
from amips_plugins.observe.query_log import QueryLog
from amips_plugins.observe.sample import Reservoir, Sample, SampleHeader, encode_sample, read_sample
from amips_plugins.vectors import FloatArray, Metric
from tests.support.bundles import memory
from tests.support.observed_router import numbered, observed
from tests.support.routing_data import QUERIES, logged, only

KEY = CollectionKey(database="memory", name="docs", field="vector")


def load(folder: Path, dim: int = 4) -> FloatArray:
    return load_query_log(folder, KEY, Metric.COSINE, dim)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def write(path: Path, queries: FloatArray, seen: int, **changes: Any) -> None:
    about: dict[str, Any] = {
        "format": 1,
        "collection": KEY,
        "metric": Metric.COSINE,
        "dim": queries.shape[1],
        "seen": seen,
        "started": "2026-11-22T20:00:00+00:00",
        "ended": "2026-11-22T21:00:00+00:00",
    }
    header = SampleHeader(**{**about, **changes})
    path.write_bytes(encode_sample(Sample(header, queries)))


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_every_row_is_kept_with_the_same_probability(batch: int) -> None:
    rng, kept = random.Random(1), np.zeros(200)  # noqa: S311
    rows = numbered(0, 200, 1)
    for _ in range(2000):
        reservoir = Reservoir(20, 1, rng)
        for low in range(0, 200, batch):
            reservoir.add(rows[low : low + batch])
        sample = reservoir.rows()[:, 0].astype(int)
        assert len(set(sample)) == len(reservoir) == 20
        kept[sample] += 1
    # Binomial(2000, .1): five standard deviations for each, and chi-square over all of them.
    assert abs(kept - 200).max() < 5 * np.sqrt(180)
    assert 110 < ((kept - 200) ** 2 / 180).sum() < 310


def test_a_router_logs_its_queries(tmp_path: Path) -> None:
    with QueryLog(tmp_path / "log") as log:
        router = LearnedRouter(memory(), registry="nowhere", observers=[log])
        router.search(QUERIES)
        router.search(QUERIES[0], filter=only(*range(50)))
        assert not (tmp_path / "log").exists()
        log.flush()
        (path,) = files(tmp_path / "log")
        assert len(read_sample(path).queries) == len(QUERIES) + 1
        router.search(QUERIES[1])
    router.search(QUERIES)  # closed: no longer logged
    log.close()
    assert files(tmp_path / "log") == [path]
    expected = np.concatenate([QUERIES, QUERIES[:2]])
    np.testing.assert_array_equal(load(tmp_path / "log", QUERIES.shape[1]), expected)
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


def test_the_file_is_plain_parquet_with_vectors_and_nothing_else(tmp_path: Path) -> None:
    with QueryLog(tmp_path) as log:
        log(observed(numbered(0, 3)))
    (path,) = files(tmp_path)
    table = pq.read_table(path)
    assert str(table.schema.field("query").type) == "fixed_size_list<element: float>[4]"
    assert table.column_names == ["query"]
    assert table.column("query").to_pylist() == numbered(0, 3).tolist()
    header = read_sample(path).header
    assert (header.collection, header.metric, header.dim, header.seen) == (KEY, "cosine", 4, 3)
    assert header.started <= header.ended


def test_the_queries_of_the_caller_are_copied(tmp_path: Path) -> None:
    own = numbered(0, 3)
    with QueryLog(tmp_path) as log:
        log(observed(own))
        own[:] = -1
    np.testing.assert_array_equal(load(tmp_path), numbered(0, 3))


def test_a_sample_stays_as_small_as_asked(tmp_path: Path) -> None:
    with QueryLog(tmp_path, max_queries=50) as log:
        for first in range(0, 1000, 10):
            log(observed(numbered(first, 10)))
    (path,) = files(tmp_path)
    sample = read_sample(path)
    assert (len(sample.queries), sample.header.seen) == (50, 1000)
    assert len(np.unique(sample.queries[:, 0])) == 50


@settings(max_examples=25, deadline=None)
@given(
    dim=st.integers(1, 2000),
    max_bytes=st.integers(64 * 1024, 300_000),
    counts=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.slow
def test_the_bound_in_bytes_holds(dim: int, max_bytes: int, counts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in counts:  # each as a process of its own would write
            with QueryLog(folder, max_bytes=max_bytes) as log:
                for _ in range(2):
                    log(observed(rng.standard_normal((count, dim), dtype=np.float32)))
                    log.flush()
                    assert sum(path.stat().st_size for path in files(folder)) <= max_bytes
            assert files(folder)
        loaded = load(folder, dim)
        assert 1 <= len(loaded) * dim * 4 <= max_bytes * 1.1  # compression gains little


def test_the_oldest_files_go_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for age in range(4):
        path = tmp_path / f"{age}.parquet"
        write(path, rng.standard_normal((100, 64), dtype=np.float32), 100)
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    with QueryLog(tmp_path, max_bytes=90_000) as log:
        log(observed(rng.standard_normal((100, 64), dtype=np.float32)))
    names = {path.name for path in files(tmp_path)}
    assert {"0.parquet", "1.parquet"} <= names
    assert not {"2.parquet", "3.parquet"} & names
    assert len(names) == 3


def test_the_same_sample_is_not_written_twice(tmp_path: Path) -> None:
    with QueryLog(tmp_path) as log:
        log.flush()
        assert files(tmp_path) == []
        log(observed(numbered(0, 3)))
        log.flush()
        (path,) = files(tmp_path)
        before = path.stat().st_ino
        log.flush()
        assert path.stat().st_ino == before


def test_a_thread_writes_now_and_then(tmp_path: Path) -> None:
    with QueryLog(tmp_path, flush_every=0.05) as log:
        deadline = time.monotonic() + 20
        while not files(tmp_path) and time.monotonic() < deadline:
            log(observed(numbered(0, 3)))
            time.sleep(0.01)
        assert files(tmp_path)


def test_no_search_waits_while_the_sample_is_copied(tmp_path: Path) -> None:
    with QueryLog(tmp_path) as log:
        log(observed(numbered(0, 3)))
        with log._lock:
            log(observed(numbered(3, 3)))
        log(observed(numbered(6, 3)))
    assert sorted(load(tmp_path)[:, 0]) == [0, 1, 2, 6, 7, 8]


def test_many_threads_log_at_once(tmp_path: Path) -> None:
    with QueryLog(tmp_path, max_queries=500, flush_every=0.01) as log:

        def work(first: int) -> None:
            for at in range(300):
                log(observed(numbered(first + at, 1)))

        threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (path,) = files(tmp_path)
    sample = read_sample(path)
    assert len(sample.queries) == min(500, sample.header.seen)
    assert len(np.unique(sample.queries[:, 0])) == len(sample.queries)
    assert (sample.queries == sample.queries[:, :1]).all()  # no row is half of two


def test_another_collection_is_not_mixed_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = QueryLog(tmp_path)
    first = LearnedRouter(memory(), registry="nowhere", observers=[log])
    other = MemoryCollection(np.eye(3, dtype=np.float32), name="other")
    second = LearnedRouter(other, registry="nowhere", observers=[log])
    first.search(QUERIES)
    caplog.clear()
    for _ in range(2):
        assert len(second.search([0.0, 1.0, 0.0], k=2)) == 2
    (line,) = logged(caplog)
    assert "is of collection 'docs', not 'other'; give every collection a log" in line
    log.close()
    assert len(load(tmp_path, QUERIES.shape[1])) == len(QUERIES)


def test_a_later_generation_of_the_collection_goes_on(tmp_path: Path) -> None:
    with QueryLog(tmp_path) as log:
        for name in ("docs", "docs__g2", "docs"):
            info = MemoryCollection(np.eye(4, dtype=np.float32), name=name).info
            info = replace(info, family="docs")
            log(observed(numbered(0, 2), collection=info))
    assert len(load(tmp_path)) == 6


PROCESS = """
import os, sys
import numpy as np
from amips_plugins import LearnedRouter, MemoryCollection
from amips_plugins.observe.query_log import QueryLog
log = QueryLog(sys.argv[1], flush_every=None)
collection = MemoryCollection(np.eye(4, dtype=np.float32), name="docs")
router = LearnedRouter(collection, registry="nowhere", refresh=None, observers=[log])
router.search(np.full(4, 1.0), k=2)
child = os.fork()
router.search(np.full(4, 3.0 if child else 2.0), k=2)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
def test_processes_and_their_forks_write_files_of_their_own_when_they_end(tmp_path: Path) -> None:
    for _ in range(2):
        done = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-c", PROCESS, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert len(files(tmp_path)) == 4
    assert sorted(load(tmp_path)[:, 0]) == [1, 1, 2, 2, 3, 3]


def test_a_folder_that_cannot_be_written_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "log").write_text("a file")
    log = QueryLog(tmp_path / "log", flush_every=None)
    log(observed(numbered(0, 1)))
    with pytest.raises(OSError, match="log"):
        log.flush()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            log._flush_quietly()
    assert ["cannot be written" in line for line in logged(caplog)] == [True]
    (tmp_path / "log").unlink()
    log._flush_quietly()
    assert len(load(tmp_path / "log")) == 1
    (tmp_path / "log").rename(tmp_path / "away")
    (tmp_path / "log").write_text("a file")
    log(observed(numbered(1, 1)))
    log._flush_quietly()
    assert len(logged(caplog)) == 2  # news again
    (tmp_path / "log").unlink()
    log.close()
    assert len(load(tmp_path / "log")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_queries": 0}, "keeps nothing; pass 1 or more"),
        ({"max_bytes": 1000}, "holds nothing; pass 65536 or more"),
        ({"flush_every": 0}, "pass seconds above 0, or None"),
        ({"flush_every": float("nan")}, "pass seconds above 0, or None"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(
    arguments: dict[str, float], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=message):
        QueryLog(tmp_path, **arguments)  # type: ignore[arg-type]


def test_too_few_bytes_for_one_query_are_refused(tmp_path: Path) -> None:
    log = QueryLog(tmp_path, max_bytes=65_536)
    with pytest.raises(InvalidInput, match="holds no query of 9000 dimensions"):
        log(observed(numbered(0, 1, 9000)))
    log.close()
    assert files(tmp_path) == []


def test_files_count_by_what_they_have_seen(tmp_path: Path) -> None:
    write(tmp_path / "busy.parquet", numbered(0, 1000), 10_000)
    write(tmp_path / "quiet.parquet", numbered(50_000, 500), 500)
    write(tmp_path / "half.parquet", numbered(70_000, 800), 2_000)
    write(tmp_path / "new.parquet", numbered(90_000, 0), 0)
    numbers = load(tmp_path)[:, 0]
    assert len(np.unique(numbers)) == len(numbers)
    assert np.histogram(numbers, [0, 50_000, 70_000, 90_000])[0].tolist() == [1000, 50, 200]
    np.testing.assert_array_equal(load(tmp_path)[:, 0], numbers)  # the same at every reading
    one = load(tmp_path / "quiet.parquet")
    np.testing.assert_array_equal(one, numbered(50_000, 500))


def test_many_small_files_keep_their_weight(tmp_path: Path) -> None:
    write(tmp_path / "busy.parquet", numbered(0, 1000), 100_000)
    for at in range(400):
        write(tmp_path / f"small-{at}.parquet", numbered(10_000 + at, 25), 25)
    # A file of 25 gives a quarter of a query on average: 100 of all of them, give or take 9.
    assert 60 < len(load(tmp_path)) - 1000 < 140


def test_a_log_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    other = CollectionKey(database="memory", name="other", field="vector")
    for changes, message in (
        (
            {"collection": other},
            "is of collection memory/other/vector, the snapshot of memory/docs",
        ),
        ({"metric": Metric.L2}, "is of metric l2, the snapshot of cosine"),
    ):
        write(path, numbered(0, 3), 3, **changes)
        with pytest.raises(InvalidInput, match=message):
            load(tmp_path)
    write(path, numbered(0, 3, 5), 3)
    with pytest.raises(InvalidInput, match="is of dimension 5, the snapshot of 4; pass the log"):
        load(tmp_path)


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    for missing in (tmp_path, path, tmp_path / "nowhere"):
        with pytest.raises(InvalidInput, match=r"There is no query log .*; pass the folder"):
            load(missing)
    table = pq.read_table  # a file of another program
    path.write_bytes(b"no parquet at all")
    with pytest.raises(InvalidInput, match="is no log of queries"):
        load(tmp_path)
    write(path, numbered(0, 3), 3)
    pq.write_table(table(path).replace_schema_metadata({}), path)
    with pytest.raises(InvalidInput, match="is no log of queries"):
        load(tmp_path)
    write(path, numbered(0, 3), 3, format=2)
    with pytest.raises(InvalidInput, match="of format 2, this version of amips-plugins reads 1"):
        load(tmp_path)
    write(path, numbered(0, 3), 2)
    with pytest.raises(InvalidInput, match="does not hold what its header says"):
        load(tmp_path)
    write(path, numbered(0, 0), 0)
    with pytest.raises(InvalidInput, match="holds no query yet"):
        load(tmp_path)
    write(path, np.full((3, 4), np.nan, dtype=np.float32), 3)
    with pytest.raises(InvalidInput, match="Query 0 holds a NaN"):
        load(tmp_path)
    path.write_bytes(b"")
    path.chmod(0)
    with pytest.raises(InvalidInput, match=r"cannot be read|is no log"):
        load(tmp_path)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 10_000), flip=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_file_is_refused_or_read_right(at: int, flip: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "q.parquet"
        write(path, numbered(0, 50), 50)
        data = bytearray(path.read_bytes())
        at %= len(data)
        data[at] ^= flip
        path.write_bytes(data[:at] if cut else data)
        try:
            read = load(path)
        except InvalidInput:
            return
        assert set(read[:, 0]) <= set(range(50))  # the header's counts may differ
        assert (read == read[:, :1]).all()
