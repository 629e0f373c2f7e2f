#!/usr/bin/env bash
# "not in" and "not (... in ...)" of Milvus Lite find rows whose value is null; "!=" with the same value does not.
# Milvus compares in three-valued logic (milvus#46939) and takes null rows found by a negation for a bug (milvus#49891,
# which quotes its documentation: "Entities where status is NULL are excluded").
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
schema.add_field("tag", DataType.VARCHAR, max_length=9, nullable=True)
schema.add_field("v", DataType.FLOAT_VECTOR, dim=2)
index = client.prepare_index_params()
index.add_index("v", index_type="FLAT", metric_type="L2")
client.create_collection("docs", schema=schema, index_params=index)
tags = ("a", "b", None)
client.insert("docs", [{"id": i, "tag": tag, "v": [1.0, 2.0]} for i, tag in enumerate(tags)])
client.load_collection("docs")
filters = ('tag != "a"', 'not (tag == "a")', 'tag not in ["a"]', 'not (tag in ["a"])')
print("milvus-lite", importlib.metadata.version("milvus-lite"))
print("expected: rows [1] for each of", *filters, sep="\n  ")
seen = [sorted(row["id"] for row in client.query("docs", one)) for one in filters]
print("seen:", *seen)
sys.stdout.flush()
os._exit(int(seen != [[1], [1], [1, 2], [1, 2]]))
PYTHON
