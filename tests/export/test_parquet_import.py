from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.errors import SnapshotError
from amips_plugins.export.parquet_import import Columns, import_parquet
from amips_plugins.export.snapshot import Snapshot
from tests.support.training_data import gaussian

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

N, DIM = 40, 3
KEYS = gaussian(N, DIM)
COLLECTION = MemoryCollection(KEYS)


def vectors(kind: str, keys: Any = KEYS) -> Any:
    numbers = np.asarray(keys)
    if kind == "fixed float16":
        flat = pa.array(numbers.astype(np.float16).ravel())
        return pa.FixedSizeListArray.from_arrays(flat, DIM)
    if kind == "fixed float32":
        return pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), DIM)
    item = pa.float64() if "64" in kind else pa.float32()
    return pa.array(numbers.tolist(), pa.large_list(item) if "large" in kind else pa.list_(item))


def write(path: Path, ids: Any = None, found: Any = None, **more: Any) -> Path:
    table = {"key": range(N) if ids is None else ids}
    table["embedding"] = vectors("fixed float32") if found is None else found
    pq.write_table(pa.table(table | more), path)
    return path


def taken(dataset: Path | str, out: Path, **more: Any) -> Snapshot:
    columns = Columns("key", "embedding")
    return import_parquet(COLLECTION, str(dataset), out, columns, batch_size=7, **more)


@pytest.mark.parametrize("kind", ["fixed float32", "fixed float16", "list", "large list 64"])
@pytest.mark.parametrize("ids", [range(N), [f"key {n}" for n in range(N)]], ids=["int", "text"])
def test_a_file_is_taken_as_it_is(kind: str, ids: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", list(ids), vectors(kind), other=["x"] * N)
    snapshot = taken(tmp_path / "a.parquet", tmp_path / "s")
    assert list(snapshot.ids()) == list(ids)
    wanted = KEYS.astype(np.float16).astype(np.float32) if "16" in kind else KEYS
    np.testing.assert_array_equal(snapshot.keys()[:], wanted)
    assert not snapshot.manifest.moved
    assert snapshot.manifest.collection.name == COLLECTION.info.name


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    """Files of several types, each read as what it is: in float16 70,000 would be infinite."""
    large = KEYS.copy()
    large[0, 0] = 70_000
    data = tmp_path / "data" / "deep"
    data.mkdir(parents=True)
    write(data / "1.parquet", range(N), vectors("fixed float16"))
    write(data / "2.parquet", range(N, 2 * N), vectors("fixed float32", large))
    snapshot = taken(f"file://{tmp_path}/data", tmp_path / "s")
    assert list(snapshot.ids()) == list(range(2 * N))
    assert snapshot.keys()[N : N + 1][0, 0] == 70_000
    assert snapshot.manifest.moved  # the collection has half as many


MISSING = [None, *KEYS[1:].tolist()]
SHORT = [*KEYS[:-1].tolist(), [1.0]]
HOLE = [[1.0, None, 2.0], *KEYS[1:].tolist()]
NAN = [*KEYS[:4].tolist(), [1.0, float("nan"), 0.0], *KEYS[5:].tolist()]
REFUSED = {
    "no vector": ({"found": pa.array(MISSING, pa.list_(pa.float32()))}, "Row 0 .* has no vector"),
    "short": ({"found": pa.array(SHORT)}, f"Row {N - 1} .* has a vector of dimension 1"),
    "no number": ({"found": pa.array(HOLE)}, "lacks a number"),
    "nan": ({"found": pa.array(NAN)}, "Key 4 holds a NaN"),
    "other dimension": (
        {"found": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4 * N, np.float32)), 4)},
        "have dimension 4, and the collection's have 3",
    ),
    "bytes": ({"found": pa.array([[1, 2, 3]] * N, pa.list_(pa.uint8()))}, "lists of floating"),
    "no id": ({"ids": [*range(N - 1), None]}, f"Row {N - 1} .* has no id"),
    "odd ids": ({"ids": [0.5] * N}, "ids are whole numbers or texts"),
}


@pytest.mark.parametrize(("about", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_key_is_refused(about: dict[str, Any], match: str, tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", **about)
    with pytest.raises(SnapshotError, match=match):
        taken(tmp_path / "a.parquet", tmp_path / "s")
    with pytest.raises(SnapshotError):
        Snapshot.open(tmp_path / "s")


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    with pytest.raises(SnapshotError, match=r"has no column 'id', but 'key', 'embedding'"):
        import_parquet(COLLECTION, str(tmp_path / "a.parquet"), tmp_path / "s")
    with pytest.raises(SnapshotError, match="There is no Parquet file"):
        taken(tmp_path / "b.parquet", tmp_path / "s")
    with pytest.raises(SnapshotError, match="cannot be read"):
        taken("nonsense://b.parquet", tmp_path / "s")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(SnapshotError, match=r"c\.parquet cannot be read as Parquet"):
        taken(tmp_path / "c.parquet", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_an_interrupted_copy_goes_on_with_the_next_file(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for part in range(3):
        write(data / f"{part}.parquet", range(part * N, part * N + N))
    whole = (data / "1.parquet").read_bytes()
    write(data / "1.parquet", range(N, 2 * N), pa.array(NAN))
    with pytest.raises(SnapshotError, match="NaN"):
        taken(data, tmp_path / "s")
    first = tmp_path / "s" / "keys-00000.parquet"
    time = first.stat().st_mtime_ns
    (data / "1.parquet").write_bytes(whole)
    snapshot = taken(data, tmp_path / "s")
    assert list(snapshot.ids()) == list(range(3 * N))
    assert first.stat().st_mtime_ns == time
    first.unlink()
    assert list(taken(data, tmp_path / "s").ids()) == list(range(3 * N))
    write(data / "3.parquet")
    first.unlink(missing_ok=True)
    (tmp_path / "s" / (snapshot.manifest.shards or [])[1].file).unlink()
    with pytest.raises(SnapshotError, match="of other files"):
        taken(data, tmp_path / "s")


def test_files_without_a_row_keep_no_copy_from_going_on(tmp_path: Path) -> None:
    """As other programs write them, in a folder whose name could be taken for a pattern."""
    data = tmp_path / "data [1]"
    data.mkdir()
    none = pa.array([], pa.list_(pa.float32()))
    write(data / "0.parquet", pa.array([], pa.int64()), none)
    write(data / "1.parquet", range(N))
    write(data / "2.parquet", range(N, 2 * N), pa.array(NAN))
    with pytest.raises(SnapshotError, match="NaN"):
        taken(data, tmp_path / "s")
    write(data / "2.parquet", range(N, 2 * N))
    assert list(taken(data, tmp_path / "s").ids()) == list(range(2 * N))
    (data / "1.parquet").unlink()
    (data / "2.parquet").unlink()
    with pytest.raises(SnapshotError, match="holds no keys"):
        taken(data, tmp_path / "t")
