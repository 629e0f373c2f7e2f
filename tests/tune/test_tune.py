"""From a collection to held settings, on real engines: what is measured, done, and left alone."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from amips_plugins import LearnedRouter, MemoryCollection, QueryLog, Registry, connect, route
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.tuning import MilvusTuning
from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection
from amips_plugins.adapters.qdrant_edge.tuning import EdgeTuning
from amips_plugins.cli import main
from amips_plugins.collection import Collection, Failure, SearchRequest, collection_key
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.health.recall import recall_at_k
from amips_plugins.models.tuned import EffortParameter
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.tune.apply import apply_choice, settled
from amips_plugins.tune.measuring import effort_curve, exact_truth
from amips_plugins.tune.recalls import EffortCurve
from amips_plugins.tune.rows import FOUND, NATIVE_ROW, Choice
from amips_plugins.tune.run import Measured, NothingToTune, TuneOptions, measure
from amips_plugins.tune.trials import alone
from amips_plugins.tune.untried import CELLS_ROW, KEYNET_ROW
from amips_plugins.tuning import GRAPH_EFFORTS, Build, Knob
from tests.support import edge_graph as graph
from tests.support.bundles import write_bundle
from tests.support.progress_recorder import Recorder
from tests.support.qdrant_data import fill

OPTIONS = TuneOptions(recall=0.9)
CODES = ["int8 codes", "4-bit codes", "2-bit codes", "binary codes"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    graph.make_shard(folder)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A folder with a shard of its own."""
    shutil.copytree(made / "docs", tmp_path / "docs")
    return tmp_path


@pytest.fixture
def collection(home: Path) -> Iterator[Collection]:
    with connect(uri(home)) as opened:
        yield opened


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one other build: each takes a second."""
    every = EdgeTuning.builds
    monkeypatch.setattr(EdgeTuning, "builds", lambda self: every(self)[:1])


def uri(home: Path) -> str:
    return f"qdrant-edge://{home}?collection=docs"


def vectors_of(home: Path) -> Any:
    """How the engine was told to keep the vectors."""
    return json.loads((home / "docs" / "edge_config.json").read_text())["vectors"][""]


def recall_of(collection: Collection, home: Path, recall: float) -> float:
    quiet = HealthMonitor(share=0.0)
    router = LearnedRouter(collection, registry=home / "registry", refresh=None, watch=quiet)
    found = []
    for query in graph.queries(9, 300):
        (exact,) = collection.exact(SearchRequest(query[None], 10))
        hits = router.search(query, recall=recall)
        assert hits.trace.mode == "tuned"
        found.append(recall_at_k(hits, exact, 10, larger_is_better=True))
    return float(np.mean(found))


@pytest.mark.slow
def test_every_code_is_measured_beside_the_collection_which_stays_as_it_was(
    collection: Collection, home: Path
) -> None:
    before = vectors_of(home)
    found = measure(collection, graph.queries(1, 800), OPTIONS, home / "tune").result
    assert [row.search for row in found.rows] == [FOUND, NATIVE_ROW, *CODES, CELLS_ROW]
    assert [row.dropped for row in found.rows[:-1]] == [None] * 6
    assert "every search asks 2 segments" in (found.rows[-1].dropped or "")
    as_is, native, int8 = found.rows[:3]
    assert as_is.recall is not None
    assert as_is.recall < 0.75  # the graph's own candidates are too few for this target
    assert native.recall is not None
    assert native.recall > 0.88
    assert int8.recall is not None
    assert int8.recall > 0.88
    assert (as_is.bytes_per_key, int8.bytes_per_key) == (96, 24)
    assert as_is.memory_bytes is not None  # the vectors stay in memory beside codes of them
    assert (int8.memory_bytes or 0) - as_is.memory_bytes == 24 * found.keys
    assert found.choice.answer in ("tune", "rebuild")
    assert "misses the target" in found.choice.text
    assert vectors_of(home) == before
    assert not list((home / "tune").rglob("trial/scratch/*"))


@pytest.mark.usefixtures("few")
@pytest.mark.slow
def test_what_was_chosen_holds_on_other_queries(collection: Collection, home: Path) -> None:
    measured = measure(collection, graph.queries(1, 800), OPTIONS, home / "tune")
    kept = settled(measured, rebuild=False)
    assert kept.result.choice.search == NATIVE_ROW
    registry = Registry(home / "registry")
    done = apply_choice(collection, kept, registry, home / "tune")
    assert done.rebuilt is None
    assert [row.search for row in done.evaluated] == ["native", "tuned, recall 0.90"]
    assert "AMIPS_DISABLED" in done.way_back[0]
    assert recall_of(collection, home, 0.9) >= 0.9
    again = apply_choice(collection, kept, registry, home / "tune")
    assert "amips registry rollback qdrant-edge/docs/ " in again.way_back[0]


def chosen(measured: Measured, name: str) -> Measured:
    choice = Choice(answer="rebuild", search=name, text="by hand")
    return replace(measured, result=msgspec.structs.replace(measured.result, choice=choice))


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_codes_that_were_agreed_to_are_the_collections_and_calibrated_there(
    collection: Collection, home: Path
) -> None:
    measured = measure(collection, graph.queries(1, 800), OPTIONS, home / "tune")
    registry = Registry(home / "registry")
    done = apply_choice(collection, chosen(measured, "int8 codes"), registry, home / "tune")
    assert done.rebuilt == "int8 codes"
    assert "quantization_config as before (vectors)" in done.way_back[1]
    again = apply_choice(collection, chosen(measured, "int8 codes"), registry, home / "tune")
    assert again.way_back[0].count("amips registry rollback") == 2  # it publishes twice
    key = collection_key(collection.info)
    registry.roll_back(key)
    assert registry.roll_back(key) == done.version
    assert vectors_of(home)["quantization_config"] == {"scalar": {"type": "int8"}}
    with connect(uri(home)) as served:
        assert served.count() == graph.COUNT
        assert served.search(SearchRequest(graph.queries(2, 1), 1, fields=["year"]))[0][0].fields
        assert recall_of(served, home, 0.9) >= 0.9
        tuning = EdgeTuning(served)  # type: ignore[arg-type]
        present = tuning.as_found()
        assert present is not None
        assert (present.name, present.knob.rescored) == ("int8 codes", True)
        assert [build.name for build in tuning.builds()] == ["vectors"]  # the first of them
        tuning.apply(tuning.builds()[0], Recorder()).close()
    assert vectors_of(home).get("quantization_config") is None


@pytest.mark.slow
def test_after_an_interrupt_nothing_is_left_and_what_is_done_is_not_done_again(
    collection: Collection, home: Path
) -> None:
    class Stop(Recorder):
        def __init__(self, at: str) -> None:
            super().__init__()
            self.at, self.titles = at, list[str]()

        def __call__(self, title: str, total: int, done: int = 0, unit: str = "") -> Any:
            self.titles.append(title)
            if title == self.at:
                raise KeyboardInterrupt
            return super().__call__(title, total, done, unit)

    first, second = Stop("compare 4-bit codes"), Stop("")
    queries = graph.queries(1, 200)
    before = vectors_of(home)
    with pytest.raises(KeyboardInterrupt):
        measure(collection, queries, OPTIONS, home / "tune", first)
    assert not list((home / "tune").rglob("trial/scratch/*"))
    assert vectors_of(home) == before
    found = measure(collection, queries, OPTIONS, home / "tune", second).result
    assert [title for title in second.titles if title.startswith("build")] == [
        f"build {name}" for name in CODES[1:]
    ]
    assert len(found.rows) == 7
    third = Stop("")
    measure(collection, queries, replace(OPTIONS, recall=0.8), home / "tune", third)
    assert "build int8 codes" in third.titles  # another question


@pytest.mark.slow
def test_what_the_database_refuses_and_what_there_is_no_time_for_is_dropped_and_said(
    collection: Collection, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knob = Knob("hnsw_ef", GRAPH_EFFORTS)
    strange = Build("strange codes", knob, 1.0, {"product": {"compression": "x4"}})
    monkeypatch.setattr(EdgeTuning, "builds", lambda _: [strange])
    queries = graph.queries(1, 200)
    rows = measure(collection, queries, OPTIONS, home / "tune").result.rows
    assert rows[2].dropped is not None
    assert "'product' cannot be built" in rows[2].dropped
    monkeypatch.undo()
    no_time = replace(OPTIONS, seconds=0.0)
    # What was not tried is tried when there is time.
    monkeypatch.setattr(EdgeTuning, "free_bytes", lambda *_: 1000)
    rows = measure(collection, queries, no_time, home / "tune").result.rows
    assert {row.dropped for row in rows[2:-1]} == {"a copy takes about 1 MB, and 0 MB are free"}
    small = measure(collection, queries, replace(no_time, memory=10_000), home / "tune").result
    assert all("of --memory" in (row.dropped or "") for row in small.rows[2:-1])
    assert small.notes[-1].startswith("Not even 2-bit codes fit")
    # The vectors stay in memory beside codes of them, so that these take more than there is now.
    now = small.rows[0].memory_bytes
    exact = measure(collection, queries, replace(no_time, memory=now), home / "tune").result
    assert all("of --memory" in (row.dropped or "") for row in exact.rows[2:-1])


@pytest.mark.usefixtures("few")
@pytest.mark.slow
def test_a_sample_is_compared_with_a_copy_of_the_same_size(
    collection: Collection, home: Path
) -> None:
    options = replace(OPTIONS, sample=1000)
    found = measure(collection, graph.queries(1, 400), options, home / "tune").result
    assert (found.keys, found.sampled) == (3000, 1000)
    assert "tried on 1,000 of 3,000 keys" in found.notes[-1]
    assert found.rows[2].recall is not None
    assert found.rows[2].recall > 0.85


@pytest.mark.usefixtures("few")
@pytest.mark.slow
def test_slow_searches_calibrate_fewer_queries_and_the_same_ones_again(
    collection: Collection, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amips_plugins.tune.run._PATIENCE", 0.0)
    queries = graph.queries(1, 600)
    found = measure(collection, queries, OPTIONS, home / "tune").result
    assert (found.calibrated, found.compared) == (200, 100)
    monkeypatch.undo()
    again = measure(collection, queries, replace(OPTIONS, seconds=0.0), home / "tune").result
    assert again.rows[:2] == found.rows[:2]


@pytest.mark.usefixtures("few")
def test_more_queries_in_the_same_folder_are_more_queries(
    collection: Collection, home: Path
) -> None:
    few = measure(collection, graph.queries(1, 60), OPTIONS, home / "tune").result
    more = measure(collection, graph.queries(1, 400), OPTIONS, home / "tune").result
    assert (few.calibrated, more.calibrated) == (30, 200)


def test_a_limit_of_the_database_is_as_far_as_it_is_searched(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, queries = collection.search, graph.queries(1, 60)
    truth = exact_truth(collection, queries, 100)

    def limited(request: SearchRequest, plan: QueryPlan = NATIVE) -> Any:
        if (plan.params or {}).get("hnsw_ef", 0) > 64:
            raise ValueError("Limit exceeded")
        return search(request, plan)

    def curve() -> EffortCurve:
        return effort_curve(collection, EffortParameter("hnsw_ef"), (32, 64, 128), queries, truth)

    monkeypatch.setattr(collection, "search", limited)
    monkeypatch.setattr(collection, "failure", lambda _: Failure.REQUEST)
    assert curve().efforts.tolist() == [32, 64]
    monkeypatch.setattr(collection, "failure", lambda _: Failure.OUTAGE)
    with pytest.raises(ValueError, match="Limit exceeded"):
        curve()


@pytest.mark.usefixtures("few")
def test_fewer_hits_a_search_than_are_calibrated_are_as_many_as_are(
    collection: Collection, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, search = collection.exact, collection.search

    def limited(request: SearchRequest, *plan: QueryPlan) -> Any:
        assert request.k <= 20, "max_query_limit"
        return search(request, *plan)

    def exactly(request: SearchRequest) -> Any:
        assert request.k <= 20, "max_query_limit"
        return exact(request)

    monkeypatch.setattr(type(collection), "max_candidates", 20)  # strict mode's max_query_limit
    monkeypatch.setattr(collection, "search", limited)
    monkeypatch.setattr(collection, "exact", exactly)
    options = replace(OPTIONS, seconds=0.0)
    measured = measure(collection, graph.queries(1, 100), options, home / "tune")
    assert measured.calibrations[NATIVE_ROW].guaranteed.shape[0] == 20
    with pytest.raises(InvalidInput, match="allows 20 hits"):
        measure(collection, graph.queries(1, 100), replace(options, k=21), home / "tune")


def test_two_runs_do_not_share_a_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = home / "tune"
    with alone(out):
        assert run(["tune", uri(home), "-o", str(out)]) == 1
        assert "Another amips tune is at work" in capsys.readouterr().err
        assert not (out / "trials").exists()
        with alone(home / "other"):
            pass
    with alone(out):
        pass
    with pytest.raises(BlockingIOError), alone(out):
        raise BlockingIOError("of something else")


@pytest.mark.usefixtures("few")
def test_other_keys_under_the_same_name_are_measured_anew(
    collection: Collection, home: Path
) -> None:
    no_copies = replace(OPTIONS, seconds=0.0)
    queries = graph.queries(1, 60)
    found = measure(collection, queries, no_copies, home / "tune").result
    same = measure(collection, queries, no_copies, home / "tune").result
    assert same.rows == found.rows
    collection.upsert([0], graph.keys()[1:2])
    other = measure(collection, queries, no_copies, home / "tune").result
    assert other.rows[0].cost != found.rows[0].cost


@pytest.mark.usefixtures("few")
def test_a_refusal_is_not_remembered(
    collection: Collection, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, queries = replace(OPTIONS, sample=1000), graph.queries(1, 100)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Forbidden")

    with monkeypatch.context() as patch:
        patch.setattr(EdgeTuning, "scratch", refuse)
        rows = measure(collection, queries, options, home / "tune").result.rows
        assert rows[2].dropped == "the database refuses it: Forbidden"
    rows = measure(collection, queries, options, home / "tune").result.rows
    assert rows[2].dropped is None


@pytest.mark.usefixtures("few")
@pytest.mark.slow
def test_few_queries_promise_less_and_the_best_is_named(collection: Collection, home: Path) -> None:
    options = TuneOptions(recall=0.99)
    found = measure(collection, graph.queries(1, 60), options, home / "tune").result
    assert (found.choice.answer, found.choice.search) == ("unclear", None)
    assert "the best target is 0.8" in found.choice.text


def test_where_there_is_nothing_to_set_it_says_so(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidInput, match="nothing to tune"):
        measure(MemoryCollection(graph.keys()), None, OPTIONS, home / "tune")
    with connect(uri(home)) as opened:
        opened.upsert([5000], graph.keys()[:1])
    import qdrant_edge as edge

    params = edge.EdgeVectorParams(size=4, distance=edge.Distance.Dot)
    edge.EdgeShard.create(str(home / "bare"), edge.EdgeConfig(vectors=params)).close()
    with connect(f"qdrant-edge://{home}?collection=bare") as bare:
        bare.upsert(range(100), graph.keys()[:100, :4])
        with pytest.raises(NothingToTune, match="looks at all of them"):
            measure(bare, None, OPTIONS, home / "tune")
    asked = ["tune", f"qdrant-edge://{home}?collection=bare", "-o", str(home / "tune")]
    assert run(asked) == 3  # left as it is
    assert "nothing to tune" in capsys.readouterr().out
    assert run([*asked, "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == {"measured": None, "applied": None}
    client = pytest.importorskip("qdrant_client").QdrantClient(path=str(home / "local"))
    fill(client)
    client.close()
    assert run(["tune", f"qdrant://{home}/local?collection=docs", "-o", str(home / "tune")]) == 3
    shown = capsys.readouterr()
    assert "local mode looks at every key" in shown.out
    assert "Trials are built" not in shown.err


def run(arguments: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    code = ended.value.code
    return 0 if code is None else int(code)


@pytest.mark.usefixtures("few")
@pytest.mark.slow
def test_the_command_from_the_collection_to_a_router(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    np.save("queries.npy", graph.queries(1, 400))
    asked = ["tune", uri(home), "--queries", "queries.npy", "--recall", "0.9"]
    asked += ["--registry", "registry"]
    before = vectors_of(home)
    assert run([*asked, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "Nothing was changed" in shown.out
    assert "native, tuned" in shown.out
    assert "removed; the collection's shard is only searched" in shown.err
    assert not (home / "registry").exists()
    assert run([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    page = (Path(__file__).parents[2] / "docs" / "scripting.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| `amips tune` | what")]
    assert set(found) == set(re.findall(r"`(\w+)`", row.rpartition("|")[0].rpartition("|")[2]))
    assert found["measured"]["choice"]["search"] in (NATIVE_ROW, "int8 codes")
    assert found["applied"]["rebuilt"] is None  # nobody was there to agree
    assert vectors_of(home) == before
    with connect(uri(home)) as served:
        assert recall_of(served, home, 0.9) >= 0.89


@pytest.mark.usefixtures("few")
def test_a_router_is_not_replaced_unasked(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    np.save("queries.npy", graph.queries(1, 400))
    with connect(uri(home)) as served:
        key = collection_key(served.info)
    registry = Registry("registry")
    registry.publish(write_bundle(home / "bundle", collection=key))
    asked = ["tune", uri(home), "--queries", "queries.npy", "--recall", "0.9"]
    asked += ["--registry", "registry"]
    assert run(asked) == 1
    assert "would take the place of the router v1 of qdrant-edge/docs/" in capsys.readouterr().err
    assert registry.current(key) == "v1"
    assert run([*asked, "--yes"]) == 0
    assert registry.open(key).manifest.model == "tuned"
    assert run(asked) == 0  # parameters take the place of parameters


@pytest.mark.usefixtures("few")
def test_what_would_not_serve_is_not_measured(
    collection: Collection, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry, options = Registry(home / "registry"), replace(OPTIONS, seconds=0.0)
    kept = measure(collection, graph.queries(1, 200), options, home / "tune")
    done = apply_choice(collection, kept, registry, home / "tune")
    registry.pin(collection_key(collection.info), done.version)
    with pytest.raises(InvalidInput, match="is pinned"):
        apply_choice(collection, kept, registry, home / "tune")
    collection.close()
    where = ["--registry", str(home / "registry"), "-o", str(home / "other")]
    assert run(["tune", uri(home), *where]) == 1
    assert "amips registry unpin" in capsys.readouterr().err
    assert not (home / "other").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--recall", "1"], "is no target"),
        (["--k", "0"], "cannot be calibrated"),
        (["--k", "101"], "cannot be calibrated"),
        (["--sample", "10"], "tell nothing"),
    ],
)
def test_bad_arguments_are_a_sentence(
    home: Path, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", uri(home), *more]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_milvus_lite_is_tuned_and_its_copies_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pymilvus = pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    path = tmp_path / "docs.db"
    client = pymilvus.MilvusClient(str(path))
    client.create_collection("docs", dimension=graph.DIM, metric_type="COSINE", auto_id=False)
    keys = graph.keys()[:1200]
    client.insert("docs", [{"id": n, "vector": key.tolist()} for n, key in enumerate(keys)])
    client.close()
    with connect(f"milvus://{path}?collection=docs") as lite:
        assert isinstance(lite, MilvusCollection)
        queries = graph.queries(1, 160)
        measured = measure(lite, queries, OPTIONS, tmp_path / "tune")
        rows = {row.search: row for row in measured.result.rows}
        assert set(rows) >= {FOUND, NATIVE_ROW, "IVF_FLAT", "IVF_SQ8"}
        assert rows[NATIVE_ROW].parameter == "ef"
        assert rows["IVF_FLAT"].parameter == "nprobe"
        assert rows["IVF_FLAT"].dropped is None
        assert rows["IVF_FLAT"].applies  # nobody else has the file open
        # An index that cannot be built leaves the parameters of the one that is there.
        registry, replaced = Registry(tmp_path / "registry"), MilvusTuning._replace_index

        def refused(self: MilvusTuning, build: Build) -> None:
            if build.name == "IVF_FLAT":
                raise MemoryError("no room")
            replaced(self, build)

        with monkeypatch.context() as patch:
            patch.setattr(MilvusTuning, "_replace_index", refused)
            with pytest.raises(MemoryError):
                apply_choice(lite, chosen(measured, "IVF_FLAT"), registry, tmp_path / "tune")
        published = registry.open(collection_key(lite.info))
        assert json.loads(published.fetch("effort.json", 1_000))["name"] == "ef"
        assert index_of(lite) != "IVF_FLAT"
        assert "lost by far" in (rows[KEYNET_ROW].dropped or "")
        assert lite.client.list_collections() == ["docs"]
        # What somebody else has called so is not ours to drop.
        lite.client.create_collection("docs__amips_tune", dimension=4)
        other = measure(lite, graph.queries(2, 160), OPTIONS, tmp_path / "other").result
        builds = [row for row in other.rows[2:] if row.search not in (CELLS_ROW, KEYNET_ROW)]
        assert all("this command did not make it" in (row.dropped or "") for row in builds)
        assert "docs__amips_tune" in lite.client.list_collections()


def make_flat(folder: Path, keys: Any) -> str:
    """A Milvus Lite collection that is searched without an index, as the demo's is."""
    pymilvus = pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    path = folder / "flat.db"
    client = pymilvus.MilvusClient(str(path))
    schema = client.create_schema()
    schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=keys.shape[1])
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    client.create_collection("docs", schema=schema, index_params=index)
    client.insert("docs", [{"id": n, "vector": key.tolist()} for n, key in enumerate(keys)])
    client.close()
    return f"milvus://{path}?collection=docs"


def index_of(collection: Collection) -> str:
    return dict(collection.describe().facts)["index"].partition(" ")[0]


@pytest.mark.slow
def test_where_every_key_is_looked_at_an_index_is_tried_and_built_in_place_on_milvus_lite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = make_flat(tmp_path, graph.keys()[:1500])
    builds = MilvusTuning.builds
    monkeypatch.setattr(MilvusTuning, "builds", lambda self: builds(self)[:1])
    with connect(where) as lite:
        measured = measure(lite, graph.queries(1, 160), OPTIONS, tmp_path / "tune")
        rows = measured.result.rows
        assert [row.search for row in rows] == [FOUND, NATIVE_ROW, "HNSW"]
        assert rows[0].recall == 1.0
        assert "looks at all keys" in (rows[1].dropped or "")
        assert rows[2].effort is not None
        registry = Registry(tmp_path / "registry")
        by_hand = chosen(measured, "HNSW")
        tuning, replaced = measured.tuning, MilvusTuning._replace_index
        tried = list[str]()

        def stopped(self: MilvusTuning, build: Build) -> None:
            tried.append(build.name)
            if build.name == "HNSW":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)  # once more, while the old one is built
            replaced(self, build)

        handler = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            patch.setattr(MilvusTuning, "_replace_index", stopped)
            with pytest.raises(KeyboardInterrupt):
                tuning.apply(measured.builds["HNSW"], Recorder())
        assert tried == ["HNSW", "FLAT"]
        assert signal.getsignal(signal.SIGINT) is handler
        assert index_of(lite) == "FLAT"
        done = apply_choice(lite, by_hand, registry, tmp_path / "tune")
        assert done.rebuilt == "HNSW"
        assert "index_type='FLAT', metric_type='COSINE'" in done.way_back[1]
    with connect(where) as served:
        assert index_of(served) == "HNSW"
        assert served.count() == 1500
        router = LearnedRouter(served, registry=registry, refresh=None)
        hits = router.search(graph.queries(3, 1)[0], recall=0.9, explain=True)
        assert hits.trace.mode == "tuned"


KILLED = """
import os, pathlib, signal, sys
from amips_plugins import connect
from amips_plugins.adapters.milvus.tuning import MilvusTuning
from amips_plugins.progress import no_progress
from tests.tune.test_tune import graph, make_flat

lite = connect(make_flat(pathlib.Path(sys.argv[1]), graph.keys()[:1500]))
made = lite.client.create_index

def create_index(*args, **kwargs):
    if sys.argv[2] == "after":
        made(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)

lite.client.create_index = create_index
tuning = MilvusTuning(lite)
tuning.apply(tuning.builds()[0], no_progress)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_between_two_indexes_of_milvus_lite_no_key_is_lost_and_it_says_what_to_do(
    tmp_path: Path, moment: str
) -> None:
    pytest.importorskip("milvus_lite")
    where, root = f"milvus://{tmp_path}/flat.db?collection=docs", Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment]
    ended = subprocess.run(command, check=False, cwd=root)  # noqa: S603 - our own interpreter
    assert ended.returncode == -signal.SIGKILL
    pymilvus = pytest.importorskip("pymilvus")
    if moment == "before":
        with pytest.raises(CollectionError, match=r"has no index.*client\.create_index"):
            connect(where)
        client = pymilvus.MilvusClient(str(tmp_path / "flat.db"))
        index = client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="COSINE")
        client.create_index("docs", index)
        client.close()
    with connect(where) as lite:
        assert index_of(lite) == ("FLAT" if moment == "before" else "HNSW")
        assert lite.count() == 1500
        (hits,) = lite.search(SearchRequest(graph.keys()[:1], 1))
        assert hits[0].id == 0


@pytest.mark.slow
def test_the_log_of_a_routed_client_is_what_tune_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pymilvus = pytest.importorskip("pymilvus")
    pytest.importorskip("pyarrow")
    where = make_flat(tmp_path, graph.keys()[:1500])
    monkeypatch.chdir(tmp_path)
    client = pymilvus.MilvusClient(str(tmp_path / "flat.db"))
    asked = graph.queries(1, 160)
    with QueryLog(tmp_path / "log", flush_every=None) as log:
        router = LearnedRouter(MilvusCollection(client, "docs"), registry=tmp_path / "registry")
        routed = route(client, router, log=log)
        for query in asked:
            routed.search("docs", data=[query.tolist()], limit=10)
    client.close()
    monkeypatch.setattr(MilvusTuning, "builds", lambda _: [])
    assert run(["tune", where, "--queries-log", "log", "--json", "--dry-run"]) == 3
    found = json.loads(capsys.readouterr().out)["measured"]
    assert found["queries"] == "log"
    assert found["calibrated"] + found["compared"] == 120


def test_the_shard_of_somebody_else_is_not_changed(home: Path) -> None:
    import qdrant_edge as edge

    shard = edge.EdgeShard.load(str(home / "docs"))
    found = EdgeTuning(QdrantEdgeCollection(shard, home / "docs")).as_found()
    shard.close()
    assert found is not None
    assert not found.applies  # it cannot be closed and opened anew here
