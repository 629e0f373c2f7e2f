"""Getting at a Milvus database, and finding out what a collection of it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from amips_plugins.adapters.milvus.cells import CellProperties, draining, generation_of, is_ours
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.collection import CollectionInfo
from amips_plugins.errors import (
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    FieldNotFound,
    InvalidInput,
    MetricNotSupported,
    require,
)
from amips_plugins.vectors import Metric

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ["describe_index", "draining_source", "open_client", "open_table", "widest_params"]

_METRICS = {"IP": Metric.IP, "COSINE": Metric.COSINE, "L2": Metric.L2}
_CONNECT_SECONDS = 5.0
_MOST_PROBES = 65_536
_MOST_CANDIDATES = 32_768


def open_client(address: str, token: str | None, database: str) -> MilvusClient:
    """Open a client (see ``MilvusCollection.connect``)."""
    if urlsplit(address).scheme in ("http", "https"):
        client = _connect_server(address, token, database)
    else:
        client = _connect_lite(address, database)
    if database and database not in (there := client.list_databases()):
        client.close()
        raise CollectionNotFound(
            f"Milvus has no database {database!r}; it has: {', '.join(sorted(there))}."
        )
    return client


def _connect_server(address: str, token: str | None, database: str) -> MilvusClient:
    pymilvus = require("pymilvus", "milvus")
    exceptions = require("pymilvus.exceptions", "milvus")
    try:
        return pymilvus.MilvusClient(
            address, token=token or "", db_name=database, timeout=_CONNECT_SECONDS
        )
    except exceptions.MilvusException as exc:
        host = urlsplit(address).netloc.rpartition("@")[2]  # the rest may hold a password
        raise DatabaseUnreachable(
            f"No Milvus server lets us in at {host} ({exc.message}); "
            f"start it, or check the address, the token and the database."
        ) from exc


def _connect_lite(address: str, database: str) -> MilvusClient:
    if not address.endswith(".db"):
        raise InvalidInput(
            f"{address!r} is no Milvus address; pass the path of a .db database, or "
            f"http(s)://host:port."
        )
    pymilvus = require("pymilvus", "milvus-lite")
    require("milvus_lite", "milvus-lite")
    exceptions = require("pymilvus.exceptions", "milvus-lite")
    if not Path(address).exists():
        raise CollectionNotFound(f"There is no Milvus Lite database {address!r}; check the path.")
    with suppress(exceptions.MilvusException):
        return pymilvus.MilvusClient(address, db_name=database, timeout=_CONNECT_SECONDS)
    # Once more: in a process that had it open before, the first connection after half a minute
    # without a call is one that the engine has closed ("too many pings").
    try:
        return pymilvus.MilvusClient(address, db_name=database, timeout=_CONNECT_SECONDS)
    except exceptions.MilvusException as exc:
        raise DatabaseUnreachable(
            f"Milvus Lite cannot open {address!r}; close the other process that has it open "
            f"(one at a time may), or make it anew if an older Milvus Lite wrote it."
        ) from exc


def open_table(client: MilvusClient, name: str, field: str | None = None) -> Table:
    """Find out what a collection, or an alias of one, is; refuse as ``MilvusCollection.info``."""
    if not client.has_collection(name):
        names = ", ".join(sorted(client.list_collections())) or "none"
        raise CollectionNotFound(
            f"Milvus has no collection {name!r}; it has: {names}. Correct the name."
        )
    raw = client.describe_collection(name)
    name = raw["collection_name"]
    vector = _vector_field(raw["fields"], name, field)
    metric = _metric(client, name, vector["name"])
    key = next(entry for entry in raw["fields"] if entry.get("is_primary"))
    is_lite = str(client.get_server_version()).startswith("milvus_lite")
    if client.get_load_state(name)["state"].name == "NotLoad":
        if not is_lite:  # how much memory a server spends is its operator's to decide
            raise CollectionError(
                f"Collection {name!r} is not loaded; call client.load_collection({name!r})."
            )
        client.load_collection(name)
    schema = {
        entry["name"]: entry["type"].name for entry in raw["fields"] if not is_ours(entry["name"])
    }
    dim = int(vector["params"]["dim"])
    cells = CellProperties.read(raw.get("properties") or {})
    info = CollectionInfo(
        "milvus",
        name,
        vector["name"],
        metric,
        dim,
        schema,
        namespace=_database(client),
        family=generation_of(name, cells)[0],
    )
    return Table(client, info, raw, key["name"], key["type"].name == "VARCHAR", is_lite, cells)


def _database(client: MilvusClient) -> str:
    """Return the database that a client works in; empty for the default one."""
    name = str(getattr(getattr(client, "_config", None), "db_name", "") or "")
    return "" if name == "default" else name


def _vector_field(
    fields: Sequence[Mapping[str, Any]], name: str, wanted: str | None
) -> Mapping[str, Any]:
    vectors = {field["name"]: field for field in fields if field["type"].name == "FLOAT_VECTOR"}
    if wanted is None and len(vectors) == 1:
        return next(iter(vectors.values()))
    if wanted is not None and wanted in vectors:
        return vectors[wanted]
    names = ", ".join(sorted(vectors)) or "none"
    if wanted is None:
        raise FieldNotFound(
            f"Collection {name!r} has {len(vectors)} float vector fields ({names}); "
            f"name the one to search."
        )
    raise FieldNotFound(
        f"Collection {name!r} has no float vector field {wanted!r}; it has: {names}."
    )


def _metric(client: MilvusClient, name: str, field: str) -> Metric:
    indexes = client.list_indexes(name, field_name=field)
    if not indexes:
        raise CollectionError(
            f"Field {field!r} of collection {name!r} has no index, which is where Milvus keeps "
            f"the metric; create one with client.create_index."
        )
    metric = str(client.describe_index(name, indexes[0]).get("metric_type")).upper()
    if metric not in _METRICS:
        raise MetricNotSupported(
            f"Field {field!r} of collection {name!r} compares by {metric}; "
            f"use an index with one of {', '.join(_METRICS)}."
        )
    return _METRICS[metric]


def describe_index(table: Table, timeout: float | None = None) -> Mapping[str, Any]:
    """Return what Milvus says of the vector field's index; nothing where there is none."""
    client, field = table.client, table.info.field
    indexes = client.list_indexes(table.name, field_name=field, timeout=timeout)
    found: Mapping[str, Any] = (
        client.describe_index(table.name, indexes[0], timeout=timeout) if indexes else {}
    )
    return found


def widest_params(index: Mapping[str, Any], k: int, *, is_lite: bool) -> dict[str, int]:
    """Return the parameters with which a search through an index finds the most.

    The limits are those of Milvus' documentation, page "In-memory Index", and for DISKANN "On-disk
    Index". What is not listed there (FLAT, AUTOINDEX) has nothing to set.
    """
    kind = str(index.get("index_type", "")).upper()
    if kind == "DISKANN":
        return {"search_list": max(200, min(10 * k, 65_535)) if k > 20 else 200}
    if kind.startswith("HNSW"):
        return {"ef": max(k, _MOST_CANDIDATES)}
    if kind.startswith("IVF") or kind == "SCANN":
        # Milvus Lite makes 128 lists whatever the description says, and takes any number.
        nlist = _MOST_PROBES if is_lite else int(index.get("nlist", _MOST_PROBES))
        probes = {"nprobe": min(nlist, _MOST_PROBES)}
        return {**probes, "reorder_k": max(k, _MOST_CANDIDATES)} if kind == "SCANN" else probes
    return {}


def looks_at_all(index: Mapping[str, Any]) -> bool:
    """Tell whether a search through an index with its widest parameters misses nothing."""
    return str(index.get("index_type", "")).upper() in ("FLAT", "IVF_FLAT")


def draining_source(table: Table) -> Table | None:
    """Return what has to hear of every write to a table first (see ``layouts``), if anything."""
    name, client = draining(table.name), table.client
    if not client.has_collection(name):
        return None
    try:
        return open_table(client, name, table.info.field)
    except Exception:  # each kind of Milvus has its own error for an alias that is gone
        if client.has_collection(name):
            raise
        return None  # the build has ended in this moment
