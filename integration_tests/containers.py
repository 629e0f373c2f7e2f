"""Servers in containers, by way of the ``docker`` command.

Each container listens on loopback only, has a memory limit, and carries its owner's process id: a
leash removes it when that process ends, and whatever a lost leash left is removed by the next run.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from integration_tests.servers import (
    QDRANT_HINT,
    Leash,
    MilvusServer,
    QdrantAddress,
    QdrantProcess,
    QdrantServer,
    ServerError,
    free_ports,
)

__all__ = [
    "MilvusContainer",
    "QdrantContainer",
    "any_qdrant",
    "given_qdrant",
    "milvus_image",
    "no_engine",
    "own_qdrant",
    "qdrant_image",
]

COMPOSE = Path(__file__).parent.parent / "docker" / "compose.yaml"
WHEEL_IMAGE = "amips-milvus:2.3.5"  # what docker/start-engine builds

_OWNER = "amips.owner"
_MEMORY = "3g"
_LOOK_UP_SECONDS = 10.0
_PULL_SECONDS = 200.0  # within pytest's own limit


def docker(*arguments: str, timeout: float = 60.0) -> str:
    """Run a docker command and return what it prints.

    Raises
    ------
    ServerError
        There is no such command, or it failed or took too long.
    """
    try:
        done = subprocess.run(
            ["docker", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ServerError(f"`docker {arguments[0]}` could not be run: {exc}") from exc
    if done.returncode:
        raise ServerError(f"`docker {arguments[0]}` failed: {done.stderr.strip()}")
    return done.stdout.strip()


@functools.cache
def no_engine() -> str | None:
    """Why containers cannot be used here, or None if they can; removes containers left behind."""
    if shutil.which("docker") is None:
        return "there is no docker command (docker/start-engine installs it)"
    try:
        docker("info", timeout=_LOOK_UP_SECONDS)
    except ServerError:
        return "no Docker engine answers (docker/start-engine starts one)"
    _remove_stale()
    return None


@dataclass(frozen=True)
class Image:
    """An image and what a container of it needs."""

    name: str
    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@functools.cache
def milvus_image() -> Image:
    """The image of the wheel if it has been built, else the official one.

    Raises
    ------
    ServerError
        Neither is here, and the official one cannot be pulled.
    """
    if _is_here(WHEEL_IMAGE):
        return Image(WHEEL_IMAGE)
    environment = {
        "DEPLOY_MODE": "STANDALONE",
        "ETCD_USE_EMBED": "true",
        "ETCD_DATA_DIR": "/var/lib/milvus/etcd",
        "COMMON_STORAGETYPE": "local",
    }
    name = _get(_pinned("milvusdb/milvus"))
    return Image(name, ("milvus", "run", "standalone"), environment)


@functools.cache
def qdrant_image() -> Image:
    """The official image of Qdrant.

    Raises
    ------
    ServerError
        It is not here and cannot be pulled.
    """
    return Image(_get(_pinned("qdrant/qdrant")), (), {"QDRANT__TELEMETRY_DISABLED": "true"})


class Container:
    """One container with published ports; its data and ports survive a kill."""

    def __init__(
        self, image: Image, inner_port: int, environment: dict[str, str], *more: int
    ) -> None:
        self.ports = free_ports(1 + len(more))
        self.port = self.ports[0]
        self.name = f"amips-test-{secrets.token_hex(4)}"
        options = ["--name", self.name, "--label", f"{_OWNER}={_owner()}"]
        for port, inner in zip(self.ports, (inner_port, *more), strict=True):
            options += ["--publish", f"127.0.0.1:{port}:{inner}"]
        options += ["--memory", _MEMORY, "--memory-swap", _MEMORY, "--pids-limit", "4096"]
        options += ["--security-opt", "no-new-privileges"]
        for key, value in {**image.environment, **environment}.items():
            options += ["--env", f"{key}={value}"]
        # First the leash: a container must never be without one.
        self._leash: Leash | None = Leash(f"docker rm -fv {self.name}")
        try:
            docker("create", *options, image.name, *image.command)
        except BaseException:
            self.remove()
            raise

    def do(self, verb: str, *arguments: str) -> str:
        return docker(verb, *arguments, self.name)

    def is_running(self) -> bool:
        return docker("inspect", "--format", "{{.State.Running}}", self.name) == "true"

    def logs(self) -> str:
        done = subprocess.run(
            ["docker", "logs", "--tail", "20", self.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return done.stdout

    def rewrite(self, path: str, change: Callable[[str], str]) -> None:
        """Change a file of the running container; variables in its path are the container's."""
        shell = ["docker", "exec", "--user", "root", "--interactive", self.name, "sh", "-c"]
        before = subprocess.run(
            [*shell, f'cat "{path}"'], capture_output=True, text=True, check=True
        ).stdout
        subprocess.run([*shell, f'cat >"{path}"'], input=change(before), text=True, check=True)

    def remove(self) -> None:
        if self._leash is not None:
            subprocess.run(["docker", "rm", "-fv", self.name], capture_output=True)
            self._leash.release()
            self._leash = None


class MilvusContainer(MilvusServer):
    """Milvus in a container of the image that :func:`milvus_image` finds."""

    def __init__(self, session_ttl: int = 30, **settings: str) -> None:
        super().__init__(session_ttl, **settings)
        image = milvus_image()
        self.description = f"container {image.name}"
        self._container = Container(image, 19530, self.settings)
        self.uri = f"http://127.0.0.1:{self._container.port}"

    def start(self) -> None:
        self._container.do("start")

    def kill(self) -> None:
        self._container.do("kill", "--signal", "KILL")
        self._container.do("wait")

    def stop(self) -> None:
        self._container.do("stop", "--time", "30")

    def pause(self) -> None:
        self._container.do("pause")

    def unpause(self) -> None:
        self._container.do("unpause")

    def configure(self, change: Callable[[str], str]) -> None:
        self._container.rewrite("${MILVUSCONF:-/milvus/configs}/milvus.yaml", change)

    def is_running(self) -> bool:
        return self._container.is_running()

    def logs(self) -> str:
        return self._container.logs()

    def remove(self) -> None:
        self._container.remove()


class QdrantContainer(QdrantServer):
    """Qdrant in a container of the official image; settings as for ``QdrantProcess``."""

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        settings = {} if settings is None else settings
        image = qdrant_image()
        self.description = f"container {image.name}"
        named = {f"QDRANT__{name.upper()}": value for name, value in settings.items()}
        self._container = Container(image, 6333, named, 6334)
        rest, grpc = self._container.ports
        token = settings.get("service__api_key")
        self.address = QdrantAddress(f"http://127.0.0.1:{rest}", grpc, token)

    def start(self) -> None:
        self._container.do("start")

    def kill(self) -> None:
        self._container.do("kill", "--signal", "KILL")
        self._container.do("wait")

    def stop(self) -> None:
        self._container.do("stop", "--time", "30")

    def pause(self) -> None:
        self._container.do("pause")

    def unpause(self) -> None:
        self._container.do("unpause")

    def is_running(self) -> bool:
        return self._container.is_running()

    def logs(self) -> str:
        return self._container.logs()

    def remove(self) -> None:
        self._container.remove()


def given_qdrant() -> QdrantAddress | None:
    """The server that AMIPS_QDRANT_URL names, or None; gRPC is at the next port, if not given."""
    url = os.environ.get("AMIPS_QDRANT_URL", "").rstrip("/")
    if not url:
        return None
    port = os.environ.get("AMIPS_QDRANT_GRPC_PORT") or (urlsplit(url).port or 6333) + 1
    return QdrantAddress(url, int(port), os.environ.get("AMIPS_QDRANT_API_KEY"))


def own_qdrant(settings: Mapping[str, str] | None = None) -> QdrantServer:
    """A server of one's own: the program on PATH, else a container.

    Raises
    ------
    ServerError
        There is neither.
    """
    if shutil.which("qdrant"):
        return QdrantProcess(settings)
    reason = no_engine() or _no_image(qdrant_image)
    if reason is None:
        return QdrantContainer(settings)
    raise ServerError(f"{QDRANT_HINT} ({reason})")


@functools.cache
def _no_image(look_up: Callable[[], Image]) -> str | None:
    """Why an image cannot be had; looking for it may take seconds."""
    try:
        look_up()
    except ServerError as exc:
        return str(exc)
    return None


@contextmanager
def any_qdrant() -> Iterator[tuple[QdrantAddress, str]]:
    """A server for tests that leave it running, and where it is from.

    Raises
    ------
    ServerError
        There is none.
    """
    given = given_qdrant()
    if given is not None:
        yield given, "the server that AMIPS_QDRANT_URL names"
    else:
        with own_qdrant() as server:
            yield server.address, server.description


def _pinned(repository: str) -> str:
    match = re.search(rf"image: (\S*{re.escape(repository)}:\S+)", COMPOSE.read_text())
    if match is None:
        raise ServerError(f"{COMPOSE} names no image of {repository}.")
    return match[1]


def _is_here(image: str) -> bool:
    try:
        docker("image", "inspect", "--format", "{{.Id}}", image)
    except ServerError:
        return False
    return True


def _get(image: str) -> str:
    if not _is_here(image):
        try:  # a look-up first: where there is no registry, it is soon known
            docker("manifest", "inspect", image, timeout=_LOOK_UP_SECONDS)
            docker("pull", "--quiet", image, timeout=_PULL_SECONDS)
        except ServerError as exc:
            raise ServerError(f"the image {image} is not here and cannot be pulled") from exc
    return image


def _owner() -> str:
    return f"{socket.gethostname()}/{os.getpid()}"


def _remove_stale() -> None:
    listing = docker(
        "ps",
        "--all",
        "--filter",
        f"label={_OWNER}",
        "--format",
        f'{{{{.ID}}}} {{{{.Label "{_OWNER}"}}}}',
    )
    for line in listing.splitlines():
        container, owner = line.split()
        host, _, process = owner.rpartition("/")
        if host == socket.gethostname() and not _is_alive(int(process)):
            docker("rm", "-fv", container)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
