#!/usr/bin/env bash
# Milvus Lite deletes a key of another partition than the one that the call names.
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
for place, name in enumerate(("a", "b")):
    client.create_partition("docs", name)
    rows = [{"id": key, "v": [1.0, 2.0]} for key in range(5 * place, 5 * place + 5)]
    client.insert("docs", rows, partition_name=name)
client.load_collection("docs")
print("milvus-lite", importlib.metadata.version("milvus-lite"))
print("expected: delete(ids=[7], partition_name='a') leaves key 7, which is in partition b")
client.delete("docs", ids=[7], partition_name="a")
left = sorted(row["id"] for row in client.query("docs", "id >= 0", ["id"]))
print("seen: keys left", left)
sys.stdout.flush()
os._exit(int(7 in left))
PYTHON
