#!/usr/bin/env bash
# With a geo index Qdrant finds nothing in a box that reaches around the world, such as a band of latitudes.
# The documentation of indexing: "payload indexes speed up filtering", and without one the same box finds the points.
# Seen in Qdrant Edge, and the same in a server 1.18.3. A box from -179 to 179 is right; one from -180 to 180 is what a
# map that shows the whole world asks for. Only boundary points were filed (qdrant-client#1188).
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

cities = {
    "Berlin": (13.4, 52.5),
    "Paris": (2.35, 48.9),
    "New York": (-74.0, 40.7),
    "Tokyo": (139.7, 35.7),
    "Sydney": (151.2, -33.9),
}


def found(*, index: bool) -> list[str]:
    vectors = edge.EdgeVectorParams(size=2, distance=edge.Distance.Dot)
    shard = edge.EdgeShard.create(f"shard-{index}", edge.EdgeConfig(vectors=vectors))
    if index:
        shard.update(edge.UpdateOperation.create_field_index("at", edge.PayloadSchemaType.Geo))
    points = [
        edge.Point(place, [1.0, 2.0], {"name": name, "at": {"lon": lon, "lat": lat}})
        for place, (name, (lon, lat)) in enumerate(cities.items())
    ]
    shard.update(edge.UpdateOperation.upsert_points(points))
    north = edge.GeoBoundingBox(edge.GeoPoint(-180.0, 60.0), edge.GeoPoint(180.0, 30.0))
    condition = edge.FieldCondition("at", geo_bounding_box=north)
    request = edge.ScrollRequest(filter=edge.Filter(must=[condition]), with_payload=True)
    return [point.payload["name"] for point in shard.scroll(request)[0]]


print("qdrant-edge-py", importlib.metadata.version("qdrant-edge-py"))
expected = found(index=False)
print("expected between 30 and 60 degrees north, as without the index:", expected)
seen = found(index=True)
print("seen:", seen)
sys.exit(int(not (len(expected) == 4 and seen == [])))
PYTHON
