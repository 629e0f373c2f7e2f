"""``amips doctor``: what it finds out, what it recommends, and that it touches nothing."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.qdrant.describe import describe_qdrant
from amips_plugins.cli import doctor as cli
from amips_plugins.cli import main
from amips_plugins.collection import KeyBatch
from amips_plugins.collection.construction import Construction
from amips_plugins.doctor import diagnose as diagnosing
from amips_plugins.doctor.diagnose import diagnose
from amips_plugins.doctor.verdict import judge, judge_unseen
from amips_plugins.errors import InvalidInput
from amips_plugins.export.trial_result import SearchCost, Trial
from amips_plugins.vectors import Metric
from tests.support.bundles import laid_out as laid_out_collection
from tests.support.bundles import write_bundle
from tests.support.progress_recorder import Recorder
from tests.support.trainings import DIM, keys, queries

# The rules


def trial(**changes: Any) -> Trial:
    shares: dict[Any, float] = {"index": 0.4, "centroids": 0.4, "perfect": 0.05, "linear": 0.2}
    costs = tuple(
        SearchCost(search=name, n_cells=64, recall=recall, total=total, low=total, high=total)
        for name, total in shares.items()
        for recall in (0.9, 0.95)
    )
    found: dict[str, Any] = {
        "k": 10,
        "keys": 50_000,
        "read": 50_000,
        "train_queries": 5_000,
        "test_queries": 1_000,
        "guessed": False,
        "costs": costs,
        "ratio_low": 0.45,
        "ratio_high": 0.55,
        "learned_low": 0.45,
        "learned_high": 0.55,
        "query_nearness": 0.6,
        "key_nearness": 0.8,
    }
    return Trial(**{**found, **changes})


LISTS = Construction((), "lists", 128, 100_000)
SCAN = Construction(())


@pytest.mark.parametrize(
    ("built", "changes", "answer", "said"),
    [
        (LISTS, {}, "route", "20.0% of a full scan, its model included, and its own index 40.0%"),
        (LISTS, {}, "route", "in batches"),
        (SCAN, {}, "route", "The search now is exact"),
        (SCAN, {"learned_high": 1.01}, "route", "Plain k-means cells"),
        (LISTS, {"ratio_low": 0.9, "ratio_high": 1.1}, "leave", "within the noise"),
        (LISTS, {"ratio_low": 0.8, "ratio_high": 0.9}, "leave", "below a quarter"),
        (
            LISTS,
            {"ratio_low": 0.8, "ratio_high": 0.9, "query_nearness": 0.8},
            "leave",
            "look like the keys",
        ),
        (LISTS, {"ratio_low": 0.5, "ratio_high": 0.9}, "leave", "below a quarter"),
        (
            LISTS,
            {"ratio_low": 0.5, "ratio_high": 0.9, "test_queries": 20},
            "unclear",
            "20 test queries leave the gain anywhere from 10% to 50%",
        ),
        (LISTS, {"guessed": True}, "unclear", "--queries-log"),
        (Construction((), "graph"), {}, "unclear", "graph on disk"),
    ],
)
def test_judging_a_trial(
    built: Construction, changes: dict[str, Any], answer: str, said: str
) -> None:
    verdict = judge(built, 0.5, trial(**changes))
    assert verdict.answer == answer
    assert said in verdict.text


def test_above_break_even_a_full_scan_is_cheaper() -> None:
    assert judge(LISTS, 0.1, trial()).answer == "leave"
    assert "above 10% a full scan" in judge(LISTS, 0.1, trial()).text


@pytest.mark.parametrize(
    ("built", "count", "layout", "said"),
    [
        (Construction((), obstacle="it is what it is"), 10**6, None, "it is what it is."),
        (Construction((), worth_from=10_000), 9_999, None, "with 9,999 keys"),
        (SCAN, 10**6, "abc", "laid out in cells already (abc)"),
        (SCAN, 10**6, "abc", "amips backfill"),
    ],
)
def test_what_needs_no_trial(built: Construction, count: int, layout: str, said: str) -> None:
    verdict = judge_unseen(built, count, layout, 0.1)
    assert verdict is not None
    assert verdict.answer == "leave"
    assert said in verdict.text


def test_what_only_a_trial_can_tell() -> None:
    assert judge_unseen(Construction((), worth_from=10_000), 10_000, None, 0.0) is None


# In memory


@pytest.mark.slow
def test_a_case_that_is_worth_it() -> None:
    found = diagnose(MemoryCollection(keys()), queries(), n_cells=32)
    assert found.trial is not None
    assert found.verdict.answer == "route", found.verdict.text
    costs = {(cost.search, cost.recall): cost for cost in found.trial.costs}
    for recall in (0.9, 0.95):
        assert 0.0 < costs["perfect", recall].total < costs["centroids", recall].total
        assert 0.0 < costs["linear", recall].total < 0.5
    for cost in found.trial.costs:
        assert cost.low <= cost.total <= cost.high + 0.02
    assert costs["linear", 0.9].total < costs["linear", 0.95].total
    assert not found.trial.guessed
    assert found.trial.train_queries + found.trial.test_queries < 1_500


@pytest.mark.slow
def test_a_case_to_be_left_as_it_is() -> None:
    rng = np.random.default_rng(0)  # no clusters, in so many dimensions: nothing to route by
    everywhere = rng.standard_normal((2_000, 48)).astype(np.float32)
    asked = rng.standard_normal((3_000, 48)).astype(np.float32)
    found = diagnose(MemoryCollection(everywhere), asked, n_cells=16)
    assert found.verdict.answer == "leave", found.verdict.text
    assert found.trial is not None
    assert found.trial.ratio_low > 0.75


@pytest.mark.slow
@pytest.mark.parametrize("metric", [Metric.IP, Metric.L2])
def test_every_metric(metric: Metric) -> None:
    found = diagnose(MemoryCollection(keys(), metric=metric), queries(), n_cells=16)
    assert found.metric == str(metric)
    assert found.trial is not None
    total = {cost.search: cost.total for cost in found.trial.costs if cost.recall == 0.95}
    assert 0.0 < total["perfect"] < total["centroids"]
    assert 0.0 < total["linear"] < 0.5


@pytest.mark.slow
def test_the_same_twice() -> None:
    first, second = (diagnose(MemoryCollection(keys()), queries(), n_cells=16) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_without_queries_it_cannot_say() -> None:
    with pytest.warns(UserWarning, match="No query log"):
        found = diagnose(MemoryCollection(keys()), n_cells=16)
    assert found.trial is not None
    assert found.trial.guessed
    assert found.verdict.answer == "unclear"
    assert "guessed" in found.verdict.text


@pytest.mark.parametrize(
    ("count", "asked", "said"),
    [(1_500, 30, "30 distinct queries"), (5, 500, "5 keys"), (0, 500, "0 keys")],
)
def test_too_little_to_say(count: int, asked: int, said: str) -> None:
    few = MemoryCollection(keys()[:count].reshape(-1, DIM))
    found = diagnose(few, queries(asked), n_cells=4)
    assert found.trial is None
    assert found.verdict.answer == "unclear"
    assert found.verdict.text.startswith("Cannot say: ")
    assert said in found.verdict.text


def test_senseless_numbers() -> None:
    for cells, sample in ((1, 100), (10, 5)):
        with pytest.raises(InvalidInput, match="tell nothing"):
            diagnose(MemoryCollection(keys()), queries(), n_cells=cells, sample=sample)


class Endless(MemoryCollection):
    """Counts what is read of it."""

    read = 0

    def scan(self, batch_size: int, after: Any = None) -> Iterator[KeyBatch]:
        for batch in super().scan(batch_size, after):
            self.read += len(batch.ids)
            yield batch


@pytest.mark.slow
def test_a_sample_is_even_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosing, "_BATCH", 100)
    monkeypatch.setattr(diagnosing, "_MOST_READ", 1_000)
    many = Endless(keys())
    found = diagnose(many, queries(), n_cells=16, sample=400)
    assert many.read == 1_000
    assert found.trial is not None
    assert (found.trial.keys, found.trial.read, found.keys) == (400, 1_000, 1_500)
    shown = cli._show(found)
    assert "Estimated on 400 of 1,500 keys" in shown
    assert "the first 1,000 keys in the order of their ids" in shown
    rows = keys()
    drawn = diagnosing._draw(MemoryCollection(rows), 400, 1_000, 0, Recorder())
    places = [int(np.flatnonzero((rows == key).all(axis=1))[0]) for key in drawn]
    assert len(set(places)) == 400
    assert places == sorted(places)
    assert max(places) < 1_000
    assert abs(np.mean(places) - 500) < 60


def test_interrupted_it_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Late(Recorder):
        """Ctrl-C in the first epoch."""

        def __call__(self, title: str, total: int, done: int = 0, unit: str = "") -> Any:
            self.stop_after = 1 if title.startswith("train") else None
            return super().__call__(title, total, done, unit)

    with pytest.raises(KeyboardInterrupt):
        diagnose(MemoryCollection(keys()), queries(), n_cells=16, progress=Late())
    # torch makes a folder of its own there, if this is where a process first needs it.
    assert [one for one in tmp_path.iterdir() if "torchinductor" not in one.name] == []


def test_a_collection_with_cells(tmp_path: Path) -> None:
    collection = laid_out_collection(write_bundle(tmp_path))
    built = collection.describe()
    assert ("cells", f"layout {collection.layout()}") in built.facts
    assert any(name == "overflow" for name, _ in built.facts)
    found = diagnose(collection, queries(400)[:, :4], n_cells=4)
    assert found.verdict.answer == "leave"
    assert "amips status" in found.verdict.text


# Milvus Lite


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with docs.db, the same in Qdrant's local mode, and queries."""
    pymilvus = pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    folder = tmp_path_factory.mktemp("doctor")
    np.save(folder / "queries.npy", queries())
    client = pymilvus.MilvusClient(str(folder / "docs.db"))
    schema = client.create_schema()
    schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    client.create_collection("docs", schema=schema, index_params=index)
    rows = [{"id": row, "vector": key.tolist()} for row, key in enumerate(keys())]
    client.insert("docs", rows)
    client.flush("docs")
    client.close()
    local = QdrantClient(path=str(folder / "qdrant"))
    params = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    local.create_collection("docs", vectors_config=params)
    points = [models.PointStruct(id=row, vector=key.tolist()) for row, key in enumerate(keys(300))]
    local.upsert("docs", points)
    local.close()
    return folder


def run(*arguments: str) -> tuple[int, str, str]:
    """Run the command as the console script does."""
    out, err = [], []
    runner = CliRunner()
    with runner.isolation() as streams:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                main(["doctor", *arguments])
            code = 0
        except SystemExit as exc:
            code = int(exc.code or 0)
        out.append(streams[0].getvalue().decode())
        err.append(streams[1].getvalue().decode())
    return code, out[0], err[0]


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "LOCK"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_milvus_lite_is_worth_it(home: Path) -> None:
    before = content(home)
    uri = f"milvus://{home}/docs.db?collection=docs"
    code, out, err = run(uri, "--queries", str(home / "queries.npy"), "--cells", "32", "--json")
    assert code == 0, out + err
    found = json.loads(out)
    assert found["verdict"]["answer"] == "route"
    facts = dict(found["construction"])
    assert facts["server"] == "Milvus Lite"
    assert facts["index"].startswith("FLAT")
    assert facts["cells"] == "none"
    assert (found["keys"], found["dim"], found["metric"]) == (1_500, DIM, "cosine")
    assert "read keys" in err
    assert content(home) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "native", "lists", "answer"),
    [("IVF_FLAT", "lists", 128, "leave"), ("AUTOINDEX", "graph", None, "unclear")],
)
def test_an_index_of_milvus_lite(
    tmp_path: Path, kind: str, native: str, lists: int | None, answer: str
) -> None:
    pymilvus = pytest.importorskip("pymilvus")
    client = pymilvus.MilvusClient(str(tmp_path / "docs.db"))
    client.create_collection("docs", dimension=DIM, metric_type="IP", index_type=kind)
    rows = [{"id": row, "vector": key.tolist()} for row, key in enumerate(keys())]
    client.insert("docs", rows)
    if kind != "AUTOINDEX":
        client.release_collection("docs")
        client.drop_index("docs", "vector")
        index = client.prepare_index_params()
        index.add_index("vector", index_type=kind, metric_type="IP", params={"nlist": 32})
        client.create_index("docs", index)
    collection = MilvusCollection(client, "docs")
    built = collection.describe()
    assert (built.native, built.lists, built.obstacle) == (native, lists, "")
    assert dict(built.facts)["index"] == kind
    found = diagnose(collection, queries(), n_cells=8)
    assert found.verdict.answer == answer, found.verdict.text
    assert found.trial is not None
    assert (found.trial.cost("index", 0.95) is not None) == (lists is not None)
    client.close()


@pytest.mark.slow
def test_the_text_is_for_people(home: Path) -> None:
    uri = f"milvus://{home}/docs.db?collection=docs"
    code, out, err = run(uri, "--cells", "16")
    assert code == 4, err
    assert "index       FLAT" in out
    assert "a full scan, as now" in out
    assert "the same cells, perfect router" in out
    assert out.rstrip().splitlines()[-1].startswith("Cannot say: ")


@pytest.mark.slow
def test_qdrants_local_mode_is_left_as_it_is(home: Path) -> None:
    before = content(home / "qdrant")
    uri = f"qdrant://{home}/qdrant?collection=docs"
    asked = (uri, "--queries", str(home / "queries.npy"), "--cells", "8")
    code, out, err = run(*asked, "--memory", "0.001")
    assert code == 3, err
    assert "filters in Python" in out
    assert "of the 1 MB there are" in out
    assert content(home / "qdrant") == before


def test_errors(home: Path, tmp_path: Path) -> None:
    uri = f"milvus://{home}/docs.db?collection=docs"
    for arguments, said in (
        (["docs.db"], "is not a collection URI"),
        ([uri, "--queries", "q", "--queries-log", "l"], "Pass one of"),
        ([uri, "--queries", str(tmp_path / "no.npy")], "no.npy"),
        ([uri, "--cells", "1"], "tell nothing"),
        ([uri, "--memory", "1"], "Qdrant and Milvus servers only"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, "")
        assert said in err


def test_the_exit_codes_are_documented() -> None:
    shown = CliRunner().invoke(cli.command, ["--help"]).output
    for code in ("0  where", "3  where", "4  where", "1  for an error"):
        assert code in shown


# How a server's collection is built. A Qdrant server is no pip install away: its answers are local
# mode's, changed. ``integration_tests/test_doctor.py`` asks real servers.


def as_of_a_server(changes: dict[str, Any]) -> Construction:
    client = QdrantClient(":memory:")
    params = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    client.create_collection("docs", vectors_config=params)
    content = client.get_collection("docs").model_dump()
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    return describe_qdrant(models.CollectionInfo.model_validate(content), "", local=False)


@pytest.mark.parametrize(
    ("changes", "native", "obstacle", "notes"),
    [
        ({}, "graph", "HNSW graph in memory", 0),
        ({"indexed_vectors_count": 15_000}, "graph", "HNSW graph in memory", 1),
        ({"indexed_vectors_count": 5_000}, "scan", "", 1),
        ({"indexed_vectors_count": 0, "config.hnsw_config.m": 0}, "scan", "", 0),
        (
            {
                "config.hnsw_config.m": 0,
                "config.hnsw_config.payload_m": 16,
                "payload_schema": {"tenant": {"data_type": "keyword", "points": 20_000}},
            },
            "graph",
            "loses neighbours there without a word",
            1,
        ),
        ({"config.params.vectors.on_disk": True}, "graph", "", 0),
        ({"config.hnsw_config.on_disk": True}, "graph", "", 0),
        (
            {"config.strict_mode_config": {"enabled": True, "search_allow_exact": False}},
            "graph",
            "strict mode",
            0,
        ),
    ],
)
def test_a_qdrant_server(changes: dict[str, Any], native: str, obstacle: str, notes: int) -> None:
    built = as_of_a_server({"points_count": 20_000, "indexed_vectors_count": 20_000, **changes})
    assert built.native == native
    assert obstacle in built.obstacle
    assert bool(obstacle) == bool(built.obstacle)
    assert len(built.notes) == notes
    facts = dict(built.facts)
    assert set(facts) >= {"graph", "vectors", "quantisation", "payload", "strict mode", "segments"}
    on_disk = any(path.endswith("on_disk") for path in changes)
    assert facts["vectors"] == ("on disk" if on_disk else "in memory")
    if "strict mode" in obstacle:
        assert "search_allow_exact" in facts["strict mode"]


@pytest.mark.parametrize(("status", "waits"), [("yellow", True), ("green", False)])
def test_a_graph_that_is_being_built(status: str, waits: bool) -> None:
    changes = {"points_count": 20_000, "indexed_vectors_count": 50, "status": status}
    built = as_of_a_server(changes)
    verdict = judge_unseen(built, 20_000, None, 0.0)
    assert (verdict is not None and "Wait until" in verdict.text) == waits


@pytest.mark.parametrize(("threshold", "said"), [(10, "Optimise first: "), (10_000, "Leave it")])
def test_a_shard_that_nobody_has_optimised(tmp_path: Path, threshold: int, said: str) -> None:
    edge = pytest.importorskip("qdrant_edge")
    from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

    vectors = edge.EdgeVectorParams(size=DIM, distance=edge.Distance.Cosine)
    optimizers = edge.EdgeOptimizersConfig(indexing_threshold=threshold)
    config = edge.EdgeConfig(vectors=vectors, optimizers=optimizers)
    shard = edge.EdgeShard.create(str(tmp_path), config)
    points = [edge.Point(row, key.tolist()) for row, key in enumerate(keys(1_000))]
    shard.update(edge.UpdateOperation.upsert_points(points))
    built = QdrantEdgeCollection(shard, tmp_path).describe()
    verdict = judge_unseen(built, 1_000, None, 0.0)
    shard.close()
    assert verdict is not None
    assert verdict.text.startswith(said)


@pytest.mark.slow
def test_qdrant_edge(tmp_path: Path) -> None:
    edge = pytest.importorskip("qdrant_edge")
    from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

    vectors = edge.EdgeVectorParams(size=DIM, distance=edge.Distance.Cosine)
    shard = edge.EdgeShard.create(str(tmp_path), edge.EdgeConfig(vectors=vectors))
    points = [edge.Point(row, key.tolist()) for row, key in enumerate(keys(100))]
    shard.update(edge.UpdateOperation.upsert_points(points))
    found = diagnose(QdrantEdgeCollection(shard, tmp_path), queries(300), n_cells=4)
    shard.close()
    assert ("graph", "none") in found.construction
    assert found.verdict.answer == "leave"
    assert "with 100 keys" in found.verdict.text
