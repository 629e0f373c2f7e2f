"""A router on a real Milvus server while the server hangs, restarts, denies and loses things.

Whatever the database answers to the bare client, the router raises the same; where the bare
client has an answer, so has the router. ``test_milvus_crashes`` kills; here nothing is lost.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pymilvus
import pytest

from amips_plugins import LearnedRouter
from amips_plugins.adapters.milvus.collection import MilvusCollection
from integration_tests.crashes import COUNT, DIM, make, spec
from integration_tests.servers import MilvusServer
from integration_tests.test_milvus_crashes import AllCells

QUERY = np.ones(DIM, dtype=np.float32)
PATIENCE = 90.0  # a breaker rests up to a minute


@pytest.fixture(scope="module")
def client(milvus_to_pause: MilvusServer) -> Iterator[Any]:
    client = pymilvus.MilvusClient(milvus_to_pause.uri)
    yield client
    client.close()


class Routed:
    """A collection in four cells, a router that searches all of them, and the bare client."""

    def __init__(self, client: Any, live: MilvusCollection) -> None:
        self.client = client
        self.live = live
        self.name = live.info.name
        self.router = LearnedRouter(live, hook=AllCells(), refresh=None)

    def search(self, timeout: float | None = None) -> Any:
        return self.router.search(QUERY, k=5, timeout=timeout)

    def bare(self, timeout: float | None = None) -> list[Any]:
        found = self.client.search(
            self.name,
            data=[QUERY.tolist()],
            anns_field="v",
            limit=5,
            output_fields=["key"],
            timeout=timeout,
        )
        return [hit["entity"]["key"] for hit in found[0]]

    def raises_what_the_bare_client_does(self, *, breaker: bool = False) -> None:
        """And no breaker opens for what the native search was asked for and cannot do either."""
        bare = words(error_of(self.bare))
        for _ in range(7):
            assert words(error_of(self.search)) == bare
        assert set(self.router.fallbacks) == ({"breaker: search"} if breaker else set())

    def find_back(self) -> None:
        """The model is used again, by itself."""
        until(lambda: self.search().trace.mode == "route")
        assert [hit.id for hit in self.search()] == self.bare()


@pytest.fixture(scope="module")
def live(client: Any, tmp_path_factory: pytest.TempPathFactory) -> MilvusCollection:
    """One for all tests, for it takes seconds to make; the last one drops it."""
    return laid_out(client, tmp_path_factory.mktemp("work"))


@pytest.fixture
def routed(client: Any, live: MilvusCollection) -> Routed:
    routed = Routed(client, live)
    assert routed.search().trace.mode == "route"
    return routed


def laid_out(client: Any, work: Path) -> MilvusCollection:
    return MilvusCollection(client, make(client)).layouts.build(spec(work))


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package warns of; pymilvus says things of its own."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("amips_plugins") and record.levelno >= logging.WARNING
    ]


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def error_of(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - compared with the bare client's
        call()
    return caught.value


def words(error: Exception) -> tuple[type, Any, str]:
    """What an error says, without the numbers of this one call."""
    said = str(error) if isinstance(error, pymilvus.MilvusException) else ""
    code = getattr(error, "code", None)
    return type(error), code() if callable(code) else code, re.sub(r"\d+", "0", said)


def test_a_paused_server_costs_the_deadline_and_gives_the_clients_own_error(
    milvus_to_pause: MilvusServer, routed: Routed, caplog: pytest.LogCaptureFixture
) -> None:
    milvus_to_pause.pause()
    try:
        started = time.monotonic()
        bare = error_of(lambda: routed.bare(timeout=0.5))
        alone = time.monotonic() - started
        # Five routed searches that took all the time: from then on the native search has it.
        for _ in range(7):
            started = time.monotonic()
            assert words(error_of(lambda: routed.search(timeout=0.5))) == words(bare)
            assert time.monotonic() - started < alone + 3.0
    finally:
        milvus_to_pause.unpause()
    assert "breaker: search" in routed.router.fallbacks
    routed.find_back()
    assert set(routed.router.fallbacks) == {"breaker: search"}
    rest, breaker, again = ours(caplog)
    assert "Circuit breaker open" in rest
    assert "breaker: search" in breaker
    assert "Circuit breaker closed" in again


def test_a_restart_shows_no_error_that_the_bare_client_has_not(
    milvus_to_pause: MilvusServer, routed: Routed
) -> None:
    """Each search of the router stands between two of the bare client."""
    stop, seen, only_ours = threading.Event(), set[tuple[bool, bool, bool]](), list[object]()

    def attempt(call: Callable[[], object]) -> Exception | None:
        try:
            call()
        except Exception as exc:  # noqa: BLE001 - looked at below
            return exc
        return None

    def search() -> None:
        while not stop.is_set():
            before = attempt(lambda: routed.bare(timeout=2.0))
            ours = attempt(lambda: routed.search(timeout=2.0))
            after = attempt(lambda: routed.bare(timeout=2.0))
            seen.add((before is None, ours is None, after is None))
            if ours is not None and before is None and after is None:
                only_ours.append(ours)

    searching = threading.Thread(target=search)
    searching.start()
    try:
        milvus_to_pause.restart()
        milvus_to_pause.wait_until_ready(routed.name)
        routed.find_back()
    finally:
        stop.set()
        searching.join()
    assert only_ours == []
    assert (False, False, False) in seen  # it was away
    assert (True, True, True) in seen


def test_a_partition_that_is_released_is_searched_around(
    routed: Routed, caplog: pytest.LogCaptureFixture
) -> None:
    """What is dropped for good stands in ``test_milvus_crashes``."""
    partition = "cell_crash1_0001"
    routed.client.release_partitions(routed.name, [partition])
    for _ in range(8):
        hits = routed.search()
        assert hits.trace.mode == "native"
        assert [hit.id for hit in hits] == routed.bare()  # four cells less one
    assert routed.router.fallbacks == {"search: MilvusException": 5, "breaker: search": 3}
    first, rest, breaker = ours(caplog)
    assert "search: MilvusException" in first
    assert "Circuit breaker open" in rest
    assert "breaker: search" in breaker
    routed.client.load_partitions(routed.name, [partition])
    routed.find_back()
    assert "Circuit breaker closed" in ours(caplog)[-1]


def test_an_index_that_is_dropped_and_made_again(routed: Routed) -> None:
    routed.client.release_collection(routed.name)
    routed.client.drop_index(routed.name, "v")
    routed.raises_what_the_bare_client_does()
    index = routed.client.prepare_index_params()
    index.add_index("v", index_type="FLAT", metric_type="IP")
    routed.client.create_index(routed.name, index)
    routed.client.load_collection(routed.name)
    routed.find_back()


@contextmanager
def denied(server: MilvusServer, what: str, while_: Callable[[], object]) -> Iterator[None]:
    """Have a server deny reading or writing, as an operator does in its configuration."""

    def set_to(value: str) -> None:
        pattern = rf"({what}:(?:\n +#.*|\n +forceDeny: \w+)*?\n +forceDeny: )\w+"

        def change(text: str) -> str:
            changed, count = re.subn(pattern, rf"\g<1>{value}", text)
            assert count == 1
            return changed

        server.configure(change)

    def denies() -> bool:
        try:
            while_()
        except pymilvus.MilvusException as exc:
            if "deactivated" not in str(exc):
                raise
            return True
        return False

    set_to("true")
    try:
        until(denies)
        yield
    finally:
        set_to("false")
        until(lambda: not denies())


def test_a_server_that_denies_writing_loses_nothing(
    milvus_to_pause: MilvusServer, routed: Routed
) -> None:
    far = np.full((2, DIM), 30.0, dtype=np.float32)
    probe = f"probe_{secrets.token_hex(3)}"
    routed.client.create_collection(probe, dimension=DIM)
    row = [{"id": 1, "vector": QUERY.tolist()}]
    with denied(milvus_to_pause, "limitWriting", while_=lambda: routed.client.upsert(probe, row)):
        bare = words(error_of(lambda: routed.client.upsert(probe, row)))
        for _ in range(3):
            assert words(error_of(lambda: routed.router.upsert([3, COUNT + 1], far))) == bare
            assert words(error_of(lambda: routed.router.delete([4]))) == words(
                error_of(lambda: routed.client.delete(routed.name, ids=[4]))
            )
        assert routed.live.count() == COUNT
        rows = routed.live.table().read([3, 4])
        assert rows[3]["v"] != far[0].tolist()
        assert routed.search().trace.mode == "route"
    routed.router.upsert([3, COUNT + 1], far)
    routed.router.delete([4])
    assert routed.live.count() == COUNT
    until(lambda: {hit.id for hit in routed.search()} >= {3, COUNT + 1})
    routed.client.drop_collection(probe)


def test_a_server_that_denies_reading(milvus_to_pause: MilvusServer, routed: Routed) -> None:
    with denied(milvus_to_pause, "limitReading", while_=routed.bare):
        # A server that refuses work is not asked a second time, so the native search gets its turn
        # when the circuit breaker opens.
        routed.raises_what_the_bare_client_does(breaker=True)
        assert not routed.router.refresh()
    routed.find_back()


def test_a_collection_that_is_dropped(routed: Routed) -> None:
    """The last one of these: it drops what they share."""
    for alias in routed.client.list_aliases(routed.name)["aliases"]:
        routed.client.drop_alias(alias)
    routed.client.drop_collection(routed.name)
    routed.raises_what_the_bare_client_does()


@pytest.mark.nightly
def test_a_server_that_limits_the_rate_of_searches(
    milvus_limited: MilvusServer, tmp_path: Path
) -> None:
    """The client waits and asks again until the deadline; what it raises then is its own."""
    client = pymilvus.MilvusClient(milvus_limited.uri)
    routed = Routed(client, laid_out(client, tmp_path))

    def flood(search: Callable[[], object]) -> Exception:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                search()
            except Exception as exc:  # noqa: BLE001, PERF203 - compared below
                return exc
        raise AssertionError("no limit was met")

    batch = np.tile(QUERY, (20, 1))
    bare = flood(
        lambda: client.search(
            routed.name, data=batch.tolist(), anns_field="v", limit=5, timeout=1.0
        )
    )
    assert "rate limit" in str(bare)
    ours = flood(lambda: routed.router.search(batch, k=5, timeout=1.0))
    assert type(ours) is type(bare)
    assert "rate limit" in str(ours)
    until(lambda: routed.search().trace.mode == "route")
    client.close()
