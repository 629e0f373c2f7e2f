"""An asynchronous client used by threads that block: what happens when its loop does not answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from qdrant_client import AsyncQdrantClient, QdrantClient

from amips_plugins.adapters.sync_facade import BlockingClient, open_blocking
from amips_plugins.errors import CollectionError, DatabaseUnreachable, InvalidInput
from tests.support.event_loop import LoopThread


class Client:
    """A client whose calls end when they are told to; no real one hangs on request."""

    address = "here"

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.cancelled = threading.Event()

    async def twice(self, number: int, *, more: int = 0) -> int:
        await asyncio.sleep(0)
        return 2 * number + more

    async def fail(self) -> None:
        raise TimeoutError("the client's own")

    async def hang(self) -> None:
        self.begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def plain(self) -> str:
        return "at once"


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    with LoopThread() as thread:
        yield thread


def test_coroutines_become_calls_and_the_rest_stays(thread: LoopThread) -> None:
    client = BlockingClient(Client(), thread.loop)
    assert client.twice(3, more=1) == 7
    assert client.plain() == "at once"
    assert client.address == "here"
    assert not hasattr(client, "list_loaded_segments")
    with pytest.raises(TimeoutError, match="own"):
        client.fail()


def test_a_call_on_the_loops_own_thread_is_refused(thread: LoopThread) -> None:
    client = BlockingClient(Client(), thread.loop)

    async def block() -> Any:
        return client.twice(1)

    with pytest.raises(CollectionError, match="to_thread"):
        thread.run(block())
    assert client.twice(1) == 2


def outcome(call: Any) -> tuple[threading.Thread, list[BaseException]]:
    """Call on a thread; what is raised comes into the list."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as exc:  # noqa: BLE001 - it is looked at
            raised.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def test_a_loop_that_stops_lets_no_thread_hang() -> None:
    inner = Client()
    with LoopThread() as thread:
        client = BlockingClient(inner, thread.loop)
        waiting, raised = outcome(client.hang)
        assert inner.begun.wait(20)
        thread.stop()
        waiting.join(20)
        assert not waiting.is_alive()
        (error,) = raised
        assert isinstance(error, DatabaseUnreachable)
        with pytest.raises(DatabaseUnreachable, match="event loop"):  # stopped
            client.twice(1)
        for task in asyncio.all_tasks(thread.loop):
            task.cancel()
        thread.loop.run_until_complete(asyncio.sleep(0))
    with pytest.raises(DatabaseUnreachable, match="event loop"):  # closed
        client.twice(1)


def test_a_call_handed_over_to_a_loop_that_never_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops between the look and the call."""
    with LoopThread() as thread:
        client = BlockingClient(Client(), thread.loop)
        monkeypatch.setattr(client, "_problem", lambda: thread.stop())
        with pytest.raises(DatabaseUnreachable, match="event loop"):
            client.twice(1)


def test_the_end_of_asyncio_run_ends_what_waits() -> None:
    inner = Client()
    waiting: list[Any] = []

    async def main() -> None:
        client = BlockingClient(inner, asyncio.get_running_loop())
        waiting.extend(outcome(client.hang))
        while not inner.begun.is_set():
            await asyncio.sleep(0.01)

    asyncio.run(main())
    thread, raised = waiting
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(raised[0], DatabaseUnreachable)
    assert inner.cancelled.is_set()


def test_an_interrupted_wait_ends_the_call(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Client()
    client = BlockingClient(inner, thread.loop)

    def interrupt(*_: Any) -> None:
        assert inner.begun.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr("amips_plugins.adapters.sync_facade.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.hang()
    assert inner.cancelled.wait(20)


def test_what_is_no_asynchronous_client_is_refused(thread: LoopThread) -> None:
    local = QdrantClient(":memory:")
    for client in (None, Client(), local):
        with pytest.raises(InvalidInput, match="no asynchronous client"):
            open_blocking(client, "docs", None, thread.loop)
    local.close()


def test_a_clients_own_class_may_be_a_users(thread: LoopThread) -> None:
    class Mine(AsyncQdrantClient):
        pass

    client = Mine(":memory:")
    collection = open_blocking(client, "docs", None, thread.loop)
    with pytest.raises(CollectionError, match="has no collection 'docs'"):
        _ = collection.info
    thread.run(client.close())


def test_a_call_may_take_longer_than_a_look_at_the_loop(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amips_plugins.adapters.sync_facade._LOOK", 0.001)
    inner = Client()

    async def slow() -> int:
        await asyncio.sleep(0.05)
        return 7

    inner.hang = slow  # type: ignore[assignment,method-assign]
    assert BlockingClient(inner, thread.loop).hang() == 7
