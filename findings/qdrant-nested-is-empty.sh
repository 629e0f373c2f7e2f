#!/usr/bin/env bash
# With an index on reviews[].stars, Qdrant asks a nested is_empty of the whole point instead of each element.
# The documentation of nested filters: "Parent document is considered to match the condition if at least one element of
# the array matches the nested filter"; an index speeds filtering up. Seen in Qdrant Edge, and the same in a server
# 1.18.3. Not qdrant#10621, which is about the two ways to write is_empty without nesting.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check qdrant-edge-py==0.9.0
cd "$folder"
env/bin/python - <<'PYTHON'
import importlib.metadata
import sys

import qdrant_edge as edge

payloads = [
    {"reviews": [{"stars": 5}, {"text": "no stars yet"}]},
    {"reviews": [{"stars": 4}]},
    {"reviews": [{"text": "no stars yet"}]},
]


def found(*, index: bool) -> list[int]:
    vectors = edge.EdgeVectorParams(size=2, distance=edge.Distance.Dot)
    shard = edge.EdgeShard.create(f"shard-{index}", edge.EdgeConfig(vectors=vectors))
    if index:
        integer = edge.PayloadSchemaType.Integer
        shard.update(edge.UpdateOperation.create_field_index("reviews[].stars", integer))
    points = [edge.Point(i, [1.0, 2.0], payload) for i, payload in enumerate(payloads)]
    shard.update(edge.UpdateOperation.upsert_points(points))
    without = edge.Filter(must=[edge.IsEmptyCondition("stars")])
    nested = edge.Filter(must=[edge.NestedCondition("reviews", without)])
    return [point.id for point in shard.scroll(edge.ScrollRequest(filter=nested))[0]]


print("qdrant-edge-py", importlib.metadata.version("qdrant-edge-py"))
expected = found(index=False)
print("expected, points with a review that has no stars, as without the index:", expected)
seen = found(index=True)
print("seen:", seen)
sys.exit(int(not (expected == [0, 2] and seen == [2])))
PYTHON
