#!/usr/bin/env bash
# Milvus Lite loses sight of a row in one partition when another partition gets a row of the same id; a server keeps both.
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
schema.add_field("v", DataType.FLOAT_VECTOR, dim=2)
index = client.prepare_index_params()
index.add_index("v", index_type="FLAT", metric_type="IP")
client.create_collection("docs", schema=schema, index_params=index)
for name in ("a", "b"):
    client.create_partition("docs", name)
    rows = [{"id": key, "v": [1.0, float(key)]} for key in range(5)]
    client.insert("docs", rows, partition_name=name)
client.load_collection("docs")
print("milvus-lite", importlib.metadata.version("milvus-lite"))
print("expected: a search of partition a finds the five rows that were inserted into it")
hits = client.search("docs", [[0.0, 1.0]], limit=5, partition_names=["a"])[0]
found = sorted(hit["id"] for hit in hits)
print("seen: found in partition a", found)
sys.stdout.flush()
os._exit(int(found == [0, 1, 2, 3, 4]))
PYTHON
