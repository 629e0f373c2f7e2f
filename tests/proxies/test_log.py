"""A routed client without any bundle answers as it would, and writes the log that tune reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from qdrant_client import QdrantClient

from amips_plugins import LearnedRouter, route
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.errors import InvalidInput
from amips_plugins.proxies.late import LateRouter
from amips_plugins.routing.observers import Observation
from tests.support.qdrant_data import KEYS, fill


def test_every_search_is_told_and_the_answer_is_the_clients_own(tmp_path: Path) -> None:
    client = QdrantClient(":memory:")
    fill(client)
    router = LearnedRouter(QdrantCollection(client, "docs"), registry=tmp_path, refresh=None)
    seen = list[Observation]()
    routed = route(client, router, log=seen.append)
    for key in KEYS[:3]:
        found = routed.query_points("docs", query=key.tolist(), limit=5)
        assert found == client.query_points("docs", query=key.tolist(), limit=5)
    asked = np.concatenate([one.queries for one in seen])
    np.testing.assert_array_equal(asked, KEYS[:3])
    late = LateRouter("docs", lambda: router)
    with pytest.raises(InvalidInput, match="no router to log"):
        route(client, late, log=seen.append)
    client.close()
