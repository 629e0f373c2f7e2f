#!/usr/bin/env bash
# Milvus Lite takes a few of the nearest rows and selects afterwards: a range, an iterator, groups lack rows.
# The documentation of range search: "All vectors with similarity scores that fall within the annular region [...] will
# be returned", up to limit; of search iterators: with no limit, all entities in batches; of grouping search: limit
# is the number of groups. Milvus Lite looks at 5 times the limit for a range and at 10 times for groups.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check milvus-lite==3.2.2 pymilvus==3.0.2
cd "$folder"
env/bin/python - <<'PYTHON'
import importlib.metadata
import logging
import os
import sys

from pymilvus import DataType, MilvusClient

logging.disable(logging.WARNING)
N = 3000
client = MilvusClient("./docs.db")
schema = client.create_schema(auto_id=False)
schema.add_field("id", DataType.INT64, is_primary=True)
schema.add_field("book", DataType.INT64)
schema.add_field("v", DataType.FLOAT_VECTOR, dim=2)
index = client.prepare_index_params()
index.add_index("v", index_type="FLAT", metric_type="L2")
client.create_collection("docs", schema=schema, index_params=index)
# Row i is at the distance sqrt(i); 400 rows of one book are the nearest, then each has its own.
rows = [{"id": i, "book": max(0, i - 400), "v": [i**0.5, 0.0]} for i in range(N)]
client.insert("docs", rows)
client.load_collection("docs")
origin = [[0.0, 0.0]]
print("milvus-lite", importlib.metadata.version("milvus-lite"))

ring = {"params": {"range_filter": 999.5, "radius": 1005.5}}
hits = client.search("docs", origin, limit=10, search_params=ring)[0]
found = sorted(hit["id"] for hit in hits)
print("expected in a ring, by squared distance: rows 1000 to 1005")
print("seen:", found)

iterator = client.search_iterator("docs", origin, batch_size=50, search_params={})
paged = 0
while page := iterator.next():
    paged += len(page)
iterator.close()
print(f"expected from search_iterator without a limit: {N} rows")
print("seen:", paged)

hits = client.search("docs", origin, limit=5, group_by_field="book", output_fields=["book"])[0]
books = [hit["entity"]["book"] for hit in hits]
print("expected with limit=5 and group_by_field: books [0, 1, 2, 3, 4]")
print("seen: books", books)
sys.stdout.flush()
os._exit(int(not (found == [] and paged < N and books == [0])))
PYTHON
