"""What errors of Qdrant's client mean, and which of them work that can wait gets over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from amips_plugins.adapters.qdrant import failures
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.failures import failure_of, patiently, translated_errors
from amips_plugins.collection import Failure
from amips_plugins.errors import AmipsError, CollectionError, DatabaseUnreachable
from tests.support.qdrant_data import fill

grpc: Any = pytest.importorskip("grpc")


def answer(status: int, text: str = "no") -> UnexpectedResponse:
    content = json.dumps({"status": {"error": text}}).encode()
    return UnexpectedResponse(status, "reason", content, httpx.Headers())


class Rpc(grpc.RpcError, grpc.Call):  # type: ignore[misc]
    """What a gRPC call raises."""

    def __init__(self, code: Any, details: str = "no") -> None:
        self._code, self._details = code, details

    def code(self) -> Any:
        return self._code

    def details(self) -> str:
        return self._details


for _name in ("initial_metadata", "trailing_metadata", "is_active", "time_remaining", "cancel"):
    setattr(Rpc, _name, lambda *_: None)
setattr(Rpc, "add_callback", lambda *_: None)  # noqa: B010 - abstract in grpc
Rpc.__abstractmethods__ = frozenset()

CODES = grpc.StatusCode
LATE = "Service internal error: Timeout error: search timed out"
MEANT: list[tuple[BaseException, Failure]] = [
    (answer(500, LATE), Failure.OUTAGE),
    (answer(503), Failure.OUTAGE),
    (answer(408), Failure.OUTAGE),
    (answer(500, "a panic"), Failure.OTHER),
    (answer(429, "Rate limiting exceeded"), Failure.BUSY),
    (answer(403, 'Limit exceeded 200 > 100 for "limit"'), Failure.SIZE),
    (answer(400, "Wrong input: Not existing vector name"), Failure.REQUEST),
    (answer(422, "Validation error in JSON body"), Failure.REQUEST),
    (ResourceExhaustedResponse("Rate limiting exceeded", 3), Failure.BUSY),
    (ResponseHandlingException(httpx.ReadTimeout("late")), Failure.OUTAGE),
    (ResponseHandlingException(httpx.ConnectError("refused")), Failure.OUTAGE),
    (ResponseHandlingException(ValueError("no JSON")), Failure.OTHER),
    (Rpc(CODES.DEADLINE_EXCEEDED), Failure.OUTAGE),
    (Rpc(CODES.UNAVAILABLE), Failure.OUTAGE),
    (Rpc(CODES.INTERNAL, LATE), Failure.OUTAGE),
    (Rpc(CODES.INTERNAL, "a panic"), Failure.OTHER),
    (Rpc(CODES.RESOURCE_EXHAUSTED, "Rate limiting exceeded"), Failure.BUSY),
    (Rpc(CODES.RESOURCE_EXHAUSTED, "Received message larger than max"), Failure.SIZE),
    (Rpc(CODES.INVALID_ARGUMENT), Failure.REQUEST),
    (Rpc(CODES.NOT_FOUND), Failure.OTHER),
    (TimeoutError(), Failure.OUTAGE),
    (ConnectionResetError(), Failure.OUTAGE),
    (KeyError("x"), Failure.OTHER),
]


@pytest.mark.parametrize(("exc", "meant"), MEANT)
def test_what_an_error_means(exc: BaseException, meant: Failure) -> None:
    assert failure_of(exc) is meant
    with pytest.raises(BaseException) as caught, translated_errors("The Qdrant server"):  # noqa: PT011 - any
        raise exc
    found = caught.value
    if isinstance(found, AmipsError):  # means what it was made of, and keeps what was said
        assert failure_of(found) is meant
        if isinstance(exc, UnexpectedResponse) and (exc.status_code or 0) < 500:
            assert failures.said(exc) in str(found)
    else:
        assert found is exc


def test_what_is_gone_may_be_elsewhere() -> None:
    assert failure_of(answer(404, "Collection `docs` doesn't exist!")) is Failure.OTHER


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []
    monkeypatch.setattr("time.sleep", made.append)
    return made


@pytest.mark.parametrize(
    "exc",
    [
        answer(503),
        answer(500, "Failed to find a leader"),
        answer(500, "Failed to apply operation to at least one replica. Please retry."),
        Rpc(CODES.INTERNAL, "Failed to apply operation to at least one replica. Please retry."),
        answer(429),
        ResourceExhaustedResponse("full", 3),
        Rpc(CODES.RESOURCE_EXHAUSTED),
    ],
)
def test_work_that_can_wait_waits(exc: Exception, pauses: list[float]) -> None:
    left = [exc, exc]

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    assert patiently(call) == "done"
    assert len(pauses) == 2
    if isinstance(exc, ResourceExhaustedResponse):
        assert min(pauses) >= 3


def test_there_is_an_end_to_it(pauses: list[float]) -> None:
    for exc, tries in (
        (answer(503), 8),
        (answer(400), 1),
        (answer(500, "a panic"), 1),
        (Rpc(CODES.INTERNAL, "a panic"), 1),
        (ResourceExhaustedResponse("full", 3600), 1),
        (Rpc(CODES.INVALID_ARGUMENT), 1),
        (ResponseHandlingException(httpx.ConnectError("refused")), 1),
    ):
        calls = 0

        def call(exc: Exception = exc) -> None:
            nonlocal calls
            calls += 1
            raise exc

        with pytest.raises(type(exc)):
            patiently(call)
        assert calls == tries
    assert sum(pauses) < 120


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    opened = QdrantClient(":memory:")
    fill(opened)
    yield opened
    opened.close()


def test_refusals_keep_the_servers_reason(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(exc: Exception) -> Any:
        def call(*_: Any, **__: Any) -> None:
            raise exc

        return call

    collection = QdrantCollection(client, "docs")
    assert collection.layout() is None
    monkeypatch.setattr(client, "upsert", refuse(answer(403, "The token has expired")))
    with pytest.raises(DatabaseUnreachable, match="The token has expired"):
        collection.upsert([1], collection.fetch([1]).vectors, [{"row": 1}])
    monkeypatch.setattr(client, "upsert", refuse(answer(400, "Wrong input: too long")))
    with pytest.raises(CollectionError, match="Wrong input: too long"):
        collection.upsert([1], collection.fetch([1]).vectors, [{"row": 1}])


def test_the_clients_own_timeout() -> None:
    server: dict[str, Any] = {"url": "http://127.0.0.1:1", "check_compatibility": False}
    assert QdrantCollection(QdrantClient(**server), "docs").timeout == 5.0
    assert QdrantCollection(QdrantClient(**server, timeout=7), "docs").timeout == 7.0
    assert QdrantCollection(QdrantClient(":memory:"), "docs").timeout is None
