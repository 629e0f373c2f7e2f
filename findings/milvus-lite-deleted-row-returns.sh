#!/usr/bin/env bash
# A deleted row of Milvus Lite comes back when its id is inserted into another partition before the next flush.
# A delete that names no partition takes the id out of all of them. But the insert takes away the mark that hides the
# old row in its own partition: a search there finds it at once, and when the other partition is dropped it is what is
# left. With a flush between the two calls it stays deleted.
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
index.add_index("v", index_type="FLAT", metric_type="L2")


def found(name: str, *, flush: bool) -> tuple[list[int], list[int]]:
    """Return the rows of partition a, and all rows when partition b is dropped."""
    client.create_collection(name, schema=schema, index_params=index)
    for partition in ("a", "b"):
        client.create_partition(name, partition)
    client.insert(name, [{"id": i, "v": [float(i), 0.0]} for i in range(3)], partition_name="a")
    client.flush(name)
    client.load_collection(name)
    client.delete(name, ids=[1])
    if flush:
        client.flush(name)
    client.insert(name, [{"id": 1, "v": [9.0, 0.0]}], partition_name="b")
    hits = client.search(name, [[1.0, 0.0]], limit=3, partition_names=["a"])[0]
    client.drop_partition(name, "b")
    return sorted(hit["id"] for hit in hits), sorted(r["id"] for r in client.query(name, "id >= 0"))


print("milvus-lite", importlib.metadata.version("milvus-lite"))
expected = found("flushed", flush=True)
print("expected in partition a, and when b is dropped, as with a flush:", *expected)
seen = found("docs", flush=False)
print("seen:", *seen)
sys.stdout.flush()
os._exit(int(not (expected == ([0, 2], [0, 2]) and seen == ([0, 1, 2], [0, 1, 2]))))
PYTHON
