"""A bundle serves the collection it was made for, whatever another one is called."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from amips_plugins import LearnedRouter, Registry
from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.bundle.contents import KEY_SAMPLE
from amips_plugins.bundle.identity import check_bundle
from amips_plugins.bundle.key_sample import KeySample
from amips_plugins.bundle.package import Bundle
from amips_plugins.collection import KeyBatch
from amips_plugins.errors import BundleCorrupt, BundleMismatch
from amips_plugins.layout import lay_out, plan_layout
from amips_plugins.routing.serving import Serving, follow, serve_bundle
from amips_plugins.vectors import FloatArray, Metric
from tests.support.bundles import COUNT, laid_out, memory, open_bundle, vectors, write_bundle

REFUSED = r"v1 was made for other keys than those of 'docs': of 48 keys .*; train one on a snapshot"


def stranger(seed: int = 7, count: int = COUNT, metric: Metric = Metric.COSINE) -> MemoryCollection:
    """Another collection of the same name, metric, dimension and ids."""
    return MemoryCollection(vectors(seed, count), metric=metric, name="docs")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return open_bundle(write_bundle(tmp_path_factory.mktemp("bundle")))


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("model", ["linear", "keynet"])
def test_the_collection_itself_and_no_other(tmp_path: Path, metric: Metric, model: str) -> None:
    bundle = open_bundle(write_bundle(tmp_path, metric, model=model))
    check_bundle(memory(metric), bundle)
    grown = memory(metric)
    grown.upsert(range(1000, 3000), vectors(5, 2000))
    check_bundle(grown, bundle)
    for other in (stranger(metric=metric), stranger(count=20, metric=metric)):
        with pytest.raises(BundleMismatch, match=REFUSED):
            check_bundle(other, bundle)
    empty = MemoryCollection(np.zeros((0, 4), np.float32), metric=metric, name="docs")
    with pytest.raises(BundleMismatch, match="0 are there"):
        check_bundle(empty, bundle)


def test_half_of_the_keys_may_have_changed(bundle: Bundle) -> None:
    changed = memory()
    changed.upsert(range(12), vectors(9, 12))
    changed.delete(range(12, COUNT // 2))
    check_bundle(changed, bundle)
    changed.delete([COUNT - 1])
    with pytest.raises(BundleMismatch, match="23 are there"):
        check_bundle(changed, bundle)


def test_string_ids_are_compared_as_they_are() -> None:
    written = KeySample.of(["1", 'a "b"\n'], vectors()[:2], Metric.IP).to_bytes()
    sample = KeySample.from_bytes(written)
    found = KeyBatch(['a "b"\n', "1", "x"], vectors()[[1, 0, 0]])
    assert sample.count_same(found, Metric.IP) == 2
    assert sample.count_same(KeyBatch([1], vectors()[:1]), Metric.IP) == 0


def test_rounding_on_the_way_is_no_other_key() -> None:
    many = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)
    sample = KeySample.of(range(500), many, Metric.L2)
    rounded: FloatArray = many.astype(np.float16).astype(np.float32)
    assert sample.count_same(KeyBatch(range(500), rounded), Metric.L2) == 500


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"[1]", b'[["a","b"]]', b"[[1,99999999999]]"])
def test_a_damaged_sample_is_refused(tmp_path: Path, data: bytes) -> None:
    folder = write_bundle(tmp_path, change=lambda files: files.update({KEY_SAMPLE: data}))
    with pytest.raises(BundleCorrupt, match="publish it again"):
        check_bundle(memory(), open_bundle(folder))


def test_a_stranger_is_not_laid_out(bundle: Bundle) -> None:
    other = stranger()
    for refused in (plan_layout, lay_out):
        with pytest.raises(BundleMismatch, match=REFUSED):
            refused(other, bundle)
    assert other.layout() is None


@pytest.mark.parametrize("model", ["linear", "keynet"])
def test_a_router_answers_a_stranger_natively_and_says_so(
    tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish(write_bundle(tmp_path / "bundle", model=model))
    other = stranger()
    with caplog.at_level(logging.WARNING):
        router = LearnedRouter(other, registry=registry)
    assert not router.learned
    trace = router.search(vectors(3, 1)[0], k=3).trace
    assert (trace.mode, trace.fallback) == ("native", "bundle: BundleMismatch")
    assert "made for other keys than those of 'docs'" in caplog.text
    assert LearnedRouter(memory(), registry=registry).manifest is not None


def test_a_collection_in_the_bundles_cells_was_looked_at_then(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path)
    collection = laid_out(folder)
    collection.upsert(range(COUNT), vectors(9))
    check_bundle(collection, open_bundle(folder))
    assert LearnedRouter(collection, bundle=folder).learned


def test_an_alias_that_is_moved_to_a_stranger_is_noticed(tmp_path: Path) -> None:
    class Alias(MemoryCollection):
        """Stands on its keys until it looks again."""

        def current(self) -> MemoryCollection:
            return stranger()

    bundle = open_bundle(write_bundle(tmp_path, model="keynet"))
    serving: Serving = serve_bundle(Alias(vectors(), name="docs"), bundle, 1)
    assert serving.obstacle is None
    assert follow(serving).obstacle == "bundle: BundleMismatch"
