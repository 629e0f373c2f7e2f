"""A Qdrant server that reports its own work, and one that does not."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from amips_plugins import LearnedRouter
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.doctor.diagnose import diagnose
from amips_plugins.evaluation import evaluate
from integration_tests.qdrant_data import DIM, EveryCell, create, fill, keys, queries, spec
from integration_tests.servers import QdrantProcess, ServerError

COUNT = 2000


@pytest.fixture(scope="module", params=["true", "false"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[QdrantProcess, bool]]:
    try:
        process = QdrantProcess({"service__hardware_reporting": request.param})
    except ServerError as exc:
        pytest.skip(str(exc))
    with process:
        yield process, request.param == "true"


def test_evaluate_and_doctor_say_what_the_server_tells(
    server: tuple[QdrantProcess, bool],
) -> None:
    process, tells = server
    client = process.address.client()
    name = create(client)
    fill(client, name, keys(COUNT))
    built = QdrantCollection(client, name).layouts.build(spec())
    router = LearnedRouter(built, hook=EveryCell(), refresh=None)
    native, learned = evaluate(router, queries(40), 10)
    if tells:
        assert learned.bytes_scored == pytest.approx(COUNT * DIM * 4, rel=0.2)
        assert native.bytes_scored is not None
        assert native.bytes_scored == pytest.approx(COUNT * DIM * 4, rel=0.2)  # few: all compared
    else:
        assert (native.bytes_scored, learned.bytes_scored) == (None, None)
    told = dict(diagnose(built, np.asarray(queries(60)), n_cells=4, sample=500).construction)
    assert ("MB of vectors" in told["scored"]) == tells
    client.close()
