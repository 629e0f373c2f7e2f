from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("langchain_milvus", reason="run it by: make frameworks")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_milvus import BM25BuiltInFunction, Milvus
from langchain_tests.integration_tests.vectorstores import VectorStoreIntegrationTests

from amips_plugins import LearnedRouter
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.errors import InvalidInput
from amips_plugins.integrations.langchain_milvus import routed
from amips_plugins.proxies import late
from tests.integrations.congruence import (
    Ask,
    Congruence,
    Counted,
    Found,
    World,
    assert_same,
    lay_out,
)
from tests.integrations.corpus import documents, embed
from tests.integrations.langchain_standard import expect_failures
from tests.support.proxy_data import Rewrite

TEXT = "Return the names of all files that lie in a folder"


class Hashed(Embeddings):
    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [embed(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return embed(text)


def scored(pairs: list[tuple[Document, float]]) -> Found:
    return [(doc.id, doc.page_content, doc.metadata, score) for doc, score in pairs]


def unscored(docs: list[Document]) -> Found:
    return [(type(doc), doc.id, doc.page_content, doc.metadata) for doc in docs]


async def later(store: Any) -> Found:
    return scored(await store.asimilarity_search_with_score(TEXT, k=6, expr="group < 2"))


async def mmr_later(store: Any) -> Found:
    return unscored(await store.amax_marginal_relevance_search(TEXT, k=4, fetch_k=10))


WAYS: dict[str, Ask] = {
    "search": lambda s: unscored(s.similarity_search(TEXT)),
    "search of k": lambda s: unscored(s.similarity_search(TEXT, k=9)),
    "scores": lambda s: scored(s.similarity_search_with_score(TEXT, k=5)),
    "relevance": lambda s: scored(s.similarity_search_with_relevance_scores(TEXT, k=5)),
    "vector": lambda s: unscored(s.similarity_search_by_vector(embed(TEXT), k=5)),
    "vector with scores": lambda s: scored(s.similarity_search_with_score_by_vector(embed(TEXT))),
    "filter": lambda s: scored(s.similarity_search_with_score(TEXT, k=7, expr="group == 1")),
    "parameters": lambda s: scored(
        s.similarity_search_with_score(TEXT, param={"metric_type": "COSINE"}, timeout=20)
    ),
    "mmr": lambda s: unscored(s.max_marginal_relevance_search(TEXT, k=4, fetch_k=10)),
    "retriever": lambda s: unscored(s.as_retriever(search_kwargs={"k": 3}).invoke(TEXT)),
    "asynchronous": later,
    "asynchronous mmr": mmr_later,
    "by metadata": lambda s: unscored(s.search_by_metadata("row < 5")),
}


class LangChainMilvus:
    def __init__(self, folder: Path, storage: str | None = None, **more: Any) -> None:
        self.uri = str(folder / "docs.db")
        self.more = more
        first = Milvus(
            Hashed(),
            collection_name="first",
            connection_args={"uri": self.uri},
            index_params={"index_type": "FLAT", "metric_type": "COSINE"},
            **more,
        )
        texts = documents()
        first.add_documents(
            [Document(page_content=text, metadata=known) for text, known in texts],
            ids=[f"k{row}" for row in range(len(texts))],
        )
        self.client = first.client
        self.client.create_alias("first", "docs")
        self.registry = lay_out(MilvusCollection(self.client, "docs"), folder, storage)

    def store(self) -> Milvus:
        return Milvus(
            Hashed(), collection_name="docs", connection_args={"uri": self.uri}, **self.more
        )

    def routed(self, router: LearnedRouter | None, **options: Any) -> Milvus:
        return routed(self.store(), router, **options)

    def collection(self) -> MilvusCollection:
        return MilvusCollection(self.client, "docs")

    def best(self, store: Milvus, text: str) -> list[Any]:
        return [doc.metadata["pk"] for doc in store.similarity_search(text, k=10)]

    def add(self, store: Milvus, text: str) -> Any:
        more = {"title": "", "group": 0, "row": -1}
        return store.add_texts([text], [more], ids=["added"])[0]

    def delete(self, store: Milvus, key: Any) -> None:
        store.delete([key])

    def read(self, store: Milvus, key: Any) -> tuple[Document, str, Any]:
        (document,) = store.similarity_search(TEXT, k=1, expr=f'pk == "{key}"')
        return document, document.page_content, document.metadata

    def write_again(
        self, store: Milvus, key: Any, document: Document, text: str, title: str
    ) -> None:
        store.upsert([key], [Document(text, metadata={**document.metadata, "title": title})])

    def router_of(self, store: Milvus) -> LearnedRouter:
        router: LearnedRouter = store.client.amips_router
        return router


class TestDense(Congruence):
    ways: ClassVar[Mapping[str, Ask]] = WAYS
    unrouted = frozenset({"by metadata"})

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> World:
        return LangChainMilvus(tmp_path_factory.mktemp("lc"))


class TestDynamicFields(Congruence):
    ways: ClassVar[Mapping[str, Ask]] = {name: WAYS[name] for name in ("search", "filter")}

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> World:
        return LangChainMilvus(tmp_path_factory.mktemp("lc"), enable_dynamic_field=True)


class TestCellsInAField(Congruence):
    ways: ClassVar[Mapping[str, Ask]] = {"filter": WAYS["filter"]}

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> World:
        return LangChainMilvus(tmp_path_factory.mktemp("lc"), "field")


@pytest.mark.filterwarnings("ignore:The 'ranker_type':DeprecationWarning")
def test_a_hybrid_search_is_the_stores_own(tmp_path: Path) -> None:
    def store() -> Milvus:  # a new one for each search: the second fails, routed or not
        return Milvus(
            Hashed(),
            builtin_function=BM25BuiltInFunction(),
            vector_field=["dense", "sparse"],
            connection_args={"uri": str(tmp_path / "docs.db")},
            index_params=[
                {"index_type": "FLAT", "metric_type": "COSINE"},
                {"index_type": "SPARSE_INVERTED_INDEX", "metric_type": "BM25"},
            ],
            search_params=[{"metric_type": "COSINE"}, {"metric_type": "BM25"}],
        )

    texts = [text for text, _ in documents()[:100]]
    store().add_texts(texts, ids=[str(row) for row in range(len(texts))])
    hook = Counted(Rewrite())
    routed_store = routed(store(), hook=hook)
    assert_same(WAYS["scores"](routed_store), WAYS["scores"](store()))
    assert routed_store.client.amips_router.collection.info.field == "dense"
    assert hook.planned == 0


class WithIds(Milvus):
    """The store, with what the published tests ask for and it does not have: ids of documents."""

    def _parse_document(self, data: dict[str, Any]) -> Document:
        found = super()._parse_document(data)
        return Document(found.page_content, id=found.metadata.pop("pk"), metadata=found.metadata)

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        if self.col is None:
            return []
        found = self.client.query(self.collection_name, ids=list(ids))
        return [self._parse_document(row) for row in found]


@pytest.mark.filterwarnings("ignore:No ids provided:UserWarning")
class Standard(VectorStoreIntegrationTests):
    """LangChain's own tests."""

    @property
    def has_async(self) -> bool:
        return True

    def empty(self, folder: Path) -> Milvus:
        return WithIds(
            self.get_embeddings(),
            connection_args={"uri": str(folder / "docs.db")},
            index_params={"index_type": "FLAT", "metric_type": "COSINE"},
            consistency_level="Strong",
            enable_dynamic_field=True,
        )


# An id for one document and none for another: the store makes all of them itself.
fail_as_it_does = expect_failures("test_add_documents_with_existing_ids")


@fail_as_it_does
class TestStandardOfTheBareStore(Standard):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> Milvus:
        return self.empty(tmp_path)


@fail_as_it_does
class TestStandardOfRewriting(Standard):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Milvus]:
        monkeypatch.setattr(late, "_AGAIN", 0.0)  # the collection comes with the first write
        store = routed(self.empty(tmp_path), hook=Rewrite(), refresh=None)
        yield store
        router = store.client.amips_router
        assert router is None or set(router.fallbacks) <= {"cells: fewer than k hits"}


def test_another_store_is_refused() -> None:
    with pytest.raises(InvalidInput, match="langchain_milvus Milvus, but was given a object"):
        routed(object())
