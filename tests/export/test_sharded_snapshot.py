from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.adapters.several.collection import SeveralCollections
from amips_plugins.collection import Cursor, Id, KeyBatch
from amips_plugins.errors import DatabaseUnreachable, SnapshotError
from amips_plugins.export import parquet_keys
from amips_plugins.export.parquet_keys import KeyFile
from amips_plugins.export.sharded_snapshot import id_bounds, take_sharded_snapshot
from amips_plugins.export.snapshot import Snapshot, take_snapshot
from amips_plugins.export.train import TrainOptions, train
from amips_plugins.partitions import Partitions
from amips_plugins.vectors import FloatArray, Metric, normalise
from tests.support.progress_recorder import Recorder
from tests.support.training_data import clustered_keys, gaussian, narrow_queries

parquet = pytest.importorskip("pyarrow.parquet")

N, DIM, BATCH = 60, 3, 4
RNG = np.random.default_rng(0)


def uuids(count: int, low: int = 0, high: int = 2**62) -> list[Id]:
    numbers = RNG.choice(high - low, count, replace=False) + low
    return sorted(str(uuid.UUID(int=int(number) << 64)) for number in numbers)


IDS: dict[str, list[Id]] = {
    "integers": list(range(N)),
    "integers with a gap": [*range(N - 1), 10**15],
    "the widest integers": [-(2**63), *range(N - 2), 2**63 - 1],
    "uuids": uuids(N),
    "uuids of one time": uuids(N, 2**61, 2**61 + 10_000),
    "texts": sorted(f'key "{n}"\n' for n in range(N)),
    "integers, then uuids": [*range(N // 2), *uuids(N - N // 2)],
}


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_keys, "ROW_GROUP", 5)
    monkeypatch.setattr(parquet_keys, "_FILE", 4 * DIM * 10)  # ten keys


class Sorted(MemoryCollection):
    """A collection that holds numbers and texts, in the order of a database that has both."""

    def __init__(self, keys: FloatArray, ids: Sequence[Id] | None = None) -> None:
        super().__init__(keys)
        self._ids = list(self._ids if ids is None else ids)

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        order = [(isinstance(key, str), key) for key in self._ids]
        start = 0
        if after is not None:
            start = sum(one <= (isinstance(after, str), after) for one in order)
        for row in range(start, len(order), batch_size):
            ids = self._ids[row : row + batch_size]
            yield KeyBatch(ids, self._vectors[row : row + batch_size].copy(), ids[-1])


class Breaking(Sorted):
    """Breaks after so many batches, whoever reads them."""

    batches = 0

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        for batch in super().scan(batch_size, after):
            self.batches -= batch_size > 1  # a look for the largest id is no reading
            if self.batches < 0:
                raise DatabaseUnreachable("The database is gone.")
            yield batch


def read(snapshot: Snapshot) -> tuple[list[Id], np.ndarray]:
    return list(snapshot.ids()), snapshot.keys()[:]


@pytest.mark.parametrize("readers", [1, 2, 7])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_every_key_once_in_the_order_of_the_ids(
    ids: Sequence[Id], readers: int, tmp_path: Path
) -> None:
    collection, recorder = Sorted(gaussian(N, DIM), ids), Recorder()
    taken = take_sharded_snapshot(collection, tmp_path / "s", readers, BATCH, recorder)
    there, vectors = read(taken)
    assert there == list(ids)
    np.testing.assert_array_equal(vectors, gaussian(N, DIM))
    assert recorder.done == taken.manifest.count == N
    assert taken.ids_bytes() == take_snapshot(collection, tmp_path / "flat", BATCH).ids_bytes()
    assert len(taken.manifest.shards or []) >= 5
    shards = taken.manifest.shards or []
    assert all(0 < shard.count <= 10 + BATCH for shard in shards)
    assert sum(shard.count for shard in shards) == N


@pytest.mark.parametrize("name", ["integers", "uuids", "uuids of one time", "the widest integers"])
def test_ranges_are_ids_in_order(name: str) -> None:
    ids = IDS[name]
    bounds = id_bounds(Sorted(gaussian(N, DIM), ids), 4)
    assert bounds == sorted(bounds, key=lambda key: (isinstance(key, str), key))
    if name.startswith("uuid"):
        parts = np.diff([0, *(sum(str(one) <= str(low) for one in ids) for low in bounds), N])
        assert 5 <= parts.min() <= parts.max() <= 25


def test_rows_are_read_wherever_they_lie(tmp_path: Path) -> None:
    keys = gaussian(N, DIM)
    taken = take_sharded_snapshot(MemoryCollection(keys), tmp_path, 3, BATCH).keys()
    assert taken.shape == (N, DIM)
    for rows in (slice(3, 44), slice(0, 0), np.array([59, 0, 7, 7, 12]), np.array([], dtype=int)):
        np.testing.assert_array_equal(taken[rows], keys[rows])


@pytest.mark.parametrize("batches", range(0, 16, 3))
def test_what_was_interrupted_goes_on_and_reads_no_file_twice(batches: int, tmp_path: Path) -> None:
    collection = Breaking(gaussian(N, DIM))
    collection.batches = batches
    with pytest.raises(DatabaseUnreachable):
        take_sharded_snapshot(collection, tmp_path, 3, BATCH)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("keys-*.parquet")}
    assert not list(tmp_path.glob(".*.tmp"))
    with pytest.raises(SnapshotError, match="not finished"):
        Snapshot.open(tmp_path)
    collection.batches = 1_000
    there, vectors = read(take_sharded_snapshot(collection, tmp_path, 3, BATCH))
    assert there == list(range(N))
    np.testing.assert_array_equal(vectors, gaussian(N, DIM))
    for path, time in kept.items():
        assert path.stat().st_mtime_ns == time


@pytest.mark.parametrize("damage", ["bit", "half", "other", "gone"])
def test_a_damaged_shard_is_named_and_read_again_alone(damage: str, tmp_path: Path) -> None:
    collection = MemoryCollection(gaussian(N, DIM))
    before = take_sharded_snapshot(collection, tmp_path, 3, BATCH)
    files = sorted(tmp_path.glob("keys-*.parquet"))
    number = before.keys()[20:21].tobytes()
    hurt = next(path for path in files if number in path.read_bytes())
    others = [path.read_bytes() for path in files if path != hurt]
    data = hurt.read_bytes()
    if damage == "bit":
        at = data.index(number)
        hurt.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif damage == "half":
        hurt.write_bytes(data[: len(data) // 2])
    elif damage == "other":
        other = KeyFile(hurt, DIM + 1)
        other.add([1], gaussian(1, DIM + 1), None)
        other.done()
    else:
        hurt.unlink()
    parquet_keys._REMEMBERED.groups.clear()
    with pytest.raises(SnapshotError, match=rf"{hurt.name} is damaged or missing"):
        read(Snapshot.open(tmp_path))
    hurt.unlink(missing_ok=True)
    again = take_sharded_snapshot(collection, tmp_path, 3, BATCH)
    assert read(again)[0] == list(range(N))
    np.testing.assert_array_equal(read(again)[1], gaussian(N, DIM))
    assert again.manifest.fingerprint == before.manifest.fingerprint
    assert [path.read_bytes() for path in files if path != hurt] == others


def test_values_and_odd_folders(tmp_path: Path) -> None:
    keys, fields = gaussian(N, DIM), [{"team": n % 3} if n % 5 else {} for n in range(N)]
    collection = MemoryCollection(keys, fields=fields).partitioned(Partitions.named("team"))
    taken = take_sharded_snapshot(collection, tmp_path / "s", 2, BATCH)
    assert taken.values() == [n % 3 if n % 5 else None for n in range(N)]
    with pytest.raises(SnapshotError, match="already holds a finished snapshot"):
        take_sharded_snapshot(collection, tmp_path / "s", 2, BATCH)
    with pytest.raises(SnapshotError, match="lies in shards"):
        taken.vectors()
    broken = Breaking(keys)
    broken.batches = 2
    with pytest.raises(DatabaseUnreachable):
        take_sharded_snapshot(broken, tmp_path / "t", 1, BATCH)
    with pytest.raises(SnapshotError, match="lies in shards; run its own command again"):
        take_snapshot(MemoryCollection(keys), tmp_path / "t", BATCH)
    keys[33, 1] = np.nan
    with pytest.raises(SnapshotError, match="Key 33 holds a NaN"):
        take_sharded_snapshot(MemoryCollection(keys), tmp_path / "u", 2, BATCH)


@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.slow
def test_a_training_reads_shards_as_it_reads_one_file(
    metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_keys, "ROW_GROUP", 50)
    monkeypatch.setattr("amips_plugins.export.keys._SHARD", 200)
    monkeypatch.setattr("amips_plugins.export.keys.BLOCK", 100)
    collection = MemoryCollection(normalise(clustered_keys(900, 16)), metric=metric)
    queries = narrow_queries(300, 16)
    options = TrainOptions(model="linear", n_cells=8, epochs=1, k=5, recall=0.9)
    flat = train(take_snapshot(collection, tmp_path / "f"), queries, tmp_path / "run-f", options)
    shards = take_sharded_snapshot(collection, tmp_path / "s", 3, 70)
    cut = train(shards, queries, tmp_path / "run-s", options)
    assert cut.manifest.files == flat.manifest.files


def test_memory_is_that_of_row_groups(tmp_path: Path) -> None:
    taken = take_sharded_snapshot(MemoryCollection(gaussian(N, DIM)), tmp_path, 1, BATCH)
    for shard in taken.manifest.shards or []:
        found = parquet.ParquetFile(tmp_path / shard.file).metadata
        sizes = [found.row_group(group).num_rows for group in range(found.num_row_groups)]
        assert sizes[:-1] == [5] * (len(sizes) - 1)
        assert sizes[-1] <= 5
    assert list(itertools.islice(taken.ids(), 2)) == [0, 1]


def test_a_lost_shard_of_several_collections_is_read_again_to_its_end(tmp_path: Path) -> None:
    """Their keys are texts, which do not stand in the order of the numbers in them."""
    parts = {name: MemoryCollection(gaussian(130, DIM)) for name in "ab"}
    several = SeveralCollections(parts).partitioned(Partitions(None, tuple(parts)))
    before = take_sharded_snapshot(several, tmp_path / "s", 3, batch_size=7)
    shards = before.manifest.shards or []
    assert len(shards) > 9
    ids, vectors = read(before)
    for shard in shards[6:9]:
        (tmp_path / "s" / shard.file).unlink()
        again = take_sharded_snapshot(several, tmp_path / "s", 3, batch_size=7)
        assert read(again)[0] == ids
        np.testing.assert_array_equal(read(again)[1], vectors)
