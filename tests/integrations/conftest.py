from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from integration_tests.containers import any_qdrant
from integration_tests.servers import QdrantAddress, ServerError

pytest.register_assert_rewrite("tests.integrations.congruence")


@pytest.fixture(scope="session")
def qdrant_server() -> Iterator[QdrantAddress]:
    """The server that the integration tests find, or a skip."""
    with ExitStack() as stack:
        try:
            address, _ = stack.enter_context(any_qdrant())
        except ServerError as exc:
            pytest.skip(str(exc))
        yield address
