from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("milvus_lite")
    return tmp_path_factory.mktemp("milvus") / "docs.db"


@pytest.fixture(scope="module")
def client(path: Path) -> Iterator[Any]:
    pymilvus = pytest.importorskip("pymilvus")
    client = pymilvus.MilvusClient(str(path))
    yield client
    client.close()


@pytest.fixture(autouse=True)
def leave_nothing_behind(client: Any) -> Iterator[None]:
    yield
    for name in client.list_collections():
        for alias in client.list_aliases(name)["aliases"]:
            client.drop_alias(alias)
        client.drop_collection(name)
