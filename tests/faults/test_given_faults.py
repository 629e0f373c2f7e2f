"""Values that tell nothing apart, are missing, take all over, or change, on every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from amips_plugins import LearnedRouter, MemoryCollection, Registry, SeveralCollections
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.evaluation import evaluate
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.export.train import TrainOptions, train
from amips_plugins.partitions import Partitions, Value
from amips_plugins.status import router_status
from tests.support import given_data, given_engines
from tests.support.given_engines import Store, Values

FRESH = given_data.queries(40, seed=9)

Make = Callable[[Values], Store]


@pytest.fixture(params=list(given_engines.ENGINES))
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:
        engine = given_engines.ENGINES[request.param]
        yield lambda values: stack.enter_context(engine(tmp_path, values))


def best(row: int, k: int = 5) -> list[int]:
    (hits,) = MemoryCollection(given_data.keys()).search(SearchRequest(FRESH[row : row + 1], k))
    return [int(hit.id) for hit in hits]


@pytest.mark.slow
def test_a_field_of_other_values_tells_nothing_apart(make: Make, tmp_path: Path) -> None:
    store = make(given_data.values())
    with pytest.raises(InvalidInput, match=r"whole numbers|keywords or integers"):
        take_snapshot(store.collection.partitioned(Partitions("weight")), tmp_path / "snap")


@pytest.mark.slow
def test_a_renamed_value_is_found_by_every_search(make: Make, tmp_path: Path) -> None:
    values = given_data.values()
    store = make(values)
    registry = given_engines.publish(store.collection, tmp_path)
    router = LearnedRouter(store.collection, registry=registry, refresh=None)
    gone = [row for row, value in enumerate(values) if value == "part 3"]
    before = router.overflow_share()
    store.rename("part 3", "part three")
    assert router.overflow_share() == pytest.approx(before + len(gone) / given_data.COUNT)
    for row in range(len(FRESH)):
        hits = router.search(FRESH[row], k=5, n_probes=1)
        assert hits.trace.mode == "route"
        found = {int(hit.id) for hit in hits}
        assert found >= set(best(row)) & set(gone)
    status = router_status(store.collection, Registry(registry))
    assert status.partitions is not None
    assert status.partitions.gone == ("part 3",)
    assert "train again" in status.advice


@pytest.mark.slow
def test_keys_without_a_value_are_found_where_most_have_none(make: Make, tmp_path: Path) -> None:
    values = [value if row % 10 == 0 else None for row, value in enumerate(given_data.values())]
    store = make(values)
    registry = given_engines.publish(store.collection, tmp_path)
    router = LearnedRouter(store.collection, registry=registry, refresh=None)
    assert router.overflow_share() == pytest.approx(0.9, abs=0.02)
    none = {row for row, value in enumerate(values) if value is None}
    for row in range(len(FRESH)):
        found = {int(hit.id) for hit in router.search(FRESH[row], k=5, n_probes=1)}
        assert found >= set(best(row)) & none
        found = {int(hit.id) for hit in router.search(FRESH[row], k=5, recall=1.0)}
        assert found == set(best(row))


@pytest.mark.slow
def test_a_value_that_nearly_all_keys_have(make: Make, tmp_path: Path) -> None:
    values: list[Value | None] = [
        f"part {row % 3}" if row % 300 < 3 else "most" for row in range(given_data.COUNT)
    ]
    store = make(values)
    registry = given_engines.publish(store.collection, tmp_path)
    router = LearnedRouter(store.collection, registry=registry, refresh=None)
    most = {row for row, value in enumerate(values) if value == "most"}
    for row in range(len(FRESH)):
        hits = router.search(FRESH[row], k=5, n_probes=1, explain=True)
        assert len(hits) == 5  # of the chosen value, or natively where that has fewer
        found = {int(hit.id) for hit in hits}
        if hits.trace.mode == "native" or (hits.trace.cells or ())[:1] == [0]:
            assert found >= set(best(row)) & most
        assert {int(hit.id) for hit in router.search(FRESH[row], k=5, n_probes=4)} == set(best(row))


@pytest.mark.slow
def test_vectors_of_other_dimensions_are_not_searched_together(make: Make) -> None:
    one = make(given_data.values()).collection
    other = MemoryCollection(given_data.keys()[:, :4], metric="cosine")
    with pytest.raises(InvalidInput, match=r"has the dimension 12, 'x' has 4"):
        SeveralCollections({"docs": one, "x": other})
    other = MemoryCollection(given_data.keys(), metric="ip")
    with pytest.raises(InvalidInput, match=r"has the metric cosine, 'x' has ip"):
        SeveralCollections({"docs": one, "x": other})


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("most keys have no value", marks=pytest.mark.nightly),
        "most keys have one value",
    ],
)
def test_where_next_to_nothing_can_be_left_out_it_is_left(fault: str, tmp_path: Path) -> None:
    """Training says so, and what it makes holds its target all the same."""
    values = given_data.values()
    if fault == "most keys have no value":
        values = [value if row % 10 == 0 else None for row, value in enumerate(values)]
    else:
        values = [value if row % 100 == 0 else "most" for row, value in enumerate(values)]
    taken = given_data.snapshot(tmp_path, given_data.collection(values))
    options = TrainOptions(epochs=3, recall=0.9)
    run = train(taken, given_data.queries(), tmp_path / "run", options)
    served = run.manifest.served_cost
    assert served is None or served > 0.8
    router = LearnedRouter(given_data.collection(values), bundle=run.bundle, refresh=None)
    fresh = given_data.queries(200, seed=9)
    (learned,) = evaluate(router, fresh, 10, recalls=(0.9,))[1:]
    assert learned.recall_at_k >= 0.9
