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
from amips_plugins.adapters.several.collection import SeveralCollections
from amips_plugins.cli import main
from amips_plugins.collection.construction import Construction
from amips_plugins.doctor.partitions import (
    PartitionDiagnosis,
    diagnose_partitions,
    judge_partitions,
)
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions, Value
from tests.support import given_data, several_data


def diagnosis(of: list[Value | None] | None = None, **more: Any) -> PartitionDiagnosis:
    wanted: dict[str, Any] = {"queries": given_data.queries(), "sample": 50_000, **more}
    return diagnose_partitions(given_data.collection(of), "part", **wanted)


@pytest.fixture(scope="module")
def found() -> PartitionDiagnosis:
    return diagnosis()


def test_topical_partitions_are_worth_it(found: PartitionDiagnosis) -> None:
    assert found.verdict.answer == "route"
    assert "amips snapshot --partitions" in found.verdict.text
    assert found.verdict.text.startswith("One graph over all keys reaches recall@10 0.95 in a")
    trial = found.trial
    assert trial is not None
    assert (trial.partitions, trial.keys, trial.guessed) == (10, given_data.COUNT, False)
    assert trial.ratio_high < 0.8
    searches = {(one.search, one.recall): one.searches for one in trial.costs}
    assert searches["linear", 0.95] < 0.8 * searches["largest first", 0.95]
    graph = [one for one in trial.costs if one.search == "one graph"]
    assert [(one.recall, one.searches) for one in graph] == [(0.90, 1.0), (0.95, 1.0)]
    assert 0 < graph[0].keys <= graph[1].keys < 0.5


def test_permuted_labels_say_nothing() -> None:
    values = given_data.values()
    permuted = [values[row] for row in np.random.default_rng(0).permutation(len(values))]
    said = diagnosis(permuted).verdict
    assert said.answer == "leave"
    assert "Your partitions say nothing of the vectors: leave it." in said.text


class OneGraph(MemoryCollection):
    """Says that a graph over all keys answers."""

    def describe(self) -> Construction:
        return Construction((), "graph")

    def partitioned(self, partitions: Partitions | None) -> MemoryCollection:
        seen = super().partitioned(partitions)
        seen.break_even = 0.3
        return seen


def test_where_one_graph_answers_there_is_nothing_to_choose() -> None:
    fields = [{} if value is None else {"part": value} for value in given_data.values()]
    one = OneGraph(given_data.keys(), name="docs", fields=fields)
    said = diagnose_partitions(one, "part", given_data.queries(), sample=50_000).verdict
    assert said.answer == "leave"
    assert "follows a graph over all keys already" in said.text


def test_a_graph_that_does_not_get_there_has_no_figure(found: PartitionDiagnosis) -> None:
    trial = found.trial
    assert trial is not None
    costs = tuple(one for one in trial.costs if one.search != "one graph")
    said = judge_partitions(msgspec.structs.replace(trial, costs=costs))
    assert said.text.startswith("Worth it where every partition is a search of its own")


def test_several_collections_are_partitions_without_an_option(found: PartitionDiagnosis) -> None:
    assert found.trial is not None
    said = judge_partitions(found.trial, several=True)
    assert "Go on with amips snapshot, train, publish." in said.text


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
def test_several_collections_are_partitions() -> None:
    members = several_data.collections()
    several = SeveralCollections(members, name="docs")
    found = diagnose_partitions(several, "native", given_data.queries(), sample=50_000)
    assert (found.collection, found.field, found.verdict.answer) == ("docs", None, "route")
    assert found.verdict.text.startswith("One graph over all keys")
    assert found.trial is not None
    assert (found.trial.partitions, found.trial.overflow) == (given_data.PARTS, 0.0)
    rng = np.random.default_rng(0)
    parts = np.array_split(rng.permutation(given_data.COUNT), given_data.PARTS)
    mixed = {str(n): MemoryCollection(given_data.keys()[rows]) for n, rows in enumerate(parts)}
    several = SeveralCollections(mixed, name="docs")
    said = diagnose_partitions(several, "native", given_data.queries(), sample=50_000).verdict
    assert said.answer == "leave"
    assert "Your partitions say nothing of the vectors: leave it." in said.text


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
