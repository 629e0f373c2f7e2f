from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

from integration_tests.servers import MILVUS_HINT, milvus_server


@pytest.fixture(scope="session")
def milvus_uri() -> Iterator[str]:
    """A Milvus server: the one named by AMIPS_MILVUS_URI, else one started here, else a skip."""
    given = os.environ.get("AMIPS_MILVUS_URI")
    if given:
        yield given
    elif importlib.util.find_spec("milvus") is None:
        pytest.skip(MILVUS_HINT)
    else:
        with milvus_server() as uri:
            yield uri
