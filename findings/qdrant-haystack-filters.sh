#!/usr/bin/env bash
# Two filters of Haystack mean something else to qdrant-haystack than to Haystack's own document store.
# "in" with an empty list finds every document, and delete_by_filter deletes every document; NOT of two conditions
# leaves out what fulfils one of them, where Haystack's own store, its test suite for stores (FilterDocumentsTest.
# test_not_operator) and milvus-haystack leave out what fulfils both. Filters are to be the same for every store.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
    qdrant-haystack==13.1.0 haystack-ai==3.4.1 qdrant-client==1.20.0
cd "$folder"
HAYSTACK_TELEMETRY_ENABLED=False env/bin/python - <<'PYTHON'
import importlib.metadata
import sys

from haystack import Document
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack_integrations.document_stores.qdrant import QdrantDocumentStore

metas = [{"year": 1, "of": "a"}, {"year": 1, "of": "b"}, {"year": 2, "of": "b"}]
documents = [
    Document(id=f"0000000{i}", content=f"text {i}", embedding=[1.0, 2.0], meta=meta)
    for i, meta in enumerate(metas)
]
own = InMemoryDocumentStore()
qdrant = QdrantDocumentStore(
    ":memory:", embedding_dim=2, similarity="dot_product", progress_bar=False
)
for store in (own, qdrant):
    store.write_documents(documents)

in_nothing = {"field": "meta.of", "operator": "in", "value": []}
not_both = {
    "operator": "NOT",
    "conditions": [
        {"field": "meta.year", "operator": "==", "value": 1},
        {"field": "meta.of", "operator": "==", "value": "b"},
    ],
}


def found(store: InMemoryDocumentStore | QdrantDocumentStore, one: dict) -> list[int]:
    return sorted(int(document.id) for document in store.filter_documents(one))


print("qdrant-haystack", importlib.metadata.version("qdrant-haystack"))
seen = []
for name, one in (("in []", in_nothing), ("NOT (year == 1, of == b)", not_both)):
    print(f"expected of {name}, as of Haystack's own store: documents {found(own, one)}")
    print("seen: documents", found(qdrant, one))
    seen.append((found(own, one), found(qdrant, one)))
qdrant.delete_by_filter(in_nothing)
left = qdrant.count_documents()
print("expected after delete_by_filter of in []: 3 documents; seen:", left)
sys.exit(int(not (seen == [([], [0, 1, 2]), ([0, 2], [])] and left == 0)))
PYTHON
