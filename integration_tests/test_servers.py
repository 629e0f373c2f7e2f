"""What the tests that kill servers build on: data, address and readiness after each kind of end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from integration_tests.containers import Container, Image, milvus_image, no_engine
from integration_tests.servers import MilvusServer, ServerError

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


def test_a_container_goes_with_its_owner() -> None:
    reason = no_engine()
    if reason:
        pytest.skip(reason)
    image = milvus_image()
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
