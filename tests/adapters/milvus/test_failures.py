"""What pymilvus' errors mean to whoever might ask again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.collection import Failure

exceptions: Any = pytest.importorskip("pymilvus.exceptions")
grpc: Any = pytest.importorskip("grpc")
milvus = exceptions.MilvusException


class Refused(Exception):
    """As gRPC's own errors, which say their status by a method."""

    def __init__(self, status: Any) -> None:
        super().__init__(status.name)
        self._status = status

    def code(self) -> Any:
        return self._status


@pytest.mark.parametrize(
    ("error", "means"),
    [
        (Refused(grpc.StatusCode.DEADLINE_EXCEEDED), Failure.OUTAGE),
        (Refused(grpc.StatusCode.UNAVAILABLE), Failure.OUTAGE),
        (milvus(grpc.StatusCode.UNAVAILABLE, "[search] Retry timeout: 2s"), Failure.OUTAGE),
        (milvus(message="[search] Retry timeout: 2s"), Failure.OUTAGE),
        (milvus(message="[search] Retry run out of 75 retry times"), Failure.OUTAGE),
        (exceptions.ConnectError(message="no route"), Failure.OUTAGE),
        (exceptions.MilvusUnavailableException(message="starting"), Failure.OUTAGE),
        (TimeoutError(), Failure.OUTAGE),
        (asyncio.TimeoutError(), Failure.OUTAGE),
        (ConnectionResetError(), Failure.OUTAGE),
        (Refused(grpc.StatusCode.RESOURCE_EXHAUSTED), Failure.BUSY),
        (milvus(8, "request rate exceeded"), Failure.BUSY),
        (milvus(8, "[search] Retry timeout: 2s, message=rate limit exceeded"), Failure.BUSY),
        (milvus(9, "deny to read"), Failure.BUSY),
        (milvus(1, "limited", compatible_code=49), Failure.BUSY),
        (milvus(65535, "topk [17000] is invalid, it should be in range [1, 16384]"), Failure.SIZE),
        (
            milvus(1, "`limit` value 17000 is illegal, should be in range [1, 16384]"),
            Failure.SIZE,
        ),
        (milvus(100, "can't find collection"), Failure.OTHER),
        (milvus(200, "partition not found"), Failure.OTHER),
        (milvus(1100, "cannot parse expression: a timeout >"), Failure.REQUEST),
        (milvus(6, "unexpected token '>' at column 4", compatible_code=6), Failure.REQUEST),
        (milvus(6, "cross cluster routing"), Failure.OTHER),
        (exceptions.ParamError(message="search_data value is illegal"), Failure.REQUEST),
        (Refused(grpc.StatusCode.INVALID_ARGUMENT), Failure.REQUEST),
        (ValueError("Retry timeout"), Failure.OTHER),
    ],
    ids=str,
)
def test_what_an_error_means(error: Exception, means: Failure) -> None:
    assert MilvusCollection(object(), "docs").failure(error) is means


def test_a_deadline_that_passes_is_an_outage_through_both_clients() -> None:
    async def through_the_asynchronous_one() -> Any:
        client = pymilvus.AsyncMilvusClient("http://127.0.0.1:1", timeout=0.2)
        with pytest.raises(pymilvus.MilvusException) as caught:
            await client.search("docs", data=[[0.0]], timeout=0.2)
        await client.close()
        return caught.value

    pymilvus = pytest.importorskip("pymilvus")
    with pytest.raises(pymilvus.MilvusException) as caught:
        pymilvus.MilvusClient("http://127.0.0.1:1", timeout=0.2)
    collection = MilvusCollection(object(), "docs")
    for error in (caught.value, asyncio.run(through_the_asynchronous_one())):
        assert collection.failure(error) is Failure.OUTAGE, error
