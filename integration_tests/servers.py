"""Servers that tests may kill: one interface for each database, here as plain processes.

A server never outlives the test run, even if that is killed: a :class:`Leash` ends it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient, QdrantClient
    from typing_extensions import Self

__all__ = [
    "MILVUS_HINT",
    "QDRANT_HINT",
    "Leash",
    "MilvusProcess",
    "MilvusServer",
    "QdrantAddress",
    "QdrantProcess",
    "QdrantServer",
    "ServerError",
    "free_ports",
]

MILVUS_HINT = (
    "no Milvus server: run `docker/start-engine`, or run `docker compose -f docker/compose.yaml up "
    "-d --wait milvus` and set AMIPS_MILVUS_URI=http://127.0.0.1:19530, or run `pip install "
    "--no-deps milvus==2.3.5`, the wheel that holds a standalone server"
)

QDRANT_HINT = (
    "no Qdrant server: set AMIPS_QDRANT_URL to the address of one, or have the program `qdrant` on "
    "PATH, or run `docker compose -f docker/compose.yaml up -d --wait qdrant` and set "
    "AMIPS_QDRANT_URL=http://127.0.0.1:6333"
)

_READY_SECONDS = 120.0
_STOP_SECONDS = 30.0


class ServerError(Exception):
    """A server could not be started or did not become ready."""


class Leash:
    """Runs a shell command when this process ends, however it ends, unless released before."""

    def __init__(self, command: str) -> None:
        # The pipe closes with this process; a session of its own spares the waiting shell Ctrl-C.
        self._shell = subprocess.Popen(
            ["sh", "-c", 'cat >/dev/null; eval "$1"', "leash", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def release(self) -> None:
        os.killpg(self._shell.pid, signal.SIGKILL)
        self._shell.communicate()


class Server(ABC):
    """A server on loopback whose data and address survive :meth:`kill` and :meth:`stop`.

    As a context manager it starts, waits until it answers, and is removed with its data.
    """

    description: str

    @abstractmethod
    def start(self) -> None:
        """Start, or start again with the same data and address; does not wait for readiness."""

    @abstractmethod
    def kill(self) -> None:
        """Kill at once, as a crash does."""

    @abstractmethod
    def stop(self) -> None:
        """Stop in an orderly way."""

    @abstractmethod
    def pause(self) -> None:
        """Freeze: connections stay open, and nothing answers."""

    @abstractmethod
    def unpause(self) -> None:
        """Let a paused server go on."""

    @abstractmethod
    def is_running(self) -> bool:
        """Whether the server's process is there, paused or not."""

    @abstractmethod
    def logs(self) -> str:
        """The last lines that the server logged."""

    @abstractmethod
    def remove(self) -> None:
        """Kill it and delete its data."""

    @abstractmethod
    def problem(self, collections: tuple[str, ...]) -> str | None:
        """What keeps the server from answering for these collections, or None."""

    def restart(self) -> None:
        """Stop in an orderly way and start again."""
        self.stop()
        self.start()

    def wait_until_ready(self, *collections: str, timeout: float = _READY_SECONDS) -> float:
        """Wait for the server and for a real query of each collection; return the seconds it took.

        Raises
        ------
        ServerError
            It ended, or was not ready in time; the message has the end of its log.
        """
        begun = time.monotonic()
        problem = "it ended"
        while self.is_running():
            found = self.problem(collections)
            if found is None:
                return time.monotonic() - begun
            problem = found
            if time.monotonic() - begun > timeout:
                break
            time.sleep(0.1)
        raise ServerError(
            f"The server ({self.description}) was not ready after {time.monotonic() - begun:.0f} "
            f"s: {problem}; its log ends with:\n{self.logs()}"
        )

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


class ServerProcess(Server):
    """A server as a process of one's own, with its data in a temporary folder."""

    _command: list[str]
    _environment: dict[str, str]

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._leashes = [Leash(f"sleep 1; rm -rf {shlex.quote(str(folder))}")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._leashes.append(Leash(f"kill -KILL {self._process.pid}"))

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)  # until it has stopped

    def unpause(self) -> None:
        self._signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        """The process id, for what the system counts of it."""
        if self._process is None:
            raise ServerError("The server's process has not been started.")
        return self._process.pid

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def logs(self) -> str:
        log = self._folder / "server.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return "\n".join(lines[-20:])

    def remove(self) -> None:
        if self.is_running():
            self.kill()
        while self._leashes:
            self._leashes.pop().release()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise ServerError("The server's process has not been started.")
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._leashes.pop().release()  # its process id may soon be another process's


class MilvusServer(Server):
    """A Milvus server; its health page is no readiness, so real queries are.

    The page answers before the server does, and a collection is served tens of seconds later.
    Collections that were loaded load by themselves.

    Parameters
    ----------
    session_ttl
        Seconds for which a killed server's part in the cluster stays reserved. After a kill,
        collections are served again after 36 s with 30 (the server's own default) and after 11 s
        with 5. But a server paused for longer than about half of it may never answer again: take
        the default in tests that pause.
    **settings
        Environment of the server, such as ``QUOTAANDLIMITS_DQL_ENABLED="true"``.
    """

    uri: str

    def __init__(self, session_ttl: int = 30, **settings: str) -> None:
        # A graceful stop would move the data to other query nodes, and there are none.
        self.settings = {
            "COMMON_SESSION_TTL": str(session_ttl),
            "COMMON_GRACEFULSTOPTIMEOUT": "1",
            **settings,
        }

    @abstractmethod
    def configure(self, change: Callable[[str], str]) -> None:
        """Rewrite ``milvus.yaml``, which a running server looks at every few seconds."""

    def problem(self, collections: tuple[str, ...]) -> str | None:
        return _problem(self.uri, collections)


class MilvusProcess(MilvusServer, ServerProcess):
    """The standalone server of the ``milvus`` wheel, in a temporary folder, on free ports.

    Its etcd listens on loopback; Milvus 2.3.5 itself has no setting for that and listens on all
    interfaces.

    Raises
    ------
    ServerError
        The wheel is not installed.
    """

    description = "plain process of the wheel milvus"

    def __init__(self, session_ttl: int = 30, **settings: str) -> None:
        MilvusServer.__init__(self, session_ttl, **settings)
        if importlib.util.find_spec("milvus") is None:
            raise ServerError(MILVUS_HINT)
        ServerProcess.__init__(self, Path(tempfile.mkdtemp(prefix="amips-milvus-")))
        self.uri, self._command, self._environment = _configure(self._folder)
        self._environment.update(self.settings)

    def configure(self, change: Callable[[str], str]) -> None:
        path = self._folder / "configs" / "milvus.yaml"
        path.write_text(change(path.read_text()))


@dataclass(frozen=True)
class QdrantAddress:
    """Where a Qdrant server answers, over REST and gRPC."""

    url: str
    grpc_port: int
    token: str | None = None

    def client(self, **more: Any) -> QdrantClient:
        from qdrant_client import QdrantClient

        return QdrantClient(**self._options(more))

    def async_client(self, **more: Any) -> AsyncQdrantClient:
        from qdrant_client import AsyncQdrantClient

        return AsyncQdrantClient(**self._options(more))

    def uri(self, collection: str) -> str:
        """The collection as the command line wants it."""
        scheme, _, host = self.url.partition("://")
        return f"qdrant{'+https' if scheme == 'https' else ''}://{host}?collection={collection}"

    def ask(self, page: str, timeout: float = 2.0) -> Any:
        """What a page of the REST interface answers."""
        headers = {"api-key": self.token} if self.token else {}
        with urlopen(Request(self.url + page, headers=headers), timeout=timeout) as answer:
            return answer.read()

    def version(self) -> str:
        return str(json.loads(self.ask("/"))["version"])

    def _options(self, more: dict[str, Any]) -> dict[str, Any]:
        return {
            "url": self.url,
            "grpc_port": self.grpc_port,
            "api_key": self.token,
            "timeout": 60,
            "check_compatibility": False,
            **more,
        }


class QdrantServer(Server):
    """A Qdrant server, one node of a cluster perhaps."""

    address: QdrantAddress

    def problem(self, collections: tuple[str, ...]) -> str | None:
        try:
            self.address.ask("/readyz")
            for name in collections:
                self.address.ask(f"/collections/{name}")
        except OSError as exc:
            return str(exc)
        return None


class QdrantProcess(QdrantServer, ServerProcess):
    """The program ``qdrant`` that is on PATH, in a temporary folder, on free ports of loopback.

    Parameters
    ----------
    settings
        Qdrant's own, as in ``{"service__read_only_api_key": "..."}``.
    cluster
        Whether it is the first node of a cluster; custom shard keys need one.
    joins
        A node whose cluster it joins.

    Raises
    ------
    ServerError
        There is no such program.
    """

    def __init__(
        self,
        settings: Mapping[str, str] | None = None,
        *,
        cluster: bool = False,
        joins: QdrantProcess | None = None,
    ) -> None:
        settings = {} if settings is None else settings
        program = shutil.which("qdrant")
        if program is None:
            raise ServerError(QDRANT_HINT)
        self.description = "plain process of the program qdrant on PATH"
        super().__init__(Path(tempfile.mkdtemp(prefix="amips-qdrant-")))
        rest, grpc, peers = free_ports(3)
        token = settings.get("service__api_key")
        self.address = QdrantAddress(f"http://127.0.0.1:{rest}", grpc, token)
        self._peers = f"http://127.0.0.1:{peers}"
        self._first = self if joins is None else joins
        self._clustered = cluster or joins is not None
        self._command = [program, "--disable-telemetry"]
        if self._clustered:
            self._command += ["--uri", self._peers]
        if joins is not None:
            self._command += ["--bootstrap", joins._peers]
        wanted = {
            "service__host": "127.0.0.1",
            "service__http_port": rest,
            "service__grpc_port": grpc,
            "service__enable_static_content": "false",
            "storage__storage_path": self._folder / "storage",
            "storage__snapshots_path": self._folder / "snapshots",
            "cluster__enabled": str(self._clustered).lower(),
            "cluster__p2p__port": peers,
            **settings,
        }
        named = {f"QDRANT__{name.upper()}": str(value) for name, value in wanted.items()}
        self._environment = {**os.environ, **named}

    def problem(self, collections: tuple[str, ...]) -> str | None:
        found = super().problem(collections)
        if found is None and self._first is not self:
            nodes = json.loads(self.address.ask("/cluster"))["result"]["peers"]
            if self._peers not in {node["uri"].rstrip("/") for node in nodes.values()}:
                return f"it has not joined the cluster of {len(nodes)} nodes"
        return found


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on.

    They lie below the range that the system hands to outgoing connections, so that none of those
    takes the port of a server that is down for a moment.
    """
    with ExitStack() as stack:
        ports: list[int] = []
        for port in random.sample(range(20_000, 32_000), 1000):
            listener = stack.enter_context(socket.socket())
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise ServerError(f"There are no {count} free ports.")


def _configure(folder: Path) -> tuple[str, list[str], dict[str, str]]:
    milvus = importlib.import_module("milvus")
    # The embedded etcd ignores the port of the Milvus configuration: two servers on one host would
    # meet on 2379 and 2380, so it gets a file of its own.
    ports = free_ports(12)
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


def _problem(uri: str, collections: tuple[str, ...]) -> str | None:
    """What keeps the server from answering, or None if nothing does."""
    from pymilvus import MilvusClient
    from pymilvus.exceptions import MilvusException

    grpc = importlib.import_module("grpc")

    try:
        client: Any = MilvusClient(uri, timeout=2)
        try:
            client.list_collections(timeout=2)
            for name in collections:
                state = client.get_load_state(name, timeout=2)["state"].name
                if state != "Loaded":
                    return f"collection {name} is {state}"
                # Strong: the answer must hold what was written last.
                client.query(name, "", ["count(*)"], timeout=5, consistency_level="Strong")
        finally:
            client.close()
    except (MilvusException, grpc.RpcError) as exc:  # a paused server's deadlines come through bare
        return str(exc)
    return None
