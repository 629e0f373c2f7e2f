#!/usr/bin/env bash
# delete_nodes(node_ids, filters) of LlamaIndex' Qdrant store deletes every node that an OR filter finds.
# With ids and filters LlamaIndex' own SimpleVectorStore deletes those of the ids that pass, and so does the Qdrant store
# with an AND filter; get_nodes of the same store with the same arguments reads those alone. With OR, the ids become
# one more alternative. adelete_nodes is written the same way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
    llama-index-vector-stores-qdrant==0.10.4 llama-index-core==0.14.25 qdrant-client==1.20.0
cd "$folder"
env/bin/python -W ignore - <<'PYTHON'
import importlib.metadata
import sys

from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import (
    FilterCondition,
    MetadataFilter,
    MetadataFilters,
    SimpleVectorStore,
    VectorStoreQuery,
)
from llama_index.vector_stores.qdrant import QdrantVectorStore
from qdrant_client import QdrantClient

topics = ["a", "a", "b", "b", "c"]
ids = [f"00000000-0000-0000-0000-00000000000{i}" for i in range(len(topics))]
nodes = [
    TextNode(id_=key, text=f"text {key}", embedding=[1.0, 2.0], metadata={"topic": topic})
    for key, topic in zip(ids, topics, strict=True)
]
a_or_b = MetadataFilters(
    filters=[MetadataFilter(key="topic", value="a"), MetadataFilter(key="topic", value="b")],
    condition=FilterCondition.OR,
)
stores = (SimpleVectorStore(), QdrantVectorStore("docs", client=QdrantClient(":memory:")))
left = []
for store in stores:
    store.add(nodes)
    if isinstance(store, QdrantVectorStore):
        read = [node.node_id for node in store.get_nodes(node_ids=ids[:1], filters=a_or_b)]
    store.delete_nodes(node_ids=ids[:1], filters=a_or_b)
    query = VectorStoreQuery(query_embedding=[1.0, 2.0], similarity_top_k=9)
    left.append(sorted(ids.index(key) for key in store.query(query).ids))
name = "llama-index-vector-stores-qdrant"
print(name, importlib.metadata.version(name))
print("get_nodes reads nodes", [ids.index(key) for key in read])
print("expected: delete_nodes leaves nodes", left[0])
print("seen: nodes left", left[1])
sys.exit(int(not (read == ids[:1] and left == [[1, 2, 3, 4], [4]])))
PYTHON
