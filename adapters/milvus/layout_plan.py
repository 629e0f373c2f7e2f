"""Whether a Milvus collection can be copied into cells, and what that would take."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from amips_plugins.adapters.copies.row_changes import encoded
from amips_plugins.adapters.milvus.cell_index import (
    INDEXED_FROM,
    index_search,
    is_scanned,
    unindexed_cells,
)
from amips_plugins.adapters.milvus.cells import CELL_FIELD
from amips_plugins.adapters.milvus.opening import describe_index
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.cell_layout import BuildPlan, LayoutSpec, Storage
from amips_plugins.errors import CollectionError, InvalidInput

__all__ = ["choose_storage", "has_clustering_keys", "plan_copy"]

_MANY_PARTITIONS = 128  # 256 took a server a minute to load
_MAX_PARTITIONS = 1024  # the documented limit of Milvus 2.4 and later
_SAMPLE = 512  # rows read to estimate size and speed
_PASSES = 4  # one to copy, of which writing takes as long as reading, and one to compare
_OVERHEAD = 1.3  # of what a server stores over the rows themselves
_LITE_OVERHEAD = {"partitions": 4.0, "field": 2.5}  # with index and log, before it tidies up
_LITE_BYTES = 2e6  # of a file whatever is in it
_ROOM = 1.2  # of the disk must be free


def plan_copy(
    table: Table,
    spec: LayoutSpec,
    alias: str | None,
    target: str,
    path: Callable[[], Path | None],
) -> BuildPlan:
    """Check the copy, and say what making it would do (see ``Layouts.plan``)."""
    storage = choose_storage(spec)
    _check(table, spec, storage, alias)
    keys = _count_ids(table)
    n_bytes, rate = _estimate(table, keys + spec.copies, storage)
    folder = path()
    if folder is not None:
        _check_disk(folder, n_bytes)
    kind = "a partition for each" if storage == "partitions" else f"the field {CELL_FIELD!r}"
    index = "the same index" if spec.index == "auto" else f"a {spec.index.upper()} index"
    steps = [
        f"create {target!r} with {spec.n_cells} cells ({kind}) and {index}",
        f"copy {keys:,} keys of {table.name!r}, then what changed meanwhile, until equal",
        "compare counts and the neighbours of sampled keys",
    ]
    if alias is not None:
        steps.append(f"point alias {alias!r} at {target!r}, then copy what changed meanwhile")
    steps.append(f"keep {table.name!r} until it is dropped")
    notes = [
        *_notes(table, spec, storage, alias, target),
        *_copies_notes(spec, keys, n_bytes),
        *_index_notes(table, spec, storage, keys),
    ]
    rows = keys + spec.copies
    return BuildPlan(tuple(steps), keys, n_bytes, _PASSES * rows / rate, tuple(notes))


def choose_storage(spec: LayoutSpec) -> Storage:
    """Return where the cells go: partitions where they are few enough, else a field."""
    if spec.storage in ("payload", "copy", "shards"):
        raise InvalidInput(
            f"The storage {spec.storage!r} is for Qdrant; Milvus has 'partitions' and 'field'."
        )
    if spec.shared and spec.storage == "field":
        raise InvalidInput(
            f"The cells {spec.layout!r} share keys, and the field of a row holds one cell; use the "
            f"storage 'partitions', or a bundle that was trained with --spill 0."
        )
    if spec.storage is not None:
        return spec.storage
    return "partitions" if spec.shared or spec.n_cells <= _MANY_PARTITIONS else "field"


def has_clustering_keys(version: str) -> bool:
    """Whether a server of this version stores rows by a clustering key: 2.4 and later."""
    match = re.match(r"v?(\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) >= (2, 4)


def _check(table: Table, spec: LayoutSpec, storage: Storage, alias: str | None) -> None:
    name = table.name
    if spec.shared and table.is_lite:
        raise InvalidInput(
            f"The cells {spec.layout!r} share keys, and Milvus Lite keeps one row of an id, in "
            f"whatever partition it was written to last; use a server, or a bundle that was "
            f"trained with --spill 0."
        )
    if table.cells is not None and table.cells.layout == spec.layout:
        raise InvalidInput(
            f"{name!r} is laid out in the cells {spec.layout!r} already, and the alias {alias!r} "
            f"names another collection; point it at {name!r}, or choose another alias."
        )
    if storage == "partitions" and spec.n_cells > _MAX_PARTITIONS:
        raise InvalidInput(
            f"{spec.n_cells} cells cannot be partitions of Milvus, which has at most "
            f"{_MAX_PARTITIONS}; use the storage 'field'."
        )
    if any(field.get("is_partition_key") for field in table.raw["fields"]):
        raise InvalidInput(
            f"Collection {name!r} has a partition key, which a copy in cells would lose; "
            f"lay out a collection without one."
        )
    own = table.own_partitions()
    if own:
        raise InvalidInput(
            f"Collection {name!r} has partitions of its own ({', '.join(own[:5])}), which cells "
            f"would replace; lay out a collection without partitions."
        )
    if table.cells is None and any(field["name"] == CELL_FIELD for field in table.raw["fields"]):
        raise InvalidInput(
            f"Collection {name!r} has a field {CELL_FIELD!r} that holds no cells of ours; "
            f"lay out a collection without it."
        )
    if alias is not None and table.raw.get("auto_id"):
        raise InvalidInput(
            f"Milvus makes the ids of {name!r}, which a copy has to keep, so behind the alias "
            f"{alias!r} writers would have to bring their own; lay out the collection by its own "
            f"name, and let the writers go over when they do."
        )
    if alias is not None and alias in table.client.list_collections():
        raise InvalidInput(
            f"{alias!r} is a collection, and Milvus allows no alias of that name; choose another "
            f"alias."
        )


def _count_ids(table: Table) -> int:
    before = table.count_keys()
    distinct = sum(len(page) for page in table.pages(16_384, 1 << 30, [table.key]))
    more = min(before, table.count_keys()) - distinct  # or others wrote and deleted meanwhile
    if more <= 0:
        return distinct
    twice = table.count_twins()
    # In cells others upsert beside the row in a cell, and the newer one is copied.
    if twice and not table.in_partitions:
        raise InvalidInput(
            f"Collection {table.name!r} holds {twice} rows whose id another row has too, and a "
            f"copy would keep one of each; delete these ids and write them once."
        )
    if more > twice and table.count_keys() - distinct > twice:
        raise InvalidInput(
            f"Collection {table.name!r} counts {more - twice} rows more than Milvus hands out, and "
            f"a copy would lack them; delete them (one with the id {2**63 - 1} is such a row)."
        )
    return distinct


def _estimate(table: Table, keys: int, storage: Storage) -> tuple[int, float]:
    """Return what the copy takes in bytes, and how many rows a second are read now."""
    started = time.perf_counter()
    rows = next(table.pages(_SAMPLE, 8 << 20, ["*"]), [])
    seconds = time.perf_counter() - started
    size = sum(len(encoded(row)) for row in rows) / max(1, len(rows))
    # Vectors travel as 9 bytes a number and are stored as 4.
    vectors = 5 * table.info.dim
    overhead, fixed = (_LITE_OVERHEAD[storage], _LITE_BYTES) if table.is_lite else (_OVERHEAD, 0.0)
    return int(keys * max(size - vectors, 4.0) * overhead + fixed), max(1.0, len(rows) / seconds)


def _check_disk(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < _ROOM * n_bytes:
        raise CollectionError(
            f"The copy takes about {n_bytes / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; "
            f"make room first."
        )


def _index_notes(table: Table, spec: LayoutSpec, storage: Storage, keys: int) -> Sequence[str]:
    given = {"index_type": spec.index} if spec.index != "auto" else describe_index(table)
    if is_scanned(given):
        return ()
    index, notes = index_search(given), list[str]()
    if index.kind == "graph" and not spec.graphs:
        notes.append(
            "an index inside the cells misses keys that a scan of them finds, which the bundle's "
            "targets do not count: measure with amips evaluate, and search wider (ef), or train "
            "with --index hnsw"
        )
    if index.kind == "lists" and spec.lists is None:
        notes.append(
            "a search goes through all lists of the cells that it chooses, so that the bundle's "
            "targets hold; train with --index ivf_sq8 to go through as few as they take"
        )
    if index.oversampling > 1.0:
        notes.append(
            f"cells are searched by their codes, and the best {index.oversampling:g} candidates "
            f"for every hit scored by their vectors, which may lie on the disk (mmap)"
        )
    small = unindexed_cells(spec.sizes, keys, spec.n_cells)
    if storage == "field":
        notes.append("with the storage 'field' one index lies over all cells, and none in each")
    elif small and not table.is_lite:
        notes.append(
            f"{small} of {spec.n_cells} cells hold fewer than {INDEXED_FROM:,} keys, for which "
            f"Milvus builds no index: they are scanned"
        )
    return notes


def _copies_notes(spec: LayoutSpec, keys: int, n_bytes: int) -> Sequence[str]:
    if not spec.shared:
        return ()
    rows = keys + spec.copies
    return (
        f"keys in more than one cell have a row in each: about {spec.copies:,} rows more, "
        f"{rows / max(1, keys):.2f} times the memory, of which they take about "
        f"{n_bytes * spec.copies / max(1, rows) / 1e6:,.0f} MB besides the index; Milvus' own "
        f"count(*) counts them, Milvus' answers do not",
    )


def _notes(
    table: Table, spec: LayoutSpec, storage: Storage, alias: str | None, target: str
) -> Sequence[str]:
    notes = []
    if storage == "partitions" and spec.n_cells > _MANY_PARTITIONS:
        notes.append(
            f"{spec.n_cells} partitions take Milvus minutes to load; {_MANY_PARTITIONS} or fewer "
            f"are advised, or the storage 'field'"
        )
    if table.raw.get("auto_id"):
        notes.append(
            "Milvus made the ids; the copy keeps them, so writers to it have to bring their own"
        )
    if alias is None:
        notes.append(
            f"no alias moves: readers and writers have to go over to {target!r}, and what is "
            f"written to {table.name!r} after the copy stays there"
        )
    if not table.is_lite:
        notes.append("the copy is loaded beside the collection, and takes as much memory again")
    return notes
