"""What crash tests need: a client that is watched, a writer that remembers, and a check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.shared_rows import torn_keys
from amips_plugins.collection import Id
from amips_plugins.vectors import FloatArray, IntArray

_CHANGING = {
    "alter_alias",
    "alter_collection_properties",
    "create_alias",
    "create_collection",
    "create_index",
    "create_partition",
    "delete",
    "drop_collection",
    "flush",
    "insert",
    "load_collection",
    "rename_collection",
    "upsert",
}


class Killed(BaseException):
    """The process ended here."""


class Watched:
    """A client that tells of every call that changes something, before and after it."""

    def __init__(self, client: Any, told: Callable[[str, bool], None]) -> None:
        self._client = client
        self._told = told

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name not in _CHANGING:
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            self._told(name, False)
            answer = method(*args, **kwargs)
            self._told(name, True)
            return answer

        return call


class Writer:
    """Writes through an alias as the router does, and remembers what it was told is safe.

    Parameters
    ----------
    client
        Its own client.
    alias
        What it writes to; ids are whole numbers, and cells their remainders.
    n_cells
        Number of cells.
    fields
        Stored fields of every row.
    assign
        Gives ids their cells; left out, their remainders.
    """

    def __init__(
        self,
        client: Any,
        alias: str = "live",
        n_cells: int = 2,
        fields: Mapping[str, Any] | None = None,
        assign: Callable[[Sequence[Id]], IntArray] | None = None,
    ) -> None:
        self.live = MilvusCollection(client, alias)
        self.assign = assign or (lambda ids: np.asarray(ids, dtype=np.int64) % n_cells)
        self.fields = {} if fields is None else fields
        self.rng = np.random.default_rng(0)
        self.expected: dict[Id, FloatArray] = {
            key: vector
            for batch in self.live.scan(100)
            for key, vector in zip(batch.ids, batch.vectors, strict=True)
        }

    def write(self, ids: Sequence[int]) -> None:
        """Upsert these ids, or delete them, until that is in the collection that serves."""
        vectors = self.rng.standard_normal((len(ids), self.live.info.dim)).astype(np.float32)
        gone = self.rng.random() < 0.3
        while True:
            collection = self.live.current()
            if gone:
                collection.delete(ids)
            else:
                cells = self.assign(ids) if collection.layout() else None
                collection.upsert(ids, vectors, [self.fields] * len(ids), cells)
            self.live = collection
            if collection.current() is collection:
                break
        for key, vector in zip(ids, vectors, strict=True):
            self.expected.pop(key, None)
            if not gone:
                self.expected[key] = vector


def contents(collection: MilvusCollection) -> dict[Id, list[float]]:
    found = [
        (key, vector.tolist())
        for batch in collection.scan(100)
        for key, vector in zip(batch.ids, batch.vectors, strict=True)
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def check(
    collection: MilvusCollection,
    expected: Mapping[Id, FloatArray],
    n_cells: int = 2,
    assign: Callable[[Sequence[Id]], IntArray] | None = None,
) -> None:
    """The keys are there, each once, in all cells that it belongs to and in no other."""
    there = contents(collection)
    lost = sorted(set(expected) - set(there))
    risen = sorted(set(there) - set(expected))
    other = [k for k in there if k in expected and there[k] != expected[k].tolist()]
    assert (lost, risen, other) == ([], [], []), f"lost {lost}, risen {risen}, other {other}"
    table = collection.table()
    cells = table.cells
    assert cells is not None
    keys = sorted(expected)
    homes = np.array(keys) % n_cells if assign is None else assign(keys)
    homes = homes.reshape(len(keys), -1)
    for cell in range(n_cells):
        where, partitions = f"amips_cell == {cell}", None
        if cells.storage == "partitions":
            where, partitions = "", [cells.partition(cell)]
        fields = [table.key, table.info.field]
        pages = table.pages(1000, 8 << 20, fields, where=where, partitions=partitions)
        found = {row[table.key]: table.vectors([row])[0] for page in pages for row in page}
        inside = [key for key, own in zip(keys, homes, strict=True) if cell in own]
        assert list(found) == inside
        assert all(found[key].tolist() == expected[key].tolist() for key in inside)
    if table.shares_keys:
        assert list(torn_keys(table)) == []
    assert collection.overflow() == 0
    assert collection.count() == len(expected)
