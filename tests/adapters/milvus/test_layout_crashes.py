"""A build of cells that dies, at every step and with others writing, loses and doubles nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.cell_layout import Storage
from tests.support.milvus_collection import COUNT, make, spec
from tests.support.milvus_crashing import Killed, Watched, Writer, check, contents

pytestmark = pytest.mark.slow


def some_ids(writer: Writer) -> list[int]:
    return [int(key) for key in writer.rng.choice(COUNT + 20, 2, replace=False)]


def start(client: Any) -> Writer:
    make(client)
    client.create_alias("docs", "live")
    return Writer(client, fields={"extra": {}})


def steps(client: Any, storage: Storage, work: Path) -> int:
    """How often a build changes something."""
    start(client)
    told: list[str] = []
    watched = Watched(client, lambda name, _: told.append(name))
    MilvusCollection(watched, "live").layouts.build(spec(storage=storage, work=work))
    return len(told)


def clear(client: Any) -> None:
    for name in client.list_collections():
        for alias in client.list_aliases(name)["aliases"]:
            client.drop_alias(alias)
        client.drop_collection(name)


@pytest.mark.parametrize(
    "storage", ["partitions", pytest.param("field", marks=pytest.mark.nightly)]
)
def test_killed_at_every_step(client: Any, storage: Storage, tmp_path: Path) -> None:
    total = steps(client, storage, tmp_path)
    assert total > 15
    for deadly in range(total):
        clear(client)
        writer = start(client)
        told: list[str] = []

        def die(name: str, _: bool, told: list[str] = told, deadly: int = deadly) -> None:
            told.append(name)
            if len(told) == deadly + 1:
                raise Killed

        layout = spec(storage=storage, work=tmp_path)
        with pytest.raises(Killed):
            MilvusCollection(Watched(client, die), "live").layouts.build(layout)
        for _ in range(3):
            writer.write(some_ids(writer))
        live = MilvusCollection(client, "live")
        assert contents(live) == {key: list(map(float, v)) for key, v in writer.expected.items()}
        if live.layout() is None or live.layouts.status().unfinished:
            live = live.layouts.build(layout)
        check(live, writer.expected)
        assert live.layouts.status().unfinished == ()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("storage", ["partitions", "field"])
@pytest.mark.parametrize("seed", range(3))
def test_others_write_at_every_step(
    client: Any, storage: Storage, seed: int, tmp_path: Path
) -> None:
    writer = start(client)
    writer.rng = np.random.default_rng(seed)
    left = [40]

    def meddle(_name: str, done: bool) -> None:
        if done and left[0] and writer.rng.random() < 0.5:
            left[0] -= 1
            writer.write(some_ids(writer))

    MilvusCollection(Watched(client, meddle), "live").layouts.build(
        spec(storage=storage, work=tmp_path)
    )
    check(MilvusCollection(client, "live"), writer.expected)
