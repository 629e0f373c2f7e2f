from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.sync_facade import open_blocking
from amips_plugins.cell_layout import CellIndex, Storage
from amips_plugins.collection import Collection, Hit, Id, SearchRequest
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, Metric
from tests.adapters.contract.collection_contract import COUNT, DIM, CollectionContract, vectors
from tests.support.event_loop import LoopThread

pytestmark = pytest.mark.slow

pymilvus = pytest.importorskip("pymilvus")


class MilvusContract(CollectionContract):
    """The contract over any Milvus; a subclass brings the client.

    Milvus takes a second to create a collection, a server several, so collections are shared by
    the tests that only read them.
    """

    shares_keys = False
    client: ClassVar[Any]
    prefix: ClassVar[str]
    built: ClassVar[dict[tuple[Any, ...], Collection]]
    """What can be used again: collections by their content, laid out ones by their metric."""

    @classmethod
    def set_up(cls, client: Any) -> None:
        cls.client = client
        cls.prefix = f"contract_{secrets.token_hex(4)}"
        cls.built = {}

    @classmethod
    def tear_down(cls) -> None:
        for name in cls.client.list_collections():
            if name.startswith(cls.prefix):
                cls.client.drop_collection(name)
        cls.client.close()

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        content = (metric, keys.tobytes(), *ids)
        if content not in self.built:
            self.built[content] = self.create(keys, ids, metric, groups)
        return MilvusCollection(self.client, self.built[content].info.name)

    def create(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        name = f"{self.prefix}_{secrets.token_hex(4)}"
        schema = self.client.create_schema(auto_id=False)
        if isinstance(ids[0], str):
            schema.add_field("key", pymilvus.DataType.VARCHAR, is_primary=True, max_length=64)
        else:
            schema.add_field("key", pymilvus.DataType.INT64, is_primary=True)
        schema.add_field("embedding", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
        schema.add_field("group", pymilvus.DataType.VARCHAR, max_length=64)
        # Session sees what this client wrote; Bounded may miss it on a server.
        self.client.create_collection(name, schema=schema, consistency_level="Session")
        rows = [
            {"key": key, "embedding": vector, "group": group}
            for key, vector, group in zip(ids, keys, groups, strict=True)
        ]
        # Written out of order and in two parts, so that nothing is sorted by accident.
        order = np.random.default_rng(0).permutation(len(rows))
        half = len(rows) // 2
        self.client.insert(name, [rows[row] for row in order[:half]])
        self.client.flush(name)
        self.client.insert(name, [rows[row] for row in order[half:]])
        index = self.client.prepare_index_params()
        index.add_index("embedding", index_type="FLAT", metric_type=metric.name)
        self.client.create_index(name, index)
        self.client.load_collection(name)
        return MilvusCollection(self.client, name)

    def fresh(self, metric: Metric = Metric.COSINE) -> Collection:
        content = (metric, vectors().tobytes(), *range(COUNT))
        self.built.pop(content, None)
        built = self.build(metric)
        self.built.pop(content)  # nobody is to read what this test writes
        return built

    def group_filter(self, group: str) -> Any:
        return f'group == "{group}"'

    def laid_out(self, metric: Metric = Metric.COSINE) -> Collection:
        if (metric,) not in self.built:
            self.built[metric,] = super().laid_out(metric)
        return MilvusCollection(self.client, self.built[metric,].info.name)

    sketches = False

    def rewrite_in_place(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        name, new = collection.info.name, dict(zip(ids, keys.tolist(), strict=True))
        field = self.storage == "field"
        # What was read is written again, the cell with it.
        for partition in ["_default"] if field else self.client.list_partitions(name):
            there = self.client.query(
                name,
                filter=f"key in {list(ids)}",
                output_fields=["*"],
                partition_names=[partition],
            )
            if there:
                changed = [{**row, "embedding": new[row["key"]]} for row in there]
                self.client.upsert(name, changed, partition_name=partition)

    def check_finished(self, collection: Collection) -> None:
        plan = collection.layouts.plan(self.spec())
        assert (plan.steps, plan.keys) == ((), collection.count())
        assert "already" in plan.notes[0]
        again = collection.layouts.build(self.spec())
        assert (again.info, again.layout()) == (collection.info, collection.layout())

    def add_without_cell(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        self.client.upsert(
            collection.info.name,
            [
                {"key": key, "embedding": vector, "group": ""}
                for key, vector in zip(ids, keys, strict=True)
            ],
        )


class TestMilvusLite(MilvusContract):
    loop: ClassVar[LoopThread]
    awaited: ClassVar[Any]
    """An asynchronous client of the same file."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def database(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        pytest.importorskip("milvus_lite")
        path = str(tmp_path_factory.mktemp("milvus") / "contract.db")
        cls.set_up(pymilvus.MilvusClient(path))
        cls.awaited = pymilvus.AsyncMilvusClient(path)
        with LoopThread() as cls.loop:
            yield
            cls.loop.run(cls.awaited.close())
        cls.tear_down()

    def search_async(
        self, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> list[list[Hit]]:
        assert isinstance(collection, MilvusCollection)
        return self.loop.run(collection.search_async(self.awaited, request, plan))


class TestMilvusLiteWithACellField(TestMilvusLite):
    storage: Storage | None = "field"
    sketches = True


class TestMilvusLiteWithCodesInsideCells(TestMilvusLite):
    index: CellIndex = "ivf_sq8"

    def test_all_cells_are_the_native_search(self) -> None:
        """Which compares codes: here they are what a search of all vectors finds."""
        collection = self.laid_out()
        request = SearchRequest(vectors(1, 3), k=10)
        plan = QueryPlan(cells=np.tile(np.arange(4), (3, 1)), layout="abc123")
        assert [[h.id for h in hits] for hits in collection.search(request, plan)] == [
            [h.id for h in hits] for hits in collection.exact(request)
        ]


class TestMilvusLiteThroughAnAsynchronousClient(TestMilvusLite):
    """What a router does with a collection that others have laid out."""

    def through(self, collection: Collection) -> Collection:
        return open_blocking(self.awaited, collection.info.name, None, self.loop.loop)

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        return self.through(super().make(keys, ids, metric, groups))

    def laid_out(self, metric: Metric = Metric.COSINE) -> Collection:
        if (metric,) not in self.built:
            self.built[metric,] = self.fresh_laid_out(metric)
        return self.through(self.built[metric,])

    def fresh_laid_out(self, metric: Metric = Metric.COSINE) -> Collection:
        of = MilvusCollection(self.client, self.fresh(metric).info.name)
        return self.through(of.layouts.build(self.spec()))

    @pytest.fixture(autouse=True)
    def _no_builds(self, request: pytest.FixtureRequest) -> None:
        if request.function.__name__ in _BUILDS:
            pytest.skip("AsyncMilvusClient cannot wait for an index on Milvus Lite.")


_BUILDS = {
    "test_an_audit_of_sound_cells_finds_none_stale",
    "test_a_vector_that_changed_under_its_cell_is_found_and_mended",
    "test_new_cells_roll_back_to_the_old_ones",
    "test_what_is_old_can_be_dropped",
    "test_a_build_goes_on_after_an_interruption",
    "test_what_others_write_during_a_build_is_in_it",
}
