"""Where a router's bundle comes from, and that the native search answers without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amips_plugins import LearnedRouter, Registry
from amips_plugins.bundle.contents import CELLS, IDS, KNOWN_CELLS, MODEL
from amips_plugins.bundle.manifest import MANIFEST
from amips_plugins.collection import CollectionKey
from amips_plugins.errors import BundleCorrupt, BundleMismatch, BundleNotFound
from amips_plugins.models.cells import Cells
from amips_plugins.vectors import Metric
from tests.support.bundles import (
    DIM,
    N_CELLS,
    laid_out,
    make_files,
    memory,
    open_bundle,
    write_bundle,
)
from tests.support.routing_data import (
    QUERIES,
    assert_native,
    logged,
    publish,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def test_a_bundle_by_folder_run_or_object(folder: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "run" / "bundle")
    for bundle in (folder, str(folder), open_bundle(folder), tmp_path / "run"):
        router = LearnedRouter(laid_out(folder), bundle=bundle)
        assert router.learned
        assert router.manifest is not None
        assert router.manifest.version == "v1"
        assert router.search(QUERIES[0], k=3, n_probes=2).trace.mode == "route"


def test_the_latest_bundle_of_the_registry(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Registry(tmp_path / "registry").publish(folder)
    monkeypatch.setenv("AMIPS_REGISTRY", str(tmp_path / "registry"))
    for registry in (None, tmp_path / "registry", Registry()):
        router = LearnedRouter(laid_out(folder), registry=registry)
        assert router.search(QUERIES[0], k=3, n_probes=2).trace.mode == "route"
        assert not router.fallbacks


MISMATCHES: list[dict[str, Any]] = [
    {"collection": CollectionKey(database="milvus", name="docs", field="vector")},
    {"collection": CollectionKey(database="memory", name="other", field="vector")},
    {"collection": CollectionKey(database="memory", name="docs", field="title")},
    {"metric": Metric.L2},
    {"dim": DIM + 1},
]


@pytest.mark.parametrize("changes", MISMATCHES)
def test_an_explicit_bundle_that_mismatches_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(BundleMismatch, match="was made for"):
        LearnedRouter(memory(), bundle=write_bundle(tmp_path, **changes))


def test_an_explicit_bundle_that_is_damaged_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path)
    (folder / MODEL).write_bytes(b"other")
    with pytest.raises(BundleCorrupt):
        LearnedRouter(memory(), bundle=folder)
    with pytest.raises(BundleNotFound):
        LearnedRouter(memory(), bundle=tmp_path / "nowhere")


def test_cells_that_do_not_fit_the_manifest_are_refused(tmp_path: Path) -> None:
    def fewer(files: dict[str, bytes]) -> None:
        cells = Cells.from_bytes(files[CELLS])
        fewer_cells = Cells(cells.centroids[:-1], cells.offsets[:-1], cells.sizes[:-1])
        files[CELLS] = fewer_cells.to_bytes()

    folder = write_bundle(tmp_path, change=fewer, n_cells=N_CELLS)
    with pytest.raises(BundleCorrupt, match="do not fit"):
        LearnedRouter(memory(), bundle=folder)


# The native search answers where the model cannot


def test_without_a_bundle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    router = LearnedRouter(memory(), registry=tmp_path / "nowhere")
    assert not router.learned
    assert router.manifest is None
    assert_native(router, "bundle: BundleNotFound")
    assert_native(router, "bundle: BundleNotFound")
    assert router.fallbacks == {"bundle: BundleNotFound": 2}
    assert len(logged(caplog)) == 1
    assert "No bundle serves 'docs'" in logged(caplog)[0]


@pytest.mark.parametrize("changes", MISMATCHES)
def test_a_registry_with_the_bundle_of_another(
    tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    router = LearnedRouter(memory(), registry=publish(tmp_path, **changes))
    assert_native(router, "bundle: BundleMismatch")
    assert_native(router, "bundle: BundleMismatch")
    assert len(logged(caplog)) == 1


@pytest.mark.parametrize("name", [*make_files(), MANIFEST, "latest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "flipped"])
def test_a_registry_with_a_damaged_bundle(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = publish(tmp_path)
    (path,) = (tmp_path / "registry").rglob(name)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else bytes([data[0] ^ 1]) + data[1:])
    router = LearnedRouter(memory(), registry=registry)
    if name not in (KNOWN_CELLS, IDS):
        assert_native(router, "bundle: Bundle")
        assert len(logged(caplog)) == 1
    else:  # only laying out reads the others
        assert router.learned


class StorageError(Exception):
    """As the clients of object stores have them: no OSError."""


@pytest.mark.parametrize("failure", [PermissionError(13, "not yours"), StorageError("no access")])
def test_a_registry_that_cannot_be_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
) -> None:
    registry = publish(tmp_path)

    def refuse(_: str) -> bytes:
        raise failure

    monkeypatch.setattr(registry, "_read", refuse)
    router = LearnedRouter(memory(), registry=registry)
    assert_native(router, f"bundle: {type(failure).__name__}")
    assert len(logged(caplog)) == 1


def test_a_collection_that_is_not_laid_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    router = LearnedRouter(memory(), bundle=folder)
    assert_native(router, "cells: not laid out")
    assert_native(router, "cells: not laid out")
    assert len(logged(caplog)) == 1
    assert "cells: not laid out (run: amips layout)" in logged(caplog)[0]
    assert router.fallbacks.total() == 2
