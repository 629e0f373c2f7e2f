"""The empty copy of a Milvus collection that is to become its next generation."""

from __future__ import annotations

import time

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.milvus.cell_index import INDEXED_FROM, index_arguments, is_scanned
from amips_plugins.adapters.milvus.cells import (
    CELL_FIELD,
    SKETCH_FIELD,
    CellProperties,
    building_name,
    generation_of,
    read_cells,
)
from amips_plugins.adapters.milvus.layout_plan import choose_storage, has_clustering_keys
from amips_plugins.adapters.milvus.opening import describe_index
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.cell_layout import LayoutSpec, Storage
from amips_plugins.errors import CollectionError, InvalidInput, require

__all__ = ["finish_index", "prepare_copy"]

_OTHER: dict[Storage, Storage] = {"partitions": "field", "field": "partitions"}
_INDEX_SECONDS = 3600.0
_LISTED_SECONDS = 60.0
_INDEX_STATE = ("total_rows", "indexed_rows", "pending_index_rows", "state")


def prepare_copy(spec: LayoutSpec, source: Table) -> tuple[str, bool]:
    """Create the copy, or what is missing of it; return its name and whether it is new."""
    client, storage = source.client, choose_storage(spec)
    family, _ = generation_of(source.name, source.cells)
    cells = CellProperties(
        spec.layout,
        spec.n_cells,
        spec.version,
        storage,
        source.name,
        spec.index,
        family,
        spec.shared,
    )
    building = building_name(family, spec.layout, storage)
    new = not client.has_collection(building)
    there = None if new else read_cells(client, building)
    if not new and there is None:
        raise InvalidInput(f"{building!r} is in the way and not one of ours; drop or rename it.")
    if not new and there != cells:
        client.drop_collection(building)  # of an earlier build with other options
        new = True
    other = building_name(family, spec.layout, _OTHER[storage])
    if client.has_collection(other) and read_cells(client, other) is not None:
        client.drop_collection(other)
    if new:
        _create(source, building, cells)
    if storage == "partitions":
        made = set(client.list_partitions(building))
        for cell in range(spec.n_cells):
            if cells.partition(cell) not in made:
                client.create_partition(building, cells.partition(cell))
    _create_indexes(source, building, spec)
    client.load_collection(building)
    return building, new


def _create(source: Table, building: str, cells: CellProperties) -> None:
    orm = require("pymilvus", "milvus")
    fields = [
        # The ids stay what they are, also where Milvus made them.
        {**field, "auto_id": False} if field.get("is_primary") else field
        for field in source.raw["fields"]
        if field["name"] not in (CELL_FIELD, SKETCH_FIELD)
    ]
    raw = {**source.raw, "fields": fields, "auto_id": False}
    if cells.shared:  # where the marks of its rows lie; to clients who know of none it is no field
        raw["enable_dynamic_field"] = True
    schema = orm.CollectionSchema.construct_from_dict(raw)
    if cells.storage == "field":
        version = str(source.client.get_server_version())
        schema.add_field(
            CELL_FIELD,
            orm.DataType.INT64,
            default_value=OVERFLOW,
            **({"is_clustering_key": True} if has_clustering_keys(version) else {}),
        )
        schema.add_field(SKETCH_FIELD, orm.DataType.INT64, default_value=0)
    theirs = {
        name: value
        for name, value in (source.raw.get("properties") or {}).items()
        if name not in cells.properties()
    }
    source.client.create_collection(
        building,
        schema=schema,
        num_shards=raw.get("num_shards") or 1,
        consistency_level=raw["consistency_level"],
        properties={**theirs, **cells.properties()},
    )


def _create_indexes(source: Table, building: str, spec: LayoutSpec) -> None:
    """Create those indexes that are missing."""
    client, info = source.client, source.info
    rows = (source.count_keys() + spec.copies) / spec.n_cells
    made = {
        client.describe_index(building, index)["field_name"]
        for index in client.list_indexes(building)
    }
    indexes = client.prepare_index_params()
    for index in client.list_indexes(source.name):
        found = client.describe_index(source.name, index)
        if found["field_name"] in made or found["field_name"] in (CELL_FIELD, SKETCH_FIELD):
            continue
        if found["field_name"] == info.field:
            wanted = index_arguments(
                spec.index,
                found,
                info.field,
                info.metric,
                rows,
                is_lite=source.is_lite,
                lists=spec.lists,
            )
            indexes.add_index(**wanted)
        else:
            indexes.add_index(**{k: v for k, v in found.items() if k not in _INDEX_STATE})
    fields = {field["name"] for field in client.describe_collection(building)["fields"]}
    if CELL_FIELD in fields - made and not source.is_lite:  # else every row is tested every time
        indexes.add_index(CELL_FIELD, index_type="STL_SORT", index_name=CELL_FIELD)
    if len(indexes):
        client.create_index(building, indexes)


def finish_index(target: Table) -> None:
    """Write out what is in memory, and wait for the index, so that it is what is measured."""
    client, written = target.client, target.count()
    client.flush(target.name)
    if target.is_lite or is_scanned(describe_index(target)):
        return
    started = time.monotonic()
    while True:
        parts = client.list_loaded_segments(target.name)
        # What was just flushed is listed seconds later, and until then scanned whole.
        listed = sum(part.num_rows for part in parts) >= written
        waited = time.monotonic() - started
        if (listed or waited > _LISTED_SECONDS) and all(
            part.num_rows < INDEXED_FROM or part.index_name for part in parts
        ):
            return
        if waited > _INDEX_SECONDS:
            raise CollectionError(
                f"Milvus has not indexed {target.name!r} within the hour; look at its index "
                f"nodes and run the same command again."
            )
        time.sleep(0.5)
        client.refresh_load(target.name)
