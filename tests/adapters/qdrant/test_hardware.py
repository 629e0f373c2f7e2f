"""What a server counts of its searches, read from its raw answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from qdrant_client import QdrantClient

from amips_plugins.adapters.qdrant.hardware import ScoredBytes, scored_bytes


@pytest.mark.parametrize(
    ("answer", "total"),
    [
        (b'{"usage": {"hardware": {"cpu": 1536}}, "result": []}', 1536),
        (b'{"usage": null, "result": []}', None),
        (b'{"result": []}', None),
        (b'{"usage": {"hardware": null}}', None),
        (b"[1]", None),
        (b"not JSON", None),
    ],
)
def test_what_an_answer_tells(answer: bytes, total: int | None) -> None:
    counted = ScoredBytes()
    counted.add(answer)
    assert counted.total == total
    counted.add(b'{"usage": {"hardware": {"cpu": 4}}}')
    assert counted.total == (total or 0) + 4


def test_local_mode_tells_nothing() -> None:
    client = QdrantClient(":memory:")
    with scored_bytes(client) as counted:
        pass
    assert counted.total is None
    client.close()


def test_searches_are_counted_and_nothing_else() -> None:
    """And only in the block; hooks of others stay."""
    client = QdrantClient("http://localhost:1", check_compatibility=False)
    rest: Any = client.http.client._client
    seen: list[str] = []
    rest.event_hooks = {"request": [], "response": [lambda answer: seen.append(answer.url.path)]}

    kinds = ("payload_io", "payload_index_io", "vector_io")
    others = {f"{kind}_{way}": 0 for kind in kinds for way in ("read", "write")}

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(
            200,
            json={
                "usage": {"hardware": {"cpu": 100, **others}},
                "result": {"points": [], "count": 1},
            },
        )

    rest._transport = httpx.MockTransport(answer)
    for _ in range(2):
        with scored_bytes(client) as counted:
            client.query_points("docs", [1.0], limit=1)
            client.query_points("docs", [1.0], limit=1)
            client.count("docs")
        assert counted.total == 200
    client.query_points("docs", [1.0], limit=1)
    assert (len(seen), counted.total) == (7, 200)
    assert len(rest.event_hooks["response"]) == 1
    client.close()
