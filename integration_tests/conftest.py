"""Where each server comes from; the summary of a run says which it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from integration_tests.containers import (
    MilvusContainer,
    any_qdrant,
    given_qdrant,
    milvus_image,
    no_engine,
    own_qdrant,
)
from integration_tests.servers import (
    MilvusProcess,
    MilvusServer,
    QdrantAddress,
    QdrantProcess,
    QdrantServer,
    ServerError,
)

QDRANT_KEYS = {
    "service__api_key": "all of it, for the tests",
    "service__read_only_api_key": "reading, for the tests",
    "service__jwt_rbac": "true",
}
KILL_TTL = 8  # seconds; see MilvusServer

BY_DAY = {
    "test_native_search_equals_the_reference",
    "test_scan_reads_every_key_once",
    "test_a_search_finds_the_keys_of_its_cells_only",
    "test_keys_without_a_cell_are_always_found",
    "test_a_key_that_moves_leaves_no_copy_behind",
    "test_backfill_gives_the_overflow_its_cells",
    "test_keys_in_several_cells_are_written_and_deleted_as_one",
    "test_a_build_goes_on_after_an_interruption",
    "test_the_values_of_a_field_are_cells",
}
"""What of the contract a server is held to in ``make test``; ``make nightly`` takes the rest."""

SERVERS = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SERVERS] = {}


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for name, description in config.stash[SERVERS].items():
        terminalreporter.write_line(f"{name}: {description}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most of the contract to the night: the adapters' own tests run all of it by day."""
    for item in items:
        contract = isinstance(item, pytest.Function) and item.cls is not None
        if contract and item.path.parent == Path(__file__).parent and item.name not in BY_DAY:
            item.add_marker(pytest.mark.nightly)


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
def qdrant(pytestconfig: pytest.Config) -> Iterator[QdrantAddress]:
    """A Qdrant server: AMIPS_QDRANT_URL, else the program on PATH, a container, or a skip."""
    with ExitStack() as stack:
        try:
            address, description = stack.enter_context(any_qdrant())
        except ServerError as exc:
            pytest.skip(str(exc))
        pytestconfig.stash[SERVERS]["Qdrant"] = f"{description}, {address.version()}"
        yield address


@pytest.fixture(scope="session")
def qdrant_url(qdrant: QdrantAddress) -> str:
    return qdrant.url


@pytest.fixture(scope="module")
def qdrant_to_break(pytestconfig: pytest.Config) -> Iterator[QdrantServer]:
    """A server of one's own, to kill, pause and restart."""
    with _own_qdrant(pytestconfig, "Qdrant to break") as server:
        yield server


@pytest.fixture(scope="module")
def qdrant_with_keys(pytestconfig: pytest.Config) -> Iterator[QdrantServer]:
    """A server of one's own that knows a key for everything, one for reading, and JWTs."""
    with _own_qdrant(pytestconfig, "Qdrant with keys", QDRANT_KEYS) as server:
        yield server


@pytest.fixture(scope="module")
def qdrant_cluster(pytestconfig: pytest.Config) -> Iterator[list[QdrantProcess]]:
    """Three nodes, each a process of one's own."""
    with ExitStack() as stack:
        first = stack.enter_context(_qdrant_node(pytestconfig))
        others = [stack.enter_context(QdrantProcess(joins=first)) for _ in range(2)]
        yield [first, *others]


@pytest.fixture(scope="module")
def qdrant_node(pytestconfig: pytest.Config) -> Iterator[QdrantAddress]:
    """A server in cluster mode, which custom shard keys take; one node will do."""
    given = given_qdrant()
    if given is not None and json.loads(given.ask("/cluster"))["result"]["status"] == "enabled":
        pytestconfig.stash[SERVERS]["Qdrant node"] = "the server that AMIPS_QDRANT_URL names"
        yield given
    else:
        with _qdrant_node(pytestconfig) as node:
            yield node.address


def _own_qdrant(
    config: pytest.Config, name: str, settings: Mapping[str, str] | None = None
) -> QdrantServer:
    try:
        server = own_qdrant(settings)
    except ServerError as exc:
        pytest.skip(str(exc))
    config.stash[SERVERS][name] = server.description
    return server


def _qdrant_node(config: pytest.Config) -> QdrantProcess:
    try:
        node = QdrantProcess(cluster=True)
    except ServerError as exc:
        pytest.skip(f"{exc}; a cluster takes the program")
    config.stash[SERVERS]["Qdrant cluster"] = node.description
    return node


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
