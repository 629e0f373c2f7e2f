"""What the tests that kill servers build on: data, address and readiness after each kind of end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration_tests.conftest import BY_DAY
from integration_tests.containers import Container, Image, milvus_image, no_engine, own_qdrant
from integration_tests.servers import (
    QDRANT_HINT,
    MilvusServer,
    QdrantProcess,
    QdrantServer,
    ServerError,
)
from tests.adapters.contract.collection_contract import CollectionContract

models = pytest.importorskip("qdrant_client.models")
pymilvus = pytest.importorskip("pymilvus")

ROOT = Path(__file__).parent.parent


def write(server: MilvusServer, name: str, count: int) -> None:
    client = pymilvus.MilvusClient(server.uri)
    client.create_collection(name, dimension=4)
    client.insert(name, [{"id": key, "vector": [1.0] * 4} for key in range(count)])
    client.close()


def count(server: MilvusServer, name: str) -> int:
    client = pymilvus.MilvusClient(server.uri)
    try:
        found = client.query(name, "", ["count(*)"], consistency_level="Strong")
        return int(found[0]["count(*)"])
    finally:
        client.close()


def test_data_and_address_survive_a_kill(milvus_to_kill: MilvusServer) -> None:
    write(milvus_to_kill, "killed", 50)
    uri = milvus_to_kill.uri
    milvus_to_kill.kill()
    assert not milvus_to_kill.is_running()
    with pytest.raises(ServerError, match="it ended"):
        milvus_to_kill.wait_until_ready()
    milvus_to_kill.start()
    assert milvus_to_kill.wait_until_ready("killed") < 60
    assert milvus_to_kill.uri == uri
    assert count(milvus_to_kill, "killed") == 50


def test_data_survives_a_restart(milvus_to_kill: MilvusServer) -> None:
    write(milvus_to_kill, "restarted", 50)
    milvus_to_kill.restart()
    milvus_to_kill.wait_until_ready("restarted")
    assert count(milvus_to_kill, "restarted") == 50


def test_a_pause_ends(milvus_to_pause: MilvusServer) -> None:
    write(milvus_to_pause, "paused", 50)
    milvus_to_pause.pause()
    with pytest.raises(ServerError, match="not ready after"):
        milvus_to_pause.wait_until_ready("paused", timeout=3)
    milvus_to_pause.unpause()
    milvus_to_pause.wait_until_ready("paused")
    assert count(milvus_to_pause, "paused") == 50


class TestQdrant:
    """The same of a Qdrant server."""

    NAME = "written"

    @pytest.fixture
    def written(self, qdrant_to_break: QdrantServer) -> Iterator[QdrantServer]:
        client = qdrant_to_break.address.client()
        client.create_collection(
            self.NAME, {}, sparse_vectors_config={"words": models.SparseVectorParams()}
        )
        client.upsert(
            self.NAME, [models.PointStruct(id=i, vector={}) for i in range(50)], wait=True
        )
        yield qdrant_to_break
        client.delete_collection(self.NAME)
        client.close()

    def count(self, server: QdrantServer) -> int:
        client = server.address.client(timeout=5)
        try:
            return client.count(self.NAME).count
        finally:
            client.close()

    def test_data_and_address_survive_a_kill_and_a_restart(self, written: QdrantServer) -> None:
        written.kill()
        assert not written.is_running()
        with pytest.raises(ServerError, match="it ended"):
            written.wait_until_ready()
        written.start()
        assert written.wait_until_ready(self.NAME) < 30
        assert self.count(written) == 50
        written.restart()
        written.wait_until_ready(self.NAME)
        assert self.count(written) == 50

    def test_a_pause_ends(self, written: QdrantServer) -> None:
        written.pause()
        with pytest.raises(ServerError, match="not ready after"):
            written.wait_until_ready(timeout=1)
        written.unpause()
        written.wait_until_ready(self.NAME)
        assert self.count(written) == 50

    def test_three_nodes_know_each_other(self, qdrant_cluster: list[QdrantProcess]) -> None:
        for node in qdrant_cluster:
            assert len(json.loads(node.address.ask("/cluster"))["result"]["peers"]) == 3

    def test_it_goes_with_its_owner(self) -> None:
        if shutil.which("qdrant") is None:
            pytest.skip(QDRANT_HINT)
        program = (
            "import os, signal\n"
            "from integration_tests.servers import QdrantProcess\n"
            "server = QdrantProcess()\n"
            "server.start()\n"
            "server.wait_until_ready()\n"
            "print(server.pid, server._folder, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
        )
        pid, folder = done.stdout.split()
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() or Path(folder).exists():
            assert time.monotonic() < deadline, "the server outlives its owner"
            time.sleep(0.2)


def test_nothing_that_could_be_a_server_is_a_skip_that_names_all_three(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr("integration_tests.containers.no_engine", lambda: "no engine here")
    with pytest.raises(ServerError) as caught:
        own_qdrant()
    for way in ("AMIPS_QDRANT_URL", "program `qdrant` on PATH", "docker compose", "no engine here"):
        assert way in str(caught.value)


def test_a_container_goes_with_its_owner() -> None:
    reason = no_engine()
    if reason:
        pytest.skip(reason)
    try:
        image = milvus_image()
    except ServerError as exc:
        pytest.skip(str(exc))
    program = (
        "import os, signal\n"
        "from integration_tests.containers import Container, milvus_image\n"
        "container = Container(milvus_image(), 19530, {})\n"
        "container.do('start')\n"
        "print(container.name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    name = done.stdout.strip()
    assert name.startswith("amips-test-"), done.stderr
    deadline = time.monotonic() + 20
    while subprocess.run(["docker", "inspect", name], capture_output=True).returncode == 0:
        assert time.monotonic() < deadline, "the container outlives its owner"
        time.sleep(0.2)
    container = Container(Image(image.name), 19530, {})
    container.remove()
    container.remove()


def test_what_runs_by_day_is_of_the_contract() -> None:
    assert set(dir(CollectionContract)) >= BY_DAY
