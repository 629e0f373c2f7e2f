"""Milvus: Milvus Lite and the server, both through ``pymilvus.MilvusClient``."""

from __future__ import annotations

import json
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from amips_plugins.adapters.base import (
    AssignCells,
    CollectionInfo,
    Cursor,
    Hit,
    KeyBatch,
    SearchRequest,
    check_layout,
    group_by_cells,
)
from amips_plugins.errors import (
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    FieldNotFound,
    InvalidInput,
    MetricNotSupported,
    require,
)
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import IntArray, Metric, native_scores

if TYPE_CHECKING:
    from pymilvus import MilvusClient

__all__ = ["MilvusCollection"]

_METRICS = {"IP": Metric.IP, "COSINE": Metric.COSINE, "L2": Metric.L2}
_OVERFLOW = "_default"  # where Milvus puts a row that names no partition
_CELL = re.compile(r"cell_([a-z0-9]{1,16})_(\d{4})")
_GENERATION = re.compile(r"__g(\d+)$")
_LAYOUT = re.compile(r"[a-z0-9]{1,16}")
_CONNECT_SECONDS = 5.0
_MANY_CELLS = 128  # 256 partitions took a server a minute to load
_MAX_CELLS = 1024  # the documented limit of Milvus 2.4 and later
_MAX_PAGE = 16_384  # rows Milvus returns for one query
_FIRST_PAGE = 256
_PAGE_BYTES = 32 << 20  # well under the 100 MB of one answer
_COPY_BYTES = 8 << 20  # the other fields of the rows come on top


@dataclass(frozen=True, slots=True)
class _Described:
    info: CollectionInfo
    raw: Mapping[str, Any]  # describe_collection's answer
    key: str  # name of the primary key
    string_keys: bool
    is_lite: bool


class MilvusCollection:
    """A vector field of a Milvus collection. Constructing it asks the database nothing.

    An alias is followed once, at the first use: the object then stays on that collection, so that
    a moved alias never mixes two generations. ``info.name`` is the collection's own name.

    Parameters
    ----------
    client
        An open client; it stays the caller's to close.
    name
        Name or alias of the collection.
    field
        The vector field; may be left out where there is only one.

    Examples
    --------
    >>> from pymilvus import MilvusClient  # doctest: +SKIP
    >>> collection = MilvusCollection(MilvusClient("docs.db"), "docs")  # doctest: +SKIP
    >>> collection.info.metric  # doctest: +SKIP
    <Metric.COSINE: 'cosine'>
    """

    def __init__(self, client: MilvusClient, name: str, field: str | None = None) -> None:
        self._client = client
        self._name = name
        self._field = field
        self._own: tuple[str, str | None] | None = None
        self._described: _Described | None = None
        self._layout: str | None = None
        self._layout_read = False

    @classmethod
    def connect(
        cls, address: str, name: str, field: str | None = None, token: str | None = None
    ) -> MilvusCollection:
        """Open a client for one collection; ``close`` closes it.

        Parameters
        ----------
        address
            Path of a Milvus Lite database, ending in ``.db``, or ``http(s)://host:port``.
        name
            Name or alias of the collection.
        field
            The vector field; may be left out where there is only one.
        token
            ``"user:password"`` or an API key; None where the server asks for none.

        Raises
        ------
        MissingExtra
            pymilvus, or milvus-lite for a path, is not installed.
        CollectionNotFound
            The path does not exist; no empty database is created.
        DatabaseUnreachable
            No server answers, or the file cannot be opened.
        InvalidInput
            The address is neither a path nor a URL.
        """
        if urlsplit(address).scheme in ("http", "https"):
            client = _connect_server(address, token)
        else:
            client = _connect_lite(address)
        collection = cls(client, name, field)
        collection._own = (address, token)
        return collection

    @property
    def info(self) -> CollectionInfo:
        """What the collection is; the first use asks the database.

        Raises
        ------
        CollectionNotFound
            There is no such collection or alias.
        FieldNotFound
            There is no such vector field, or several and none was named.
        MetricNotSupported
            The index compares otherwise than by IP, COSINE or L2.
        CollectionError
            The field has no index, or a server has not loaded the collection.
        """
        return self._describe().info

    def _describe(self) -> _Described:
        if self._described is None:
            self._described = self._ask_what_it_is()
        return self._described

    def _ask_what_it_is(self) -> _Described:
        if not self._client.has_collection(self._name):
            names = ", ".join(sorted(self._client.list_collections())) or "none"
            raise CollectionNotFound(
                f"Milvus has no collection {self._name!r}; it has: {names}. Correct the name."
            )
        raw = self._client.describe_collection(self._name)
        name = raw["collection_name"]
        field = _vector_field(raw["fields"], name, self._field)
        metric = self._metric(name, field["name"])
        key = next(entry for entry in raw["fields"] if entry.get("is_primary"))
        is_lite = str(self._client.get_server_version()).startswith("milvus_lite")
        if self._client.get_load_state(name)["state"].name == "NotLoad":
            if not is_lite:  # how much memory a server spends is its operator's to decide
                raise CollectionError(
                    f"Collection {name!r} is not loaded; call client.load_collection({name!r})."
                )
            self._client.load_collection(name)
        schema = {entry["name"]: entry["type"].name for entry in raw["fields"]}
        dim = int(field["params"]["dim"])
        info = CollectionInfo("milvus", name, field["name"], metric, dim, schema)
        return _Described(info, raw, key["name"], key["type"].name == "VARCHAR", is_lite)

    def _metric(self, name: str, field: str) -> Metric:
        indexes = self._client.list_indexes(name, field_name=field)
        if not indexes:
            raise CollectionError(
                f"Field {field!r} of collection {name!r} has no index, which is where Milvus keeps "
                f"the metric; create one with client.create_index."
            )
        metric = str(self._client.describe_index(name, indexes[0]).get("metric_type")).upper()
        if metric not in _METRICS:
            raise MetricNotSupported(
                f"Field {field!r} of collection {name!r} compares by {metric}; "
                f"use an index with one of {', '.join(_METRICS)}."
            )
        return _METRICS[metric]

    def count(self) -> int:
        """Return the number of keys, with every write acknowledged before this call."""
        rows = self._client.query(
            self.info.name, output_fields=["count(*)"], consistency_level="Strong"
        )
        return int(rows[0]["count(*)"])

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every key once, in the order of the ids, behind the id ``after``.

        A batch may be smaller than ``batch_size``, so that one answer stays within what Milvus
        sends. It is not a snapshot: a key written meanwhile may appear, a deleted one vanish.

        Raises
        ------
        InvalidInput
            ``batch_size`` is under 1, or ``after`` is not an id of this collection's kind.
        """
        key, field = self._describe().key, self.info.field
        for rows in self._pages(batch_size, _PAGE_BYTES, [key, field], after):
            ids = [row[key] for row in rows]
            vectors = np.asarray([row[field] for row in rows], dtype=np.float32)
            yield KeyBatch(ids, vectors, ids[-1])

    def _pages(
        self, limit: int, max_bytes: int, fields: Sequence[str], after: Cursor | None = None
    ) -> Iterator[list[dict[str, Any]]]:
        described = self._describe()
        if limit < 1:
            raise InvalidInput(f"batch_size is {limit}; pass at least 1.")
        if after is not None and isinstance(after, str) is not described.string_keys:
            kind = "strings" if described.string_keys else "integers"
            raise InvalidInput(
                f"The cursor {after!r} does not fit collection {described.info.name!r}, "
                f"whose ids are {kind}; start without a cursor."
            )
        limit = min(limit, _MAX_PAGE, max(64, max_bytes // (4 * described.info.dim)))
        asked = min(limit, _FIRST_PAGE)
        widest = 1.0
        while True:
            # These are the requests of pymilvus' QueryIterator, whose flag makes Milvus order the
            # rows by id (a plain query of Milvus Lite does not); its own cursor quotes no strings.
            rows = self._client.query(
                described.info.name,
                filter="" if after is None else f"{described.key} > {_literal(after)}",
                output_fields=list(fields),
                limit=asked,
                iterator="True",
                reduce_stop_for_best="True",
                collection_id=described.raw["collection_id"],
                consistency_level="Strong",
            )
            if not rows:
                return
            after = rows[-1][described.key]
            yield from (list(rows[row : row + limit]) for row in range(0, len(rows), limit))
            # A server answers with up to ``asked`` rows of every segment, so ask for fewer where
            # there are many, and find that out with a small page.
            widest = max(widest, len(rows) / asked)
            asked = min(2 * asked, max(1, int(limit / widest)))

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search by a plan, in one call for all queries that search the same cells.

        ``request.filter`` is a Milvus expression; ``request.params`` are search parameters such
        as ``{"nprobe": 16}``. Milvus Lite ignores ``request.timeout``.

        Raises
        ------
        InvalidInput
            The filter is no expression, ``params`` name another metric than the index, or the
            plan counts the cells of another layout.
        CollectionError
            Milvus Lite has lost a cell's partition, which it would take for an empty one; on a
            server its own error says so.
        """
        if plan.cells is None:
            return self._search(request, plan, range(len(request.queries)), None)
        check_layout(plan, self.layout(), self.info.name)
        found: list[list[Hit]] = [[] for _ in request.queries]
        for cells, rows in group_by_cells(plan.cells):
            partitions = [_OVERFLOW, *(_partition(str(plan.layout), cell) for cell in cells)]
            self._check_partitions(partitions)
            for row, hits in zip(rows, self._search(request, plan, rows, partitions), strict=True):
                found[row] = hits
        return found

    def _check_partitions(self, partitions: Sequence[str]) -> None:
        if not self._describe().is_lite:
            return
        missing = set(partitions) - set(self._client.list_partitions(self.info.name))
        if missing:
            raise CollectionError(
                f"Collection {self.info.name!r} has no partition {min(missing)!r}; "
                f"lay it out again with lay_out."
            )

    def _search(
        self,
        request: SearchRequest,
        plan: QueryPlan,
        rows: Sequence[int],
        partitions: Sequence[str] | None,
    ) -> list[list[Hit]]:
        described = self._describe()
        info = described.info
        if not isinstance(request.filter, str | None):
            raise InvalidInput(
                f"A Milvus filter is an expression such as 'year > 2000', "
                f"but got {type(request.filter).__name__}."
            )
        # With no field named, Milvus Lite returns all of them, vectors too.
        fields = list(request.fields) or [described.key]
        limit = request.k
        vectors = request.queries
        if plan.rewritten is not None:
            vectors = plan.rewritten
            limit = max(plan.rescore, request.k)
            fields = list(dict.fromkeys([*fields, info.field]))
        answers = self._client.search(
            info.name,
            data=vectors[list(rows)],
            anns_field=info.field,
            limit=limit,
            filter=request.filter or "",
            output_fields=fields,
            search_params=self._search_params(request.params),
            partition_names=partitions,
            timeout=request.timeout,
        )
        found = []
        for row, answer in zip(rows, answers, strict=True):
            scores = [float(hit["distance"]) for hit in answer]
            places: Sequence[int] = range(len(answer))
            if plan.rewritten is not None and scores:
                keys = np.asarray([hit["entity"][info.field] for hit in answer], dtype=np.float32)
                exact = native_scores(request.queries[row], keys, info.metric)
                ranked = -exact if info.metric.larger_is_better else exact
                places = np.argsort(ranked, kind="stable")[: request.k].tolist()
                scores = exact.tolist()
            found.append(
                [
                    Hit(
                        # Servers up to 2.3 do not say what the key is called.
                        answer[place].get(described.key, answer[place].get("id")),
                        scores[place],
                        {name: answer[place]["entity"].get(name) for name in request.fields},
                    )
                    for place in places
                ]
            )
        return found

    def _search_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        metric = self.info.metric.name
        asked = dict(params or {})
        for place in (asked, asked.get("params") or {}):
            if str(place.get("metric_type", metric)).upper() != metric:
                raise InvalidInput(  # Milvus Lite would answer with wrong scores
                    f"params name the metric {place['metric_type']}, but the index of "
                    f"{self.info.name!r} compares by {metric}; leave metric_type out."
                )
        return {**asked, "metric_type": metric}

    def layout(self) -> str | None:
        """Return the identifier of the cells, or None; read once from the partitions' names.

        Every name holds the identifier and a collection gets its cells before its name, so an
        answer kept here is never wrong for this collection.
        """
        if not self._layout_read:
            layouts = {match[1] for match in map(_CELL.fullmatch, self._partitions()) if match}
            self._layout = layouts.pop() if len(layouts) == 1 else None
            self._layout_read = True
        return self._layout

    def _partitions(self) -> list[str]:
        return [str(name) for name in self._client.list_partitions(self.info.name)]

    def lay_out(
        self, layout: str, n_cells: int, assign: AssignCells, progress: Progress = no_progress
    ) -> MilvusCollection:
        """Copy the collection into one with a partition for each cell, and return that.

        The copy is called ``<name>__g2``, the next ``<name>__g3`` and so on. It keeps ids, fields,
        properties and the other fields' indexes. The vector field gets a FLAT index whatever the
        source has: a cell is already a small share of the keys, and a search that is exact inside
        it finds what the cells were chosen for. The copy gets its name last, so a collection of
        that name is complete; what fails half-way is dropped, and the source is never changed.

        Parameters
        ----------
        layout
            Identifies the cells; lower-case letters and digits, at most 16.
        n_cells
            Number of cells, at most 1024; partitions cost a server time and memory, so more than
            128 warn.
        assign
            Gives each key its cell, or -1 for none.
        progress
            Watches the copying.

        Raises
        ------
        InvalidInput
            The layout's name or the number of cells cannot be used, ``assign`` answers with
            something else than cells, or the collection has partitions or a partition key of its
            own, which a copy would lose.
        CollectionError
            The collection changed while it was copied.
        """
        self._check_can_lay_out(layout, n_cells)
        name = self.info.name
        base = _GENERATION.sub("", name)
        building = f"{base}__building_{secrets.token_hex(4)}"
        try:
            self._create_copy(building, layout, n_cells)
            copied = self._copy_rows(building, layout, n_cells, assign, progress)
            self._client.flush(building)
            self._create_indexes(building)
            copy = f"{base}__g{self._next_generation(base)}"
            self._client.rename_collection(building, copy)
            building = copy
            self._client.load_collection(copy)
            result = self._sibling(copy)
            self._verify(result, copied)
        except BaseException:
            self._drop(building)
            raise
        return result

    def _check_can_lay_out(self, layout: str, n_cells: int) -> None:
        if not _LAYOUT.fullmatch(layout):
            raise InvalidInput(
                f"The layout is called {layout!r}; use at most 16 lower-case letters and digits."
            )
        if not 1 <= n_cells <= _MAX_CELLS:
            raise InvalidInput(
                f"{n_cells} cells cannot be partitions of Milvus; use 1 to {_MAX_CELLS}."
            )
        described = self._describe()
        name = described.info.name
        if any(field.get("is_partition_key") for field in described.raw["fields"]):
            raise InvalidInput(
                f"Collection {name!r} has a partition key, so Milvus allows it no partitions for "
                f"cells; lay out a collection without one."
            )
        own = [
            part for part in self._partitions() if part != _OVERFLOW and not _CELL.fullmatch(part)
        ]
        if own:
            raise InvalidInput(
                f"Collection {name!r} has partitions of its own ({', '.join(sorted(own)[:5])}), "
                f"which cells would replace; lay out a collection without partitions."
            )
        if n_cells > _MANY_CELLS:
            warnings.warn(
                f"{n_cells} partitions take Milvus minutes to load; "
                f"{_MANY_CELLS} or fewer are advised.",
                stacklevel=3,
            )

    def _create_copy(self, building: str, layout: str, n_cells: int) -> None:
        orm = require("pymilvus", "milvus")
        raw = self._describe().raw
        fields = [
            # The ids stay what they are, also where Milvus made them.
            {**field, "auto_id": False} if field.get("is_primary") else field
            for field in raw["fields"]
        ]
        schema = orm.CollectionSchema.construct_from_dict({**raw, "fields": fields})
        self._client.create_collection(
            building,
            schema=schema,
            num_shards=raw.get("num_shards") or 1,
            consistency_level=raw["consistency_level"],
            **({"properties": dict(raw["properties"])} if raw.get("properties") else {}),
        )
        for cell in range(n_cells):
            self._client.create_partition(building, _partition(layout, cell))

    def _copy_rows(
        self, building: str, layout: str, n_cells: int, assign: AssignCells, progress: Progress
    ) -> int:
        described = self._describe()
        info = described.info
        computed = {f["name"] for f in described.raw["fields"] if f.get("is_function_output")}
        copied = 0
        with progress("cells", self.count(), 0, "keys") as step:
            for rows in self._pages(_MAX_PAGE, _COPY_BYTES, ["*"]):
                vectors = np.asarray([row[info.field] for row in rows], dtype=np.float32)
                cells = np.asarray(assign([row[described.key] for row in rows], vectors))
                _check_cells(cells, len(rows), n_cells)
                for cell in np.unique(cells).tolist():
                    self._client.insert(
                        building,
                        [
                            {k: v for k, v in rows[place].items() if k not in computed}
                            for place in np.flatnonzero(cells == cell).tolist()
                        ],
                        partition_name=_partition(layout, cell) if cell >= 0 else _OVERFLOW,
                    )
                copied += len(rows)
                step.advance(len(rows))
        return copied

    def _create_indexes(self, building: str) -> None:
        info = self.info
        indexes = self._client.prepare_index_params()
        indexes.add_index(
            info.field, index_type="FLAT", index_name=info.field, metric_type=info.metric.name
        )
        for index in self._client.list_indexes(info.name):
            found = self._client.describe_index(info.name, index)
            if found["field_name"] != info.field:
                indexes.add_index(**{k: v for k, v in found.items() if k not in _INDEX_STATE})
        self._client.create_index(building, indexes)

    def generations(self) -> Iterator[MilvusCollection]:
        """Yield the laid-out copies ``NAME__g2``, ... of this collection, oldest first.

        They share this object's client.
        """
        base = _GENERATION.sub("", self.info.name)
        for number in range(2, self._next_generation(base)):
            if self._client.has_collection(f"{base}__g{number}"):
                yield type(self)(self._client, f"{base}__g{number}", self.info.field)

    def _next_generation(self, base: str) -> int:
        numbers = [
            int(match[1])
            for name in self._client.list_collections()
            if (match := _GENERATION.search(name)) and name == f"{base}{match[0]}"
        ]
        return max([1, *numbers]) + 1

    def _sibling(self, name: str) -> MilvusCollection:
        if self._own is None:
            return type(self)(self._client, name, self.info.field)
        address, token = self._own  # pymilvus shares the connection; each object closes its own
        return type(self).connect(address, name, self.info.field, token)

    def _verify(self, copy: MilvusCollection, copied: int) -> None:
        arrived, there = copy.count(), self.count()
        if not arrived == copied == there:
            raise CollectionError(
                f"Collection {self.info.name!r} changed while it was copied ({there} keys, "
                f"{copied} read, {arrived} written); stop its writers and lay it out again."
            )

    def _drop(self, name: str) -> None:
        exceptions = require("pymilvus.exceptions", "milvus")
        try:
            self._client.drop_collection(name, timeout=_CONNECT_SECONDS)
        except exceptions.MilvusException:  # the reason for the drop matters more: it is raised
            warnings.warn(
                f"The half-built collection {name!r} could not be dropped; drop it by hand.",
                stacklevel=3,
            )

    def close(self) -> None:
        """Close the client if ``connect`` opened it; safe to call twice."""
        if self._own is not None:
            self._client.close()


_INDEX_STATE = ("total_rows", "indexed_rows", "pending_index_rows", "state")


def _connect_server(address: str, token: str | None) -> MilvusClient:
    pymilvus = require("pymilvus", "milvus")
    exceptions = require("pymilvus.exceptions", "milvus")
    try:
        return pymilvus.MilvusClient(address, token=token or "", timeout=_CONNECT_SECONDS)
    except exceptions.MilvusException as exc:
        host = urlsplit(address).netloc.rpartition("@")[2]  # the rest may hold a password
        raise DatabaseUnreachable(
            f"No Milvus server lets us in at {host} ({exc.message}); "
            f"start it, or check the address and the token."
        ) from exc


def _connect_lite(address: str) -> MilvusClient:
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
    try:
        return pymilvus.MilvusClient(address, timeout=_CONNECT_SECONDS)
    except exceptions.MilvusException as exc:
        raise DatabaseUnreachable(
            f"Milvus Lite cannot open {address!r}; close the other process that has it open "
            f"(one at a time may), or make it anew if an older Milvus Lite wrote it."
        ) from exc


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


def _partition(layout: str, cell: int) -> str:
    return f"cell_{layout}_{cell:04d}"


def _literal(key: Cursor) -> str:
    # Milvus reads JSON's escapes, but not its \uXXXX for what can stand for itself.
    return json.dumps(key, ensure_ascii=False)


def _check_cells(cells: IntArray, n_keys: int, n_cells: int) -> None:
    if cells.shape != (n_keys,) or not np.issubdtype(cells.dtype, np.integer):
        raise InvalidInput(
            f"assign answered with {cells.dtype} of shape {cells.shape} for {n_keys} keys; "
            f"it must return one integer a key."
        )
    if n_keys and not (cells.min() >= -1 and cells.max() < n_cells):
        raise InvalidInput(
            f"assign chose cells from {cells.min()} to {cells.max()}; "
            f"there are 0 to {n_cells - 1}, and -1 for none."
        )
