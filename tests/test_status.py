"""What an operator asks: ``amips status``, and what running processes write for it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from qdrant_client import QdrantClient, models

from amips_plugins import QdrantCollection, Registry
from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.bundle.contents import CALIBRATION
from amips_plugins.cli import main
from amips_plugins.collection import CollectionKey, collection_key
from amips_plugins.errors import InvalidInput
from amips_plugins.health.drift import Drift
from amips_plugins.health.filters import FilterClass
from amips_plugins.health.gate import Health, State
from amips_plugins.health.monitor import HealthMonitor, Watch
from amips_plugins.health.recall import Recall
from amips_plugins.health.status_file import StatusFile, read_status
from amips_plugins.layout import backfill, lay_out
from amips_plugins.models.calibration import Calibration
from amips_plugins.status import RouterStatus, router_status
from amips_plugins.vectors import Metric
from tests.support.bundles import (
    COUNT,
    DIM,
    K,
    laid_out,
    memory,
    open_bundle,
    vectors,
    weaken,
    write_bundle,
)
from tests.support.routing_data import publish
from tests.support.simulated_router import router

HEALTH = Health(
    state="widened",
    since="2026-01-01T00:00:00+00:00",
    reasons=("recall is below its target",),
    recall=Recall(n=100, mean=0.92, low=0.9, high=0.94, p5=0.7),
    drift=Drift(p_value=0.25, n=500),
    overflow=0.01,
    filters=(
        FilterClass("a == ?", 1.5, None, 300),
        FilterClass("b == ?", None, "filter: not measured", 3),
    ),
    widening=2.5,
)
QUERIES = vectors(seed=11, count=300)  # of the same distribution as the reference's
AWAY = np.abs(vectors(seed=6, count=300))


# The report


def promise_too_much(files: dict[str, bytes]) -> None:
    """A calibration that takes a search of the best cell alone for enough."""
    whole = Calibration.from_bytes(files[CALIBRATION])
    thresholds = whole.thresholds.copy()
    thresholds[:-1] = np.linspace(20.0, 10.0, len(thresholds) - 1)
    boast = np.full_like(whole.guaranteed, 0.99)
    boast[:, -1] = 1.0
    scanned = whole.scanned.copy()
    scanned[:-1] = np.linspace(0.05, 0.5, len(scanned) - 1)
    files[CALIBRATION] = Calibration(thresholds, boast, boast, scanned, 0.95).to_bytes()


def served(tmp_path: Path, **changes: Any) -> tuple[MemoryCollection, Registry]:
    registry = publish(tmp_path, **changes)
    return laid_out(tmp_path / "made"), registry


def test_a_healthy_collection(tmp_path: Path) -> None:
    collection, registry = served(tmp_path)
    found = router_status(collection, registry, QUERIES)
    assert (found.state, found.reasons, found.bundle) == ("healthy", (), "v1")
    assert (found.model, found.layout, found.keys) == ("linear", collection.layout(), COUNT)
    assert found.recall is not None
    assert (found.recall.n, found.k) == (300, K)
    assert found.recall.mean >= 0.88
    assert found.drift is not None
    assert not found.drift.found
    assert found.advice == "Nothing to do."
    unmeasured = router_status(collection, registry)
    assert (unmeasured.state, unmeasured.recall, unmeasured.drift) == ("healthy", None, None)
    assert "--queries" in unmeasured.advice


def test_a_target_that_the_bundle_does_not_promise(tmp_path: Path) -> None:
    found = router_status(*served(tmp_path, change=weaken(0.85)), QUERIES)  # .9 is the default
    assert (found.state, found.reasons) == ("native", ("target: not promised",))
    assert "best target is 0.850" in found.advice
    assert "Train with more queries" in found.advice


def test_a_promise_that_is_not_kept(tmp_path: Path) -> None:
    found = router_status(*served(tmp_path, change=promise_too_much, default_recall=0.99), QUERIES)
    assert found.recall is not None
    assert found.recall.high < 0.9
    assert found.recall.n == 300
    assert found.state == "native"  # four times next to nothing is next to nothing
    assert found.reasons == ("recall is below its target",)
    assert "amips train --queries-log" in found.advice


def test_drifted_queries(tmp_path: Path) -> None:
    where = served(tmp_path)
    found = router_status(*where, AWAY, sample=5)
    assert found.drift is not None
    assert found.drift.found
    # As in a running router recall decides, of which there is too little to tell.
    assert found.state == "healthy"
    assert "--sample" in found.advice


def test_overflow(tmp_path: Path) -> None:
    collection, registry = served(tmp_path)
    collection.upsert(list(range(1000, 1010)), vectors(seed=7, count=10))
    found = router_status(collection, registry)
    assert found.state == "healthy"  # in memory cells are always cheaper
    assert found.overflow == pytest.approx(10 / (COUNT + 10))
    assert "amips backfill" in found.advice
    collection.break_even = 0.1  # as of a database
    found = router_status(collection, registry, QUERIES, sample=20)
    assert found.state == "native"
    assert found.recall is not None
    assert "amips backfill" in found.advice


def test_vectors_that_others_changed_in_their_cells(tmp_path: Path) -> None:
    collection, registry = served(tmp_path)
    sound = router_status(collection, registry)
    assert (sound.sampled, sound.state) == (COUNT, "healthy")
    assert sound.misplaced is not None
    assert 0 < sound.misplaced < 0.07
    collection._vectors[:12] = -collection._vectors[:12]  # what updating vectors alone does
    found = router_status(collection, registry)
    assert found.misplaced is not None
    assert found.misplaced > 12 / COUNT
    assert (found.state, found.reasons) == ("native", ("cells: stale",))
    assert "amips backfill --verify" in found.advice
    backfill(collection, registry.open(collection_key(collection.info)), verify=True)
    assert router_status(collection, registry).state == "healthy"


def test_what_the_database_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection, registry = served(tmp_path)
    monkeypatch.setattr(collection, "unroutable", lambda *_, **__: "strict mode forbids it")
    found = router_status(collection, registry, QUERIES)
    assert (found.state, found.reasons) == ("native", ("strict mode forbids it",))
    assert "setting of the database" in found.advice


def test_without_a_bundle_or_its_cells(tmp_path: Path) -> None:
    found = router_status(memory(), Registry(tmp_path / "empty"), QUERIES)
    assert (found.state, found.bundle, found.recall) == ("native", None, None)
    assert "amips publish" in found.advice
    registry = publish(tmp_path)
    found = router_status(memory(), registry, QUERIES)
    assert (found.state, found.bundle, found.reasons) == ("native", "v1", ("cells: not laid out",))
    assert "amips layout" in found.advice


def test_a_keynet(tmp_path: Path) -> None:
    registry = publish(tmp_path, model="keynet")
    found = router_status(memory(), registry, QUERIES, sample=100)
    assert (found.state, found.model, found.layout) == ("healthy", "keynet", None)
    assert found.recall is not None
    assert found.recall.mean == 1.0  # it fetches more candidates than there are keys


# The command, on a real collection


@pytest.fixture
def uri(tmp_path: Path) -> str:
    home = tmp_path / "qdrant"
    key = CollectionKey(database="qdrant", name="docs", field="")
    Registry(tmp_path / "registry").publish(write_bundle(tmp_path / "bundle", collection=key))
    client = QdrantClient(path=str(home))
    size = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    client.create_collection("docs", vectors_config=size)
    points = [models.PointStruct(id=i, vector=v.tolist()) for i, v in enumerate(vectors())]
    client.upsert("docs", points)
    collection = QdrantCollection(client, "docs")
    assert collection_key(collection.info) == key
    lay_out(collection, open_bundle(tmp_path / "bundle"))
    client.close()
    np.save(tmp_path / "queries.npy", QUERIES)
    np.save(tmp_path / "away.npy", AWAY)
    return f"qdrant://{home}?collection=docs"


def status(tmp_path: Path, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["status", *arguments, "--registry", str(tmp_path / "registry")])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.filterwarnings("ignore::UserWarning")  # local mode knows no payload index
def test_the_command(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("warnings.showwarning", None)  # main replaces it for good
    options = ["--queries", str(tmp_path / "queries.npy"), "--sample", "50"]
    assert status(tmp_path, uri, *options) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("'docs' is healthy.\n")
    for part in ("bundle    v1 (linear)", "0.0% of 48 keys", "recall    @10 0.9", "drift     p ="):
        assert part in shown
    assert shown.endswith("Nothing to do.\n")

    StatusFile(tmp_path / "status", "docs")(HEALTH)
    options = ["--queries", str(tmp_path / "away.npy"), "--sample", "5"]
    running = ["--running", str(tmp_path / "status")]
    assert status(tmp_path, uri, *options, *running) == 0
    shown = capsys.readouterr().out
    assert "Queries differ from those trained on, and too few" in shown
    assert f"/{os.getpid()}" in shown
    assert "0.920 (0.900)" in shown
    assert "1 of 2" in shown  # classes of filters are routed
    assert status(tmp_path, uri, *options, *running, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["status"]["state"] == "healthy"
    assert content["running"][0]["status"]["health"]["recall"]["mean"] == 0.92

    assert status(tmp_path, uri, *running, "--queries", "a", "--queries-log", "b") == 1
    assert "Pass one of" in capsys.readouterr().err
    (tmp_path / "registry").rename(tmp_path / "gone")
    assert status(tmp_path, uri) == 4
    assert "'docs' is native.\n  because: " in capsys.readouterr().out


# Running processes


def test_a_running_process_writes_what_it_knows(tmp_path: Path) -> None:
    watch = HealthMonitor(on_health=StatusFile(tmp_path / "status", "docs"))
    watch.begin(Watch(memory(Metric.IP), router()))
    (found,) = read_status(tmp_path / "status")
    assert (found.collection, found.pid, found.health) == ("docs", os.getpid(), watch.health)
    assert found.age < 60
    watch.add_overflow(0.9, 0.5)  # a change of state is written at once
    (found,) = read_status(tmp_path / "status")
    assert found.health == watch.health
    assert found.health.state == "native"


def test_it_writes_no_more_often_than_asked(tmp_path: Path) -> None:
    rare, often = StatusFile(tmp_path / "a", "docs", 3600.0), StatusFile(tmp_path / "b", "docs", 0)
    for write in (rare, often):
        write(HEALTH)
        write(replace(HEALTH, overflow=0.5))
    assert [read_status(tmp_path / name)[0].health.overflow for name in "ab"] == [0.01, 0.5]
    rare(replace(HEALTH, state="native"))
    assert read_status(tmp_path / "a")[0].health.state == "native"


def test_collections_and_processes_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status_file = StatusFile(tmp_path, "docs", 3600.0)
    status_file(HEALTH)
    StatusFile(tmp_path, "papers")(HEALTH)
    assert len(read_status(tmp_path)) == 2
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in a forked child
    status_file(HEALTH)
    assert {(one.collection, one.pid) for one in read_status(tmp_path)} >= {("docs", 1)}
    assert len(read_status(tmp_path)) == 3


def test_what_nobody_writes_is_forgotten(tmp_path: Path) -> None:
    old = tmp_path / "amips-0123456789ab-1.json"
    old.write_bytes(b"{}")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    StatusFile(tmp_path, "docs")(HEALTH)
    assert not old.exists()
    assert len(read_status(tmp_path)) == 1


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b"x" * 100_000])
def test_what_is_no_status_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "amips-x.json").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"amips-x.json is no status"):
        read_status(tmp_path)
    with pytest.raises(InvalidInput, match="There is no folder"):
        read_status(tmp_path / "nowhere")


@pytest.mark.parametrize(("state", "code"), [("healthy", 0), ("widened", 3), ("native", 4)])
@pytest.mark.filterwarnings("ignore::UserWarning")  # as above
def test_the_exit_status_is_the_state(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, state: State, code: int
) -> None:
    monkeypatch.setattr("warnings.showwarning", None)  # as above

    def found(*given: Any, **options: Any) -> RouterStatus:
        return structs.replace(router_status(*given, **options), state=state)

    monkeypatch.setattr("amips_plugins.status.router_status", found)
    assert status(tmp_path, uri) == code


def test_bad_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="every"):
        StatusFile(tmp_path, "docs", every=-1.0)
