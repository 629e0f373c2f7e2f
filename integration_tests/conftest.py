"""Where each server comes from; the summary of a run says which it was."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest

from integration_tests.containers import (
    MilvusContainer,
    QdrantContainer,
    milvus_image,
    no_engine,
    qdrant_image,
)
from integration_tests.servers import MilvusProcess, MilvusServer, ServerError

QDRANT_HINT = (
    "no Qdrant server: start `docker compose -f docker/compose.yaml up -d --wait qdrant` "
    "and set AMIPS_QDRANT_URL, for example to http://127.0.0.1:6333"
)
KILL_TTL = 8  # seconds; see MilvusServer

SERVERS = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SERVERS] = {}


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for name, description in config.stash[SERVERS].items():
        terminalreporter.write_line(f"{name}: {description}")


@pytest.fixture(scope="session")
def milvus_uri(pytestconfig: pytest.Config) -> Iterator[str]:
    """A Milvus server: AMIPS_MILVUS_URI, else a container, else a plain process, else a skip."""
    given = os.environ.get("AMIPS_MILVUS_URI")
    if given:
        pytestconfig.stash[SERVERS]["Milvus"] = "the server that AMIPS_MILVUS_URI names"
        yield given
    else:
        with _own_milvus(pytestconfig, "Milvus") as server:
            yield server.uri


@pytest.fixture(scope="module")
def milvus_to_kill(pytestconfig: pytest.Config) -> Iterator[MilvusServer]:
    """A server of one's own that is soon ready again after a kill. Not for pauses."""
    with _own_milvus(pytestconfig, "Milvus to kill", KILL_TTL) as server:
        yield server


@pytest.fixture(scope="module")
def milvus_to_pause(pytestconfig: pytest.Config) -> Iterator[MilvusServer]:
    """A server of one's own that survives pauses of up to 15 seconds."""
    with _own_milvus(pytestconfig, "Milvus to pause") as server:
        yield server


@pytest.fixture(scope="module")
def milvus_limited(pytestconfig: pytest.Config) -> Iterator[MilvusServer]:
    """A server of one's own that answers five queries a second."""
    limits = {
        "QUOTAANDLIMITS_DQL_ENABLED": "true",
        "QUOTAANDLIMITS_DQL_SEARCHRATE_MAX": "5",
        "QUOTAANDLIMITS_DQL_SEARCHRATE_COLLECTION_MAX": "5",
    }
    with _own_milvus(pytestconfig, "Milvus with limits", settings=limits) as server:
        yield server


@pytest.fixture(scope="module")
def milvus_container(pytestconfig: pytest.Config) -> Iterator[MilvusContainer]:
    """Like `milvus_to_kill`, and surely a container; else a skip."""
    reason = _no_milvus_container()
    if reason:
        pytest.skip(f"no Milvus container: {reason}")
    server = MilvusContainer(KILL_TTL)
    pytestconfig.stash[SERVERS]["Milvus container"] = server.description
    with server:
        yield server


@pytest.fixture(scope="session")
def qdrant_url(pytestconfig: pytest.Config) -> Iterator[str]:
    """A Qdrant server: AMIPS_QDRANT_URL, else a container, else a skip."""
    given = os.environ.get("AMIPS_QDRANT_URL")
    if given:
        pytestconfig.stash[SERVERS]["Qdrant"] = "the server that AMIPS_QDRANT_URL names"
        yield given
        return
    reason = no_engine()
    if reason is None:
        try:
            qdrant_image()
        except ServerError as exc:
            reason = str(exc)
    if reason:
        pytest.skip(f"{QDRANT_HINT} ({reason})")
    container = QdrantContainer()
    pytestconfig.stash[SERVERS]["Qdrant"] = container.description
    with container as url:
        yield url


def _own_milvus(
    config: pytest.Config,
    name: str,
    session_ttl: int = 30,
    settings: Mapping[str, str] | None = None,
) -> MilvusServer:
    reason = _no_milvus_container()
    server: MilvusServer
    try:
        make = MilvusProcess if reason else MilvusContainer
        server = make(session_ttl, **(settings or {}))
    except ServerError as exc:
        pytest.skip(str(exc))
    config.stash[SERVERS][name] = server.description + (f" ({reason})" if reason else "")
    return server


def _no_milvus_container() -> str | None:
    reason = no_engine()
    if reason is None:
        try:
            milvus_image()
        except ServerError as exc:
            reason = str(exc)
    return reason
