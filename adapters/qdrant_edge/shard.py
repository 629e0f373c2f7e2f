"""An open Qdrant Edge shard: its folder, its lock, and the writes.

The engine keeps no metadata of a shard, so they are a small JSON file in the shard's folder, which
goes where the folder goes. Every write goes through the engine's log before it returns.

Importing this module needs the extra ``qdrant-edge``.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant_edge.cell_graphs import CellGraphs, graph_params
from amips_plugins.errors import (
    CollectionError,
    CollectionNotFound,
    DatabaseUnreachable,
    require,
)
from amips_plugins.files import replace_file

if TYPE_CHECKING:
    import qdrant_edge as edge
else:
    edge = require("qdrant_edge", "qdrant-edge")

__all__ = ["OpenShard"]

_CONFIG = "edge_config.json"  # the engine's own
_METADATA = "amips.json"
_GRAPHS = "amips_cells"  # folder of a layout's shards
_FLUSH_EVERY = 10_000  # keys: the log grows, and takes time to read again, until a flush


class OpenShard:
    """A shard that is open, shared by this process' collection objects; counts its ``writes``."""

    def __init__(self, shard: edge.EdgeShard, folder: Path) -> None:
        self._engine = shard
        self._process = os.getpid()
        self.folder = folder
        self.writes = 0
        self._unflushed = 0
        self._owned = False
        self._graphs: dict[str, CellGraphs] = {}
        self.writing = threading.RLock()
        """Held by a write that goes to several shards."""

    @classmethod
    def of(cls, shard: edge.EdgeShard, folder: Path) -> OpenShard:
        """Return the one object of an open shard: shards of cells cannot be opened twice."""
        found = _KNOWN.get(id(shard))
        if found is None:
            found = _KNOWN[id(shard)] = cls(shard, folder)
        return found

    @classmethod
    def load(cls, folder: Path) -> OpenShard:
        """Open a shard, which ``close`` closes.

        Raises ``CollectionNotFound``, ``CollectionError`` for one without a write-ahead log, or
        ``DatabaseUnreachable`` for one that is open elsewhere.
        """
        # The engine would make a shard's folders in whatever it is asked to load.
        if not (folder / _CONFIG).is_file():
            raise CollectionNotFound(
                f"There is no Qdrant Edge shard in {str(folder)!r}; check the path, or create one "
                "there with EdgeShard.create."
            )
        if _read_json(folder / _CONFIG).get("wal_enabled") is False:
            raise CollectionError(
                f"The Qdrant Edge shard in {str(folder)!r} has no write-ahead log, so nothing "
                "keeps other processes out or its last writes safe; create it with wal_enabled."
            )
        try:
            shard = edge.EdgeShard.load(str(folder))
        except Exception as exc:  # the engine knows no other class
            if "WouldBlock" not in str(exc):
                raise
            raise DatabaseUnreachable(
                f"The Qdrant Edge shard in {str(folder)!r} is open elsewhere, and only one process "
                "can have it, once; close it there."
            ) from exc
        opened = cls.of(shard, folder)
        opened._owned = True
        return opened

    @property
    def engine(self) -> edge.EdgeShard:
        """The engine's own object, in the process that opened it.

        Raises ``CollectionError`` in a fork, which would hang, or write where the other one writes.
        """
        if os.getpid() != self._process:
            raise CollectionError(
                f"The Qdrant Edge shard in {str(self.folder)!r} was opened before this process was "
                "forked and cannot be used here; open shards after a fork, each in one process."
            )
        return self._engine

    @property
    def owned(self) -> bool:
        """Whether ``load`` opened it, so that ``close`` lets go of the folder."""
        return self._owned

    def config(self) -> dict[str, Any]:
        """Read how the shard was created, as the engine writes it down."""
        return _read_json(self.folder / _CONFIG)

    def metadata(self) -> dict[str, Any]:
        """Read our file beside the engine's."""
        path = self.folder / _METADATA
        return _read_json(path) if path.is_file() else {}

    def write_metadata(self, changes: Mapping[str, Any]) -> None:
        """Replace these entries in one step; what they speak of is on the disk before them."""
        self.flush()
        content = {**self.metadata(), **changes}
        replace_file(self.folder / _METADATA, json.dumps(content, indent=1).encode())

    def graphs(self, record: LayoutRecord, field: str) -> CellGraphs:
        """Return the shards of a layout's cells."""
        _ = self.engine  # refuses forks
        with self.writing:
            if record.layout not in self._graphs:
                params = graph_params(self.config(), field)
                self._graphs[record.layout] = CellGraphs(self._place(record), params)
            return self._graphs[record.layout]

    def drop_graphs(self, record: LayoutRecord) -> None:
        """Remove them."""
        with self.writing:
            found = self._graphs.pop(record.layout, None)
            if found is not None:
                found.close()
            place = self._place(record)
            # Whoever is killed meanwhile must not leave half a shard that looks like one.
            gone = place.with_name(f"{place.name}.gone")
            shutil.rmtree(gone, ignore_errors=True)
            if place.is_dir():
                place.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)

    def _place(self, record: LayoutRecord) -> Path:
        return self.folder / _GRAPHS / record.layout

    def update(self, operation: edge.UpdateOperation, keys: int = 1) -> None:
        """Write. The log holds it on return: the process may be killed then."""
        self.writes += 1
        self.engine.update(operation)
        self._unflushed += keys
        if self._unflushed >= _FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Bring to the disk what only the log holds."""
        self._unflushed = 0
        for graphs in list(self._graphs.values()):  # first what the points say they are in
            graphs.flush()
        self.engine.flush()

    def optimize(self) -> None:
        """Let the engine rebuild its segments (see ``QdrantEdgeCollection.optimize``)."""
        self.engine.optimize()
        for graphs in list(self._graphs.values()):
            graphs.optimize()
        self.flush()

    def close(self) -> None:
        """Close the shard if ``load`` opened it; safe to call twice, and in a fork.

        Shards of cells are closed in any case.
        """
        here = os.getpid() == self._process  # else they are the other process's to close
        for graphs in self._graphs.values() if here else ():
            graphs.close()
        if self._owned:
            self._owned = False
            if here:
                self._engine.close()


# By the engine's object, which each of them keeps.
_KNOWN: WeakValueDictionary[int, OpenShard] = WeakValueDictionary()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CollectionError(f"The file {str(path)!r} is damaged; restore it from a backup.")
    return found
