"""Servers for the integration tests, each started once in a folder of its own."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

__all__ = ["MILVUS_HINT", "milvus_server"]

MILVUS_HINT = (
    "no Milvus server: run `docker compose -f docker/compose.yaml up -d --wait milvus` and set "
    "AMIPS_MILVUS_URI=http://127.0.0.1:19530, or run `pip install --no-deps milvus==2.3.5`, the "
    "wheel that holds a standalone server"
)

_START_SECONDS = 120.0
_STOP_SECONDS = 5.0  # SIGTERM takes Milvus over 30 s, and its folder is thrown away anyway


@contextmanager
def milvus_server() -> Iterator[str]:
    """Run the standalone server of the ``milvus`` wheel and yield its address.

    Its folder is temporary and every port is a free one. The embedded etcd listens on loopback;
    Milvus 2.3.5 itself has no setting for that and listens on all interfaces.

    Raises
    ------
    ModuleNotFoundError
        The wheel is not installed.
    """
    if importlib.util.find_spec("milvus") is None:
        raise ModuleNotFoundError("milvus", name="milvus")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        address, command, environment = _configure_milvus(folder)
        log = stack.enter_context((folder / "server.log").open("wb"))
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        stack.callback(_stop, process)
        _wait_until_it_answers(address, process, folder / "server.log")
        yield address


def _configure_milvus(folder: Path) -> tuple[str, list[str], dict[str, str]]:
    milvus = importlib.import_module("milvus")
    # The embedded etcd ignores the port of the Milvus configuration: two servers on one host would
    # meet on 2379 and 2380, so it gets a file of its own.
    ports = _free_ports(12)
    config = milvus.MilvusServerConfig(data_dir=str(folder))
    names = [name for name in config.configurable_items if name.endswith("_port")]
    config.update(**dict(zip(names, ports, strict=False)))
    spare = iter(ports[len(names) :])
    etcd_client = config.configs["etcd_port"]
    etcd_peer, metrics = next(spare), next(spare)
    roles = ("rootCoord", "proxy", "queryCoord", "queryNode", "indexNode", "dataCoord", "dataNode")
    for role in roles:  # the address the roles find each other at
        config.extra_configs[f"{role}.ip"] = "127.0.0.1"
    config.resolve()
    milvus._initialize_data_files(str(folder))
    etcd = folder / "configs" / "etcd.yaml"
    etcd.write_text(
        "name: default\n"
        f"data-dir: {folder / 'data' / 'etcd.data'}\n"
        f"listen-client-urls: http://127.0.0.1:{etcd_client}\n"
        f"advertise-client-urls: http://127.0.0.1:{etcd_client}\n"
        f"listen-peer-urls: http://127.0.0.1:{etcd_peer}\n"
        f"initial-advertise-peer-urls: http://127.0.0.1:{etcd_peer}\n"
        f"initial-cluster: default=http://127.0.0.1:{etcd_peer}\n"
    )
    environment = {
        **os.environ,
        "DEPLOY_MODE": "STANDALONE",
        "METRICS_PORT": str(metrics),
        "MILVUSCONF": str(folder / "configs"),
        "MILVUS_RUN_DIR": str(folder / "run"),
        "ETCD_CONFIG_PATH": str(etcd),
        "LD_LIBRARY_PATH": str(folder / "bin"),
    }
    address = f"http://127.0.0.1:{config.configs['proxy_port']}"
    return address, [str(folder / "bin" / "milvus"), "run", "standalone"], environment


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        ports = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
        return ports


def _wait_until_it_answers(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a real query: the health page answers before the server does."""
    deadline = time.monotonic() + _START_SECONDS
    reason = "it ended"
    while time.monotonic() < deadline and process.poll() is None:
        problem = _problem(address)
        if problem is None:
            return
        reason = problem
        time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"The Milvus server did not start ({reason}); its log ends with:\n{tail}")


def _problem(address: str) -> str | None:
    from pymilvus import MilvusClient
    from pymilvus.exceptions import MilvusException

    try:
        client = MilvusClient(address, timeout=2)
        try:
            client.create_collection("ready", dimension=2)
            client.query("ready", "id >= 0", ["count(*)"])
            client.drop_collection("ready")
        finally:
            client.close()
    except MilvusException as exc:
        return str(exc)
    return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
