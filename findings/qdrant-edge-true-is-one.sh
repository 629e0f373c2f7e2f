#!/usr/bin/env bash
# Qdrant Edge takes MatchValue(True) for the number 1: it finds no boolean, and finds whole numbers instead.
# Its signature is MatchValue(value: Union[str, int, bool]), the documentation of filtering applies match to bool
# payloads, and Qdrant keeps booleans and numbers apart: the server does, and qdrant-client's local mode does
# (qdrant-client#1259). MatchAny([True]) and MatchExcept([True]) are the same here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check qdrant-edge-py==0.9.0 qdrant-client==1.20.0
cd "$folder"
env/bin/python - <<'PYTHON'
import importlib.metadata
import sys

import qdrant_edge as edge
from qdrant_client import QdrantClient, models

payloads = [{"open": True}, {"open": False}, {"open": 1}, {"open": 0}]

local = QdrantClient(":memory:")
local.create_collection(
    "docs", vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT)
)
local.upsert(
    "docs",
    [models.PointStruct(id=i, vector=[1.0, 2.0], payload=p) for i, p in enumerate(payloads)],
)
is_open = models.FieldCondition(key="open", match=models.MatchValue(value=True))
points, _ = local.scroll("docs", scroll_filter=models.Filter(must=[is_open]))
print("qdrant-edge-py", importlib.metadata.version("qdrant-edge-py"))
print("expected, as in local mode: points", [point.id for point in points])

vectors = edge.EdgeVectorParams(size=2, distance=edge.Distance.Dot)
shard = edge.EdgeShard.create("shard", edge.EdgeConfig(vectors=vectors))
shard.update(edge.UpdateOperation.create_field_index("open", edge.PayloadSchemaType.Bool))
shard.update(
    edge.UpdateOperation.upsert_points(
        [edge.Point(i, [1.0, 2.0], p) for i, p in enumerate(payloads)]
    )
)
condition = edge.FieldCondition("open", match=edge.MatchValue(True))
points, _ = shard.scroll(edge.ScrollRequest(filter=edge.Filter(must=[condition])))
seen = [point.id for point in points]
print("seen: points", seen, "where MatchValue(True).value is", edge.MatchValue(True).value)
sys.exit(int(seen != [2]))
PYTHON
