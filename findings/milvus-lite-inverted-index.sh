#!/usr/bin/env bash
# An INVERTED index of Milvus Lite on a whole-number field cuts the other side of a comparison to a whole number.
# So "stars < 2.5" loses rows with 2, and "stars == 2.5" finds them. The documentation of scalar indexes: they "speed up
# metafiltering"; without the index both filters are answered right.
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
schema.add_field("stars", DataType.INT64)
schema.add_field("v", DataType.FLOAT_VECTOR, dim=2)
index = client.prepare_index_params()
index.add_index("v", index_type="FLAT", metric_type="L2")
client.create_collection("docs", schema=schema, index_params=index)
client.insert("docs", [{"id": i, "stars": i, "v": [1.0, 2.0]} for i in range(1, 6)])
client.flush("docs")
client.load_collection("docs")


def found() -> dict[str, list[int]]:
    filters = ("stars < 2.5", "stars >= 2.5", "stars == 2.5")
    return {one: sorted(row["id"] for row in client.query("docs", one)) for one in filters}


print("milvus-lite", importlib.metadata.version("milvus-lite"))
expected = found()
print("expected, as without the index:", expected)
client.release_collection("docs")
index = client.prepare_index_params()
index.add_index("stars", index_type="INVERTED")
client.create_index("docs", index)
client.load_collection("docs")
seen = found()
print("seen:", seen)
sys.stdout.flush()
right = {"stars < 2.5": [1, 2], "stars >= 2.5": [3, 4, 5], "stars == 2.5": []}
wrong = {"stars < 2.5": [1], "stars >= 2.5": [2, 3, 4, 5], "stars == 2.5": [2]}
os._exit(int(not (expected == right and seen == wrong)))
PYTHON
