from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from amips_plugins import LearnedRouter, MemoryCollection, Registry
from amips_plugins.adapters.memory.layouts import MemoryLayouts
from amips_plugins.bundle.contents import CALIBRATION, CELLS, IDS, KNOWN_CELLS, load
from amips_plugins.bundle.loading import known_cells
from amips_plugins.cell_layout import BuildPlan, LayoutSpec
from amips_plugins.collection import CollectionKey, SearchRequest
from amips_plugins.errors import BundleCorrupt, BundleMismatch, BundleNotFound, InvalidInput
from amips_plugins.layout import backfill, lay_out, plan_layout
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.cells import Cells
from amips_plugins.plan import QueryPlan
from amips_plugins.routing.serving import serving_bundle
from amips_plugins.vectors import Metric
from tests.support.bundles import (
    COUNT,
    DIM,
    N_CELLS,
    known_file,
    make_files,
    memory,
    open_bundle,
    other_cells,
    vectors,
    write_bundle,
)
from tests.support.progress_recorder import Recorder


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
        tmp_path,
        metric,
        change=lambda files: files.update({KNOWN_CELLS: known_file(recorded, metric)}),
    )
    collection, new = memory(metric), vectors(seed=8, count=20)
    collection.upsert(range(1000, 1020), new)
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
    for refuse in (lay_out, plan_layout):
        with pytest.raises(InvalidInput, match=r"'docs' has the cells .* already"):
            refuse(collection, bundle)


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


RECORDED = np.zeros((COUNT, 2), dtype=np.int32)


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
        (KNOWN_CELLS, npy(RECORDED[:-1])),
        (KNOWN_CELLS, npy(RECORDED[:, 0])),
        (KNOWN_CELLS, npy(RECORDED[:, :1])),
        (KNOWN_CELLS, npy(RECORDED.astype(np.int64))),
        (KNOWN_CELLS, npy(RECORDED + 0.5)),
        (KNOWN_CELLS, npy(RECORDED - [[1, 0]])),
        (KNOWN_CELLS, npy(RECORDED - np.array([[1, 0]], dtype=np.int32))),
        (KNOWN_CELLS, npy(RECORDED + np.array([[N_CELLS, 0]], dtype=np.int32))),
    ],
)
def test_files_that_do_not_fit_are_corrupt(tmp_path: Path, name: str, data: bytes) -> None:
    folder = write_bundle(tmp_path, change=lambda files: files.update({name: data}))
    with pytest.raises(BundleCorrupt, match=r"cannot be read|do not fit"):
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
    recorded = np.arange(COUNT) % N_CELLS
    change: dict[str, bytes] = {IDS: lines, KNOWN_CELLS: known_file(recorded)}
    folder = write_bundle(tmp_path, change=lambda files: files.update(change))
    assign = known_cells(open_bundle(folder))
    assert assign(names, vectors()).tolist() == recorded.tolist()


def test_a_plan_says_what_would_happen_and_changes_nothing(tmp_path: Path) -> None:
    collection, bundle = memory(), open_bundle(write_bundle(tmp_path))
    plan = plan_layout(collection, bundle)
    assert plan.keys == COUNT
    assert plan.steps
    assert collection.layout() is None


class Remembers(MemoryCollection):
    """Notes the specs it is to build."""

    specs: list[LayoutSpec]

    @property
    def layouts(self) -> MemoryLayouts:
        outer = self

        class Noting(MemoryLayouts):
            def plan(self, spec: LayoutSpec) -> BuildPlan:
                outer.specs.append(spec)
                return super().plan(spec)

        return Noting(self)


def test_options_reach_the_database(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path))
    collection = Remembers(vectors(), name="docs")
    collection.specs = []
    plan_layout(collection, bundle)
    lay_out(collection, bundle, storage="field", index="auto", alias="live", work=tmp_path / "work")
    plain, chosen = collection.specs
    manifest = bundle.manifest
    for spec in (plain, chosen):
        assert (spec.layout, spec.n_cells) == (manifest.layout, manifest.n_cells)
        assert spec.version == "v1"
    assert (plain.storage, plain.index, plain.alias, plain.work) == (None, "flat", None, None)
    assert (chosen.storage, chosen.index, chosen.alias) == ("field", "auto", "live")
    assert chosen.work == tmp_path / "work"
    assert collection.layouts.status().version == "v1"


# Backfill


def test_the_overflow_gets_the_cells_of_the_rule(tmp_path: Path) -> None:
    bundle, new = open_bundle(write_bundle(tmp_path)), vectors(seed=8, count=20)
    collection = lay_out(memory(), bundle)
    collection.upsert(range(1000, 1020), new)
    assert collection.overflow() == 20
    recorder = Recorder()
    assert backfill(collection, bundle, recorder) == 20
    assert recorder.done == 20
    assert collection.overflow() == 0
    rule = Cells.from_bytes(bundle.read(CELLS)).assign(new, Metric.COSINE)
    for key, cell in zip(range(1000, 1020), rule, strict=True):
        plan = QueryPlan(cells=np.array([[cell]]), layout=collection.layout())
        (hits,) = collection.search(SearchRequest(vectors(1, 1), k=COUNT + 20), plan)
        assert key in {hit.id for hit in hits}
    assert backfill(collection, bundle) == 0


def test_backfill_refuses_what_does_not_fit(tmp_path: Path) -> None:
    bundle = open_bundle(write_bundle(tmp_path / "a"))
    with pytest.raises(InvalidInput, match="no cells to give; lay it out first"):
        backfill(memory(), bundle)
    collection = memory()
    collection.layouts.build(LayoutSpec("others", 2, lambda ids, _: np.zeros(len(ids), dtype=int)))
    with pytest.raises(InvalidInput, match=r"in the cells 'others', not in those of .* v1"):
        backfill(collection, bundle)
    with pytest.raises(BundleMismatch, match="dimension"):
        backfill(memory(), open_bundle(write_bundle(tmp_path / "b", dim=DIM + 1)))
    assert collection.layout() == "others"


# Which bundle serves


def test_the_latest_bundle_serves_where_its_cells_are(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish(write_bundle(tmp_path / "a"))
    registry.publish(write_bundle(tmp_path / "b", version="v2"))  # the same cells
    collection = memory()
    assert serving_bundle(collection, registry).manifest.version == "v2"
    lay_out(collection, open_bundle(tmp_path / "a"))
    assert serving_bundle(collection, registry).manifest.version == "v2"


def test_a_new_bundle_waits_for_its_cells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish(write_bundle(tmp_path / "a"))
    collection = lay_out(memory(), open_bundle(tmp_path / "a"))
    registry.publish(write_bundle(tmp_path / "b", version="v2", change=other_cells))
    with caplog.at_level(logging.INFO, "amips_plugins"):
        assert serving_bundle(collection, registry).manifest.version == "v1"
    assert "Bundle v1 serves 'docs' until it is laid out in the cells of the latest one, v2" in (
        caplog.text
    )
    laid = lay_out(collection, open_bundle(tmp_path / "b"))
    assert serving_bundle(laid, registry).manifest.version == "v2"


def test_a_keynet_needs_no_cells(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish(write_bundle(tmp_path / "a"))
    registry.publish(write_bundle(tmp_path / "b", version="v2", model="keynet"))
    collection = lay_out(memory(), open_bundle(tmp_path / "a"))
    assert serving_bundle(collection, registry).manifest.version == "v2"


def test_cells_that_no_bundle_knows_are_refused(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish(write_bundle(tmp_path / "a"))
    for version in ("", "v1"):
        collection = memory()
        spec = LayoutSpec("others", 2, lambda ids, _: np.zeros(len(ids), dtype=int), version)
        collection.layouts.build(spec)
        with pytest.raises(BundleMismatch, match="laid out in the cells 'others', which are not"):
            serving_bundle(collection, registry)
    collection = memory()
    spec = LayoutSpec("others", 2, lambda ids, _: np.zeros(len(ids), dtype=int), "v0")
    collection.layouts.build(spec)
    with pytest.raises(BundleNotFound):
        serving_bundle(collection, registry)


def test_cells_get_what_the_bundle_was_trained_for(tmp_path: Path) -> None:
    def with_efforts(files: dict[str, bytes]) -> None:
        whole = Calibration.from_bytes(files[CALIBRATION])
        efforts = np.full(len(whole.thresholds), 32)
        files[CALIBRATION] = replace(whole, efforts=efforts).to_bytes()

    def with_lists(files: dict[str, bytes]) -> None:
        with_efforts(files)
        whole = Calibration.from_bytes(files[CALIBRATION])
        files[CALIBRATION] = replace(whole, lists=40).to_bytes()

    collection = Remembers(vectors(), name="docs")
    collection.specs = []
    plan_layout(collection, open_bundle(write_bundle(tmp_path / "codes", change=with_lists)))
    codes = collection.specs.pop()
    assert (codes.index, codes.graphs, codes.lists) == ("ivf_sq8", False, 40)
    bundle = open_bundle(write_bundle(tmp_path / "graphs", change=with_efforts))
    plan_layout(collection, bundle)
    plan_layout(collection, bundle, index="flat")
    plan_layout(collection, open_bundle(write_bundle(tmp_path / "scans")))
    assert [(one.index, one.graphs) for one in collection.specs] == [
        ("hnsw", True),
        ("flat", True),
        ("flat", False),
    ]
    sizes = load(bundle)[CELLS].sizes
    assert collection.specs[0].sizes == tuple(sizes)
