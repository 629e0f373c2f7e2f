"""How trials are asked of Qdrant: on local mode, which keeps no codes but takes the calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant.code_builds import (
    build_of,
    code_builds,
    kind_of,
    present_build,
)
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.tuning import QdrantTuning, _config
from amips_plugins.adapters.tuning import tuning_of
from amips_plugins.collection import KeyBatch, SearchRequest
from amips_plugins.errors import CollectionError
from amips_plugins.progress import no_progress
from tests.support.qdrant_data import DIM, KEYS, fill

ALL = ["vectors", "int8 codes", "4-bit codes", "2-bit codes", "binary codes"]


@pytest.fixture
def collection(monkeypatch: pytest.MonkeyPatch) -> Iterator[QdrantCollection]:
    monkeypatch.setattr("amips_plugins.adapters.qdrant.tuning._LOOK", 0.0)
    client = QdrantClient(":memory:")
    fill(client)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield QdrantCollection(client, "docs")
    client.close()


def batches() -> Iterator[KeyBatch]:
    yield KeyBatch(list(range(len(KEYS))), KEYS)


def test_local_mode_has_nothing_to_set(collection: QdrantCollection) -> None:
    assert tuning_of(collection).as_found() is None


@pytest.mark.parametrize("name", ALL)
def test_codes_are_named_as_they_are_configured(name: str) -> None:
    build = build_of(name, 64, applies=True)
    config = _config(build)
    assert kind_of(None if config is None else config.model_dump(mode="json")) == name
    assert build.knob.rescored == (name != "vectors")
    assert {one.name for one in code_builds(64, name, applies=True)} == set(ALL) - {name}


def test_codes_of_another_kind_are_named_and_not_built_anew() -> None:
    strange = {"product": {"compression": "x16"}}
    assert kind_of(strange) == "product"
    assert not build_of("product", 64, applies=True).applies
    assert kind_of({"turbo": {"bits": "bits1"}}) == "turbo"


def test_a_copy_has_the_keys_and_is_gone_whatever_happens(
    collection: QdrantCollection, tmp_path: Path
) -> None:
    tuning, client = QdrantTuning(collection), collection.client
    build = build_of("int8 codes", DIM, applies=True)
    with tuning.scratch(build, batches(), len(KEYS), tmp_path, no_progress) as copy:
        assert copy.count() == len(KEYS)
        asked = SearchRequest(KEYS[:1], 3)
        assert [hit.id for hit in copy.search(asked)[0]] == [
            hit.id for hit in collection.search(asked)[0]
        ]
    assert [one.name for one in client.get_collections().collections] == ["docs"]
    with (
        pytest.raises(KeyboardInterrupt),
        tuning.scratch(build, batches(), len(KEYS), tmp_path, no_progress),
    ):
        raise KeyboardInterrupt
    assert [one.name for one in client.get_collections().collections] == ["docs"]
    assert not any(tmp_path.iterdir())


def test_what_a_killed_run_has_left_is_removed_and_what_is_anothers_is_not(
    collection: QdrantCollection, tmp_path: Path
) -> None:
    tuning, client = QdrantTuning(collection), collection.client
    build = build_of("int8 codes", DIM, applies=True)
    size = models.VectorParams(size=2, distance=models.Distance.DOT)
    client.create_collection("docs__amips_tune", vectors_config=size)
    with (
        pytest.raises(CollectionError, match="did not make it"),
        tuning.scratch(build, batches(), len(KEYS), tmp_path, no_progress),
    ):
        pass
    assert client.collection_exists("docs__amips_tune")
    (tmp_path / "scratch-collection").write_text("docs__amips_tune")
    with tuning.scratch(build, batches(), len(KEYS), tmp_path, no_progress) as copy:
        assert copy.info.dim == DIM
    assert not client.collection_exists("docs__amips_tune")


def test_a_record_of_another_copy_does_not_make_a_collection_ours(
    collection: QdrantCollection, tmp_path: Path
) -> None:
    tuning, client = QdrantTuning(collection), collection.client
    size = models.VectorParams(size=2, distance=models.Distance.DOT)
    client.create_collection("docs__amips_tune", vectors_config=size)
    (tmp_path / "scratch-collection").write_text("other__amips_tune")
    build = build_of("int8 codes", DIM, applies=True)
    with (
        pytest.raises(CollectionError, match="did not make it"),
        tuning.scratch(build, batches(), len(KEYS), tmp_path, no_progress),
    ):
        pass
    assert client.collection_exists("docs__amips_tune")


def test_a_trial_stands_beside_the_copy_that_it_is_compared_with(
    collection: QdrantCollection, tmp_path: Path
) -> None:
    tuning, client = QdrantTuning(collection), collection.client
    first, second = (build_of(name, DIM, applies=True) for name in ("vectors", "int8 codes"))
    with (
        tuning.scratch(first, batches(), len(KEYS), tmp_path / "base", no_progress) as base,
        tuning.scratch(second, batches(), len(KEYS), tmp_path / "trial", no_progress) as copy,
    ):
        assert base.count() == copy.count() == len(KEYS)
        assert base.info.name != copy.info.name
    assert [one.name for one in client.get_collections().collections] == ["docs"]


def test_a_refused_copy_leaves_no_record_and_says_what_the_database_says(
    collection: QdrantCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Forbidden")

    for call in ("create_collection", "delete_collection"):
        monkeypatch.setattr(collection.client, call, refuse)
    tuning, build = QdrantTuning(collection), build_of("int8 codes", DIM, applies=True)
    with (
        pytest.raises(PermissionError, match="Forbidden"),
        tuning.scratch(build, batches(), len(KEYS), tmp_path, no_progress),
    ):
        pass
    assert not any(tmp_path.iterdir())


def test_the_way_back_is_the_call_that_takes_it(collection: QdrantCollection) -> None:
    tuning = QdrantTuning(collection)
    before = tuning.way_back(build_of("vectors", DIM, applies=True))
    assert "client.update_collection('docs'" in before
    assert "models.Disabled.DISABLED" in before
    codes = tuning.way_back(build_of("int8 codes", DIM, applies=True))
    spelled = codes.partition("quantization_config=")[2].rpartition(")}")[0]
    made = eval(spelled, {"models": models, **vars(models)})  # noqa: S307 - our own words
    assert isinstance(made, models.ScalarQuantization)
    product = {"product": {"compression": "x16", "always_ram": True}}
    codes = tuning.way_back(present_build(product, DIM, applies=True))
    spelled = codes.partition("quantization_config=")[2].rpartition(")}")[0]
    made = eval(spelled, {"models": models, **vars(models)})  # noqa: S307 - our own words
    assert made.model_dump(mode="json", exclude_none=True) == product


@pytest.mark.parametrize("everywhere", [True, False])
def test_codes_of_the_whole_collection_are_not_said_to_be_put_off_for_one_vector(
    collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch, *, everywhere: bool
) -> None:
    found = collection.client.get_collection("docs")
    codes = _config(build_of("int8 codes", DIM, applies=True))
    vectors = found.config.params.vectors
    assert isinstance(vectors, models.VectorParams)
    owner = found.config if everywhere else vectors
    owner.quantization_config = codes
    monkeypatch.setattr(collection.client, "get_collection", lambda _: found)
    by_name = {build.name: build for build in QdrantTuning(collection).builds()}
    assert by_name["vectors"].applies != everywhere
    assert by_name["4-bit codes"].applies


def test_the_server_is_told_of_the_codes(
    collection: QdrantCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(
        collection.client, "update_collection", lambda *args, **more: told.append((args, more))
    )
    tuning = QdrantTuning(collection)
    tuning.apply(build_of("binary codes", DIM, applies=True), no_progress)
    tuning.apply(build_of("vectors", DIM, applies=True), no_progress)
    (first, more), (_, off) = told
    assert first == ("docs",)
    assert isinstance(more["vectors_config"][""].quantization_config, models.BinaryQuantization)
    assert off["vectors_config"][""].quantization_config == models.Disabled.DISABLED
    assert np.isfinite(collection.count())
