#!/usr/bin/env bash
# Milvus Lite stores a null vector as zeros: a search finds such a row, before rows that have a vector.
# Its README lists "nullable fields". Milvus: "NULL vectors are automatically skipped during vector index building and
# search"; read back, they are null. Here they are zeros, which nothing tells from a vector of zeros.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check milvus-lite==3.2.2 pymilvus==3.0.2
cd "$folder"
env/bin/python - <<'PYTHON'
import importlib.metadata
import os
import sys

from pymilvus import DataType, MilvusClient

client = MilvusClient("./docs.db")
schema = client.create_schema(auto_id=False)
schema.add_field("id", DataType.INT64, is_primary=True)
schema.add_field("v", DataType.FLOAT_VECTOR, dim=2, nullable=True)
index = client.prepare_index_params()
index.add_index("v", index_type="FLAT", metric_type="IP")
client.create_collection("docs", schema=schema, index_params=index)
rows = [{"id": 1, "v": [1.0, 0.0]}, {"id": 2, "v": None}, {"id": 3, "v": [-1.0, 0.0]}]
client.insert("docs", rows)
client.flush("docs")
client.load_collection("docs")
print("milvus-lite", importlib.metadata.version("milvus-lite"))
print("expected: a search finds rows [1, 3], and row 2 is read back with the vector None")
hits = client.search("docs", [[1.0, 0.0]], limit=3)[0]
found = [hit["id"] for hit in hits]
vector = client.get("docs", [2], output_fields=["v"])[0]["v"]
print(f"seen: a search finds rows {found}, and row 2 has the vector {vector}")
sys.stdout.flush()
os._exit(int(not (found == [1, 2, 3] and list(vector) == [0.0, 0.0])))
PYTHON
