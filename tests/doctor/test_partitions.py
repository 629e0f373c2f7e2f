"""Whether given partitions say anything of the vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.cli import main
from amips_plugins.doctor.partitions import (
    PartitionDiagnosis,
    diagnose_partitions,
    judge_partitions,
)
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Value
from tests.support import given_data


def diagnosis(of: list[Value | None] | None = None, **more: Any) -> PartitionDiagnosis:
    wanted: dict[str, Any] = {"queries": given_data.queries(), "sample": 50_000, **more}
    return diagnose_partitions(given_data.collection(of), "part", **wanted)


@pytest.fixture(scope="module")
def found() -> PartitionDiagnosis:
    return diagnosis()


def test_topical_partitions_are_worth_it(found: PartitionDiagnosis) -> None:
    assert found.verdict.answer == "route"
    assert "amips snapshot --partitions" in found.verdict.text
    assert "one graph over all keys" in found.verdict.text
    trial = found.trial
    assert trial is not None
    assert (trial.partitions, trial.keys, trial.guessed) == (10, given_data.COUNT, False)
    assert trial.ratio_high < 0.8
    searches = {(one.search, one.recall): one.searches for one in trial.costs}
    assert searches["linear", 0.95] < 0.8 * searches["largest first", 0.95]


def test_permuted_labels_say_nothing() -> None:
    values = given_data.values()
    permuted = [values[row] for row in np.random.default_rng(0).permutation(len(values))]
    said = diagnosis(permuted).verdict
    assert said.answer == "leave"
    assert said.text.startswith("Your partitions say nothing of the vectors: leave it.")


def test_verdicts(found: PartitionDiagnosis) -> None:
    trial = found.trial
    assert trial is not None
    for changes, answer, text in (
        ({"guessed": True}, "unclear", "guessed from the keys"),
        ({"overflow": 0.9}, "leave", "90% of the keys have no value"),
        ({"ratio_low": 0.8, "ratio_high": 1.1, "test_queries": 60}, "unclear", "60 test queries"),
        ({"ratio_low": 0.8, "ratio_high": 1.1}, "leave", "say nothing"),
    ):
        said = judge_partitions(msgspec.structs.replace(trial, **changes))
        assert (said.answer, text in said.text) == (answer, True)


@pytest.mark.slow
def test_a_sample_is_drawn_with_its_values() -> None:
    trial = diagnosis(sample=700).trial
    assert trial is not None
    assert (trial.keys, trial.partitions) == (700, 10)
    assert trial.overflow == pytest.approx(30 / given_data.COUNT, abs=0.02)


def test_what_cannot_be_tried_is_unclear_or_refused() -> None:
    assert "different values" in diagnosis(["one"] * given_data.COUNT).verdict.text
    small = MemoryCollection(given_data.keys()[:5], fields=[{"part": "a"}] * 5)
    assert "too few" in diagnose_partitions(small, "part", sample=10).verdict.text
    with pytest.raises(InvalidInput, match="name a field"):
        diagnose_partitions(small, "native", sample=10)


@pytest.mark.slow
def test_the_command_asks_qdrant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = QdrantClient(path=str(tmp_path / "store"))
    size = models.VectorParams(size=given_data.DIM, distance=models.Distance.COSINE)
    client.create_collection("docs", vectors_config=size)
    points = [
        models.PointStruct(id=row, vector=key, payload={} if value is None else {"part": value})
        for row, (key, value) in enumerate(
            zip(given_data.keys().tolist(), given_data.values(), strict=True)
        )
    ]
    client.upsert("docs", points)
    client.close()
    np.save(tmp_path / "queries.npy", given_data.queries())
    uri = f"qdrant://{tmp_path}/store?collection=docs"
    arguments = ["doctor", uri, "--partitions", "part", "--queries", str(tmp_path / "queries.npy")]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "largest first" in out
    assert "Worth it" in out
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out)["verdict"]["answer"] == "route"
