from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest

from amips_plugins.demo.embed import load_embedder
from amips_plugins.errors import InvalidInput
from amips_plugins.vectors import FloatArray
from benchmarks.data import Source, load
from tests.support.training_data import gaussian

BEIR = Path(__file__).parent / "beir"


def write(folder: Path, keys: FloatArray, train: FloatArray, test: FloatArray) -> Path:
    folder.mkdir()
    np.save(folder / "keys.npy", keys)
    np.save(folder / "queries_train.npy", train)
    np.save(folder / "queries_test.npy", test)
    return folder


def test_a_folder_comes_out_as_unit_float32(tmp_path: Path) -> None:
    keys, train, test = gaussian(50, 6), gaussian(20, 6, 1), gaussian(10, 6, 2)
    folder = write(tmp_path / "mine", keys.astype(np.float16), train, test)
    dataset = load(Source(str(folder), tmp_path / "cache"))
    assert dataset.name == "mine"
    for array, source in ((dataset.keys, keys), (dataset.train, train), (dataset.test, test)):
        assert array.dtype == np.float32
        unit = source / np.linalg.norm(source, axis=1, keepdims=True)
        np.testing.assert_allclose(array, unit, atol=2e-3)


def test_other_data_has_another_cache(tmp_path: Path) -> None:
    arrays = gaussian(50, 6), gaussian(20, 6, 1), gaussian(10, 6, 2)
    one = load(Source(str(write(tmp_path / "a", *arrays)), tmp_path / "cache"))
    shutil.rmtree(tmp_path / "a")
    arrays[0][7, 3] += 1
    other = load(Source(str(write(tmp_path / "a", *arrays)), tmp_path / "cache"))
    assert one.cache != other.cache


def test_quick_takes_a_part_and_says_so_in_the_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", gaussian(30, 4), gaussian(8_100, 4, 1), gaussian(1_100, 4, 2))
    dataset = load(Source(str(folder), tmp_path / "cache", quick=True))
    assert dataset.name == "a (quick)"
    assert (len(dataset.keys), len(dataset.train), len(dataset.test)) == (30, 8_000, 1_000)


def test_training_queries_that_are_test_queries_are_left_out(tmp_path: Path) -> None:
    train = gaussian(20, 6, 1)
    folder = write(tmp_path / "a", gaussian(50, 6), train, train[[3, 11]])
    with pytest.warns(UserWarning, match="2 training queries of a are test queries too"):
        dataset = load(Source(str(folder), tmp_path / "cache"))
    np.testing.assert_array_equal(dataset.test[0] @ dataset.train.T < 0.9999, True)
    assert len(dataset.train) == 18


def test_a_folder_without_queries_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "keys.npy", gaussian(5, 4))
    with pytest.raises(InvalidInput, match=r"There is no .*queries_train\.npy; name a folder"):
        load(Source(str(tmp_path), tmp_path / "cache"))


def test_a_file_that_is_no_array_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", gaussian(5, 4), gaussian(5, 4), gaussian(5, 4))
    (folder / "keys.npy").write_text("keys")
    with pytest.raises(InvalidInput, match=r"keys\.npy is not a \.npy array"):
        load(Source(str(folder), tmp_path / "cache"))


def test_queries_of_another_dimension_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", gaussian(5, 4), gaussian(5, 3), gaussian(5, 4))
    with pytest.raises(InvalidInput, match="dimension 4"):
        load(Source(str(folder), tmp_path / "cache"))


@pytest.mark.slow
def test_a_beir_set_learns_from_generated_queries_and_tests_on_judged_ones(tmp_path: Path) -> None:
    dataset = load(Source("beir:toy", tmp_path / "cache", beir_root=BEIR))
    assert dataset.name == "toy"
    assert dataset.keys.shape == (8, 384)
    judged = [
        "why does the sea rise and fall",
        "what makes dough rise",
        "how do bees talk",
        "what is glass made of",
    ]
    np.testing.assert_allclose(dataset.test, load_embedder().embed(judged), atol=1e-5)
    # Of 13 generated queries one stands twice, and one is a test query in other letters.
    assert len(dataset.train) == 11
    first = (dataset.test @ dataset.keys.T).argmax(axis=1)
    assert first.tolist() == [0, 1, 4, 5]


@pytest.mark.slow
def test_a_beir_set_as_the_hub_has_it_is_the_same(tmp_path: Path) -> None:
    """Files are packed, and judgements are a dataset of their own."""
    for path in BEIR.rglob("*.jsonl"):
        packed = tmp_path / "hub" / path.relative_to(BEIR).with_name(f"{path.name}.gz")
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(gzip.compress(path.read_bytes()))
    shutil.copytree(BEIR / "toy" / "qrels", tmp_path / "hub" / "toy-qrels")
    one = load(Source("beir:toy", tmp_path / "cache", beir_root=BEIR))
    other = load(Source("beir:toy", tmp_path / "cache", beir_root=tmp_path / "hub"))
    np.testing.assert_array_equal(one.train, other.train)
    np.testing.assert_array_equal(one.test, other.test)


def test_a_beir_set_without_judgements_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BEIR, tmp_path / "beir")
    (tmp_path / "beir" / "toy" / "qrels" / "test.tsv").unlink()
    with pytest.raises(InvalidInput, match=r"There is no .*test\.tsv"):
        load(Source("beir:toy", tmp_path / "cache", beir_root=tmp_path / "beir"))


def test_a_beir_set_that_the_hub_cannot_give_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput, match="The dataset BeIR/toy cannot be fetched"):
        load(Source("beir:toy", tmp_path / "cache"))


@pytest.mark.slow
def test_pydocs_is_split_by_pair(tmp_path: Path) -> None:
    dataset = load(Source("pydocs", tmp_path / "cache", limit=150))
    assert (len(dataset.keys), len(dataset.train), len(dataset.test)) == (150, 135, 15)
    assert float((dataset.test @ dataset.train.T).max()) < 0.99999
