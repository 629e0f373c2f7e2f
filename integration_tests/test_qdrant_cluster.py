"""Three Qdrant nodes with replicas: one is away, behind, paused or restarted.

A few kills, a pause and a restart in a developer's run; with ``AMIPS_NIGHTLY`` a hundred kills,
twenty pauses and twenty restarts.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter, QdrantCollection
from amips_plugins.vectors import FloatArray
from integration_tests.qdrant_data import (
    DIM,
    LAYOUT,
    NIGHTLY,
    Background,
    EveryCell,
    by_sign,
    check,
    create,
    error_of,
    fill,
    keys,
    spec,
    until,
)
from integration_tests.servers import QdrantProcess

COUNT = 1500
KILLS, PAUSES, RESTARTS = (100, 20, 20) if NIGHTLY else (2, 1, 1)


@pytest.fixture
def client(qdrant_cluster: list[QdrantProcess]) -> Iterator[QdrantClient]:
    client = qdrant_cluster[0].address.client()
    yield client
    for found in client.get_collections().collections:
        client.delete_collection(found.name)
    client.close()


@pytest.fixture
def name(client: QdrantClient) -> str:
    name = create(client, shard_number=3, replication_factor=2, write_consistency_factor=1)
    fill(client, name, keys(COUNT))
    return name


class Balanced:
    """A balancer in front of the nodes: every call goes to the next."""

    def __init__(self, clients: list[QdrantClient]) -> None:
        self.clients = clients
        self.turn = 0

    def __getattr__(self, name: str) -> Any:
        if name == "init_options":
            return self.clients[0].init_options
        if not callable(getattr(self.clients[0], name)):
            return getattr(self.clients[0], name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.turn += 1
            return getattr(self.clients[self.turn % len(self.clients)], name)(*args, **kwargs)

        return call


def test_a_layout_through_a_balancer(
    qdrant_cluster: list[QdrantProcess], client: QdrantClient, name: str
) -> None:
    """What was just written may not be there when it is read through another node."""
    balanced: Any = Balanced([node.address.client() for node in qdrant_cluster])
    built = QdrantCollection(balanced, name).layouts.build(spec())
    assert built.layout() == LAYOUT
    check(client, name, dict(enumerate(keys(COUNT))))
    second = spec(lambda ids, vectors: (by_sign(ids, vectors) + 1) % 4)
    again = built.layouts.build(replace(second, layout="shifted"))
    assert again.layout() == "shifted"
    back = again.layouts.roll_back()
    assert back.layout() == LAYOUT
    assert back.layouts.drop_old() == ["shifted"]
    check(client, name, dict(enumerate(keys(COUNT))))
    for node in qdrant_cluster:
        assert QdrantCollection(node.address.client(), name).layout() == LAYOUT


def test_builds_through_two_nodes_one_after_the_other(
    qdrant_cluster: list[QdrantProcess], client: QdrantClient, name: str
) -> None:
    """The first one stops in the middle; the other goes on where it was."""
    first, second = (node.address.client() for node in qdrant_cluster[:2])

    def interrupted(_: Any, __: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        QdrantCollection(first, name).layouts.build(spec(interrupted))
    QdrantCollection(second, name).layouts.build(spec())
    check(client, name, dict(enumerate(keys(COUNT))))
    assert QdrantCollection(first, name).layouts.status().unfinished == ()


class Service:
    """Searches and writes through a node; some keys are its own to write."""

    def __init__(self, node: QdrantProcess, name: str, place: int) -> None:
        self.name = name
        self.client = node.address.client(timeout=5)
        collection = QdrantCollection(self.client, name)
        self.router = LearnedRouter(collection, hook=EveryCell(), refresh=None)
        self.rng = np.random.default_rng(place)
        self.own = list(range(place, COUNT, 3))
        self.expected: dict[Any, FloatArray] = {}
        self.doubtful: set[Any] = set()
        """Whether the last write of these came through, nobody knows."""
        self.bare_errors: list[Exception] = []
        self.errors: list[Exception] = []
        self.only_ours: list[Exception] = []
        self.hidden: list[Any] = []
        self.found = 0

    def search(self) -> None:
        """Between two searches of the bare client, for a key that was written before."""
        settled = [one for one in list(self.expected) if one not in self.doubtful]
        one = settled[int(self.rng.integers(len(settled)))] if settled else None
        vector = np.ones(DIM, np.float32) if one is None else self.expected[one]

        def bare() -> Any:
            return self.client.query_points(self.name, vector.tolist(), limit=20).points

        before = error_of(bare)
        ours = error_of(lambda: self.look(one, vector, bare))
        if ours is not None:
            self.errors.append(ours)
            # A node may have gone away just now: the second of ours has bare ones on both sides.
            between = error_of(bare)
            again = error_of(lambda: self.look(one, vector, bare))
            after = error_of(bare)
            before = before or between or after
            if again is not None and before is None:
                self.only_ours.append(again)
        if before is not None:
            self.bare_errors.append(before)

    def look(self, one: Any, vector: Any, bare: Callable[[], Any]) -> None:
        hits = self.router.search(vector, k=20)
        assert len({hit.id for hit in hits}) == 20
        self.found += 1
        hidden = one is not None and one not in {hit.id for hit in hits}
        settled = one not in self.doubtful and self.expected.get(one) is vector
        if hidden and settled and one in {point.id for point in bare()}:
            self.hidden.append(one)

    def write(self) -> None:
        one = self.own[int(self.rng.integers(len(self.own)))]
        vector = (self.rng.standard_normal(DIM) * 3).astype(np.float32)
        self.doubtful.add(one)
        point = models.PointStruct(id=one, vector=vector.tolist(), payload={"row": one})
        self.client.upsert(self.name, [point], wait=True)
        self.expected[one] = vector
        self.doubtful.discard(one)


def take_away(node: QdrantProcess, what: str) -> Callable[[], None]:
    """Have a node go away; returns what brings it back."""
    if what == "pause":
        node.pause()
        return node.unpause
    if what == "kill":
        node.kill()
    else:
        node.stop()
    return node.start


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("what", "times"), [("kill", KILLS), ("pause", PAUSES), ("restart", RESTARTS)]
)
def test_a_node_goes_away_under_searches_and_writes(
    qdrant_cluster: list[QdrantProcess], client: QdrantClient, name: str, what: str, times: int
) -> None:
    """And while a backfill runs: nothing lost, nothing hidden, no error of ours alone."""
    QdrantCollection(client, name).layouts.build(spec())
    whole(qdrant_cluster, name)
    chance = np.random.default_rng(times)
    services = [Service(node, name, place) for place, node in enumerate(qdrant_cluster)]
    with ExitStack() as stack:
        for service in services:
            stack.enter_context(Background(service.search))
            stack.enter_context(Background(service.write))
        for _ in range(times):
            gone = int(chance.integers(3))
            other = services[(gone + 1) % 3].client
            back = threading.Timer(chance.uniform(0.3, 1.5), take_away(qdrant_cluster[gone], what))
            back.start()
            error_of(lambda: QdrantCollection(other, name).layouts.backfill(by_sign))  # noqa: B023
            back.join()
            whole(qdrant_cluster, name)
    assert [[str(one) for one in service.only_ours] for service in services] == [[], [], []]
    assert [service.hidden for service in services] == [[], [], []]
    assert min(service.found for service in services) > 0
    kinds = {type(error) for service in services for error in service.bare_errors}
    assert {type(error) for service in services for error in service.errors} <= kinds
    until(
        lambda: error_of(lambda: QdrantCollection(client, name).layouts.backfill(by_sign)) is None
    )
    expected: dict[Any, FloatArray] = dict(enumerate(keys(COUNT)))
    for service in services:
        expected |= service.expected
        for one in service.doubtful:
            expected.pop(one)
            client.delete(name, models.PointIdsList(points=[one]), wait=True)
    for node in qdrant_cluster:
        check(node.address.client(), name, expected)
    assert QdrantCollection(client, name).overflow() == 0


def whole(nodes: list[QdrantProcess], name: str) -> None:
    """Wait until every replica that any node knows is active again."""

    def active() -> bool:
        for node in nodes:
            try:
                found = json.loads(node.address.ask(f"/collections/{name}/cluster"))["result"]
            except OSError:
                return False
            shards = [*found["local_shards"], *found["remote_shards"]]
            if len(shards) != 6 or any(one["state"] != "Active" for one in shards):
                return False
        return True

    until(active)
