from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from amips_plugins import LearnedRouter
from amips_plugins.adapters.base import SearchRequest
from amips_plugins.bundle import CELLS, IDS, KNOWN_CELLS, CollectionKey
from amips_plugins.cells import Cells
from amips_plugins.errors import BundleCorrupt, BundleMismatch, InvalidInput
from amips_plugins.layout import known_cells, lay_out
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import Metric
from tests.bundles import (
    COUNT,
    DIM,
    N_CELLS,
    make_files,
    memory,
    open_bundle,
    vectors,
    write_bundle,
)
from tests.progress_recorder import Recorder


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("metric", Metric)
def test_recorded_keys_keep_their_cell_and_new_ones_follow_the_rule(
    tmp_path: Path, metric: Metric
) -> None:
    rule = Cells.from_bytes(make_files(metric)[CELLS])
    recorded = (rule.assign(vectors(), metric) + 1) % N_CELLS  # none as the rule would have it
    folder = write_bundle(
        tmp_path, metric, change=lambda files: files.update({KNOWN_CELLS: npy(recorded)})
    )
    collection, new = memory(metric), vectors(seed=8, count=20)
    collection.insert(range(1000, 1020), new)
    bundle, recorder = open_bundle(folder), Recorder()
    laid = lay_out(collection, bundle, recorder)
    assert laid is collection
    assert laid.layout() == bundle.manifest.layout
    assert (recorder.totals, recorder.done) == ([COUNT + 20], COUNT + 20)
    expected = {**dict(enumerate(recorded)), **dict(enumerate(rule.assign(new, metric), 1000))}
    for cell in range(N_CELLS):
        plan = QueryPlan(cells=np.array([[cell]]), layout=laid.layout())
        (hits,) = laid.search(SearchRequest(vectors(1, 1), k=COUNT + 20), plan)
        assert {hit.id for hit in hits} == {key for key in expected if expected[key] == cell}


def test_a_laid_out_collection_is_routed(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path))
    router = LearnedRouter(lay_out(memory(), bundle), bundle=bundle)
    assert router.search(vectors(1, 1)[0], k=3, n_probes=1).trace.mode == "route"


def test_twice_is_refused(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path))
    collection = lay_out(memory(), bundle)
    with pytest.raises(InvalidInput, match="'docs' is laid out in the cells of v1 already"):
        lay_out(collection, bundle)


def test_a_bundle_without_cells_is_refused(tmp_path: Path) -> None:
    collection = memory()
    with pytest.raises(InvalidInput, match="v1 rewrites queries and has no cells"):
        lay_out(collection, open_bundle(write_bundle(tmp_path, model="keynet")))
    assert collection.layout() is None


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("collection", {"collection": CollectionKey(database="memory", name="a", field="vector")}),
        ("metric", {"metric": Metric.L2}),
        ("dimension", {"dim": DIM + 1}),
    ],
)
def test_the_bundle_of_another_collection_is_refused(
    tmp_path: Path, what: str, changes: dict[str, Any]
) -> None:
    collection = memory()
    with pytest.raises(BundleMismatch, match=what):
        lay_out(collection, open_bundle(write_bundle(tmp_path, **changes)))
    assert collection.layout() is None


CELL = np.zeros(COUNT, dtype=np.int32)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (IDS, b""),
        (IDS, b"1\n2\n"),
        (IDS, b"[1]\n" * COUNT),
        (IDS, b"1.5\n" * COUNT),
        (IDS, b"\xff\n" * COUNT),
        (KNOWN_CELLS, b""),
        (KNOWN_CELLS, b"no array"),
        (KNOWN_CELLS, make_files()[CELLS]),
        (KNOWN_CELLS, make_files()[KNOWN_CELLS][:-1]),
        (KNOWN_CELLS, npy(CELL[:-1])),
        (KNOWN_CELLS, npy(CELL[:, None])),
        (KNOWN_CELLS, npy(CELL + 0.5)),
        (KNOWN_CELLS, npy(CELL - 1)),
        (KNOWN_CELLS, npy(CELL + N_CELLS)),
    ],
)
def test_files_that_do_not_fit_are_corrupt(tmp_path: Path, name: str, data: bytes) -> None:
    folder = write_bundle(tmp_path, change=lambda files: files.update({name: data}))
    with pytest.raises(BundleCorrupt, match="The cells of"):
        lay_out(memory(), open_bundle(folder))


def test_a_flipped_bit_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    for name in (CELLS, IDS, KNOWN_CELLS):
        folder = write_bundle(tmp_path / name)
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
        collection = memory()
        with pytest.raises(BundleCorrupt, match="checksum"):
            lay_out(collection, open_bundle(folder))
        assert collection.layout() is None


def test_ids_may_be_strings(tmp_path: Path) -> None:
    names = [f'a "quoted"\n{row}' for row in range(COUNT)]
    lines = b"".join(msgspec.json.encode(name) + b"\n" for name in names)
    folder = write_bundle(tmp_path, change=lambda files: files.update({IDS: lines}))
    assign = known_cells(open_bundle(folder))
    recorded = np.load(io.BytesIO(make_files()[KNOWN_CELLS]))
    assert assign(names, np.zeros((COUNT, DIM), dtype=np.float32)).tolist() == recorded.tolist()
