"""Several collections searched as one, each of them a partition that a router may choose."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from amips_plugins.adapters.describe import with_cells
from amips_plugins.adapters.given import GivenLayouts
from amips_plugins.adapters.several.fan_out import FanOut
from amips_plugins.adapters.several.members import check_members, name_members, part_key
from amips_plugins.adapters.several.search import SearchedTogether
from amips_plugins.collection import (
    Collection,
    CollectionInfo,
    Cursor,
    Failure,
    Hit,
    Id,
    KeyBatch,
    SearchRequest,
)
from amips_plugins.collection.construction import Construction
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["SeveralCollections"]

_log = logging.getLogger("amips_plugins")


class SeveralCollections(SearchedTogether):
    """Several collections, of one database or of several, that are searched as one.

    A search asks them together. Hits say which ``collection`` they are of and keep their scores;
    an id that two collections have is two hits. A collection that fails, or gives no answer in
    time, is left out of it: the trace names it, ``left_out`` counts it, and the log says so once.
    After some failures in a row it is not asked for a while.

    As ``partitioned(Partitions(None, names))`` each collection is a cell of a plan; others are in
    every search.

    Parameters
    ----------
    collections
        The collections: a list, whose names are then such as ``milvus/docs``, or a mapping that
        names them. All their keys come from one model of embedding.
    name
        What they are called together, in a registry and in the log.
    strict
        Whether a search raises the error of a collection, in place of leaving it out.
    at_once
        Most calls of one search that are under way together.
    timeout
        Seconds for a search that names none itself.

    Attributes
    ----------
    left_out
        How many queries each collection was left out of.

    Raises
    ------
    InvalidInput
        There are none, two have one name, or their vectors or scores cannot be compared.

    Examples
    --------
    >>> import numpy as np
    >>> from amips_plugins import MemoryCollection
    >>> from amips_plugins.collection import SearchRequest
    >>> keys = np.eye(3, dtype=np.float32)
    >>> parts = {"a": MemoryCollection(keys), "b": MemoryCollection(keys[:2])}
    >>> both = SeveralCollections(parts)
    >>> (hits,) = both.search(SearchRequest(keys[:1], k=2))
    >>> [(hit.collection, hit.id) for hit in hits]
    [('a', 0), ('b', 0)]
    """

    break_even = 1.0  # a native search asks all of them, too
    max_candidates: int | None = None

    def __init__(
        self,
        collections: Sequence[Collection] | Mapping[str, Collection],
        *,
        name: str = "all",
        strict: bool = False,
        at_once: int = 8,
        timeout: float = 10.0,
    ) -> None:
        if at_once < 1:
            raise InvalidInput(f"at_once={at_once!r} asks nobody; pass 1 or more.")
        if not timeout > 0:
            raise InvalidInput(f"timeout={timeout!r} is no time; pass seconds above 0.")
        self._members = name_members(collections)
        one = check_members(self._members)
        self._info = CollectionInfo("several", name, "", one.metric, one.dim)
        self._given: Partitions | None = None
        self._strict = strict
        self._timeout = timeout
        self._fan_out = FanOut(name, self._members, at_once)

    @property
    def members(self) -> Mapping[str, Collection]:
        """The collections by their names."""
        return dict(self._members)

    @property
    def left_out(self) -> Counter[str]:
        """How many queries each collection was left out of."""
        return self._fan_out.left_out

    @property
    def info(self) -> CollectionInfo:
        """What they have in common."""
        return self._info

    def count(self) -> int:
        """Return the number of keys of all of them."""
        return sum(one.count() for one in self._members.values())

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read the collections one after the other, by their names; ids are ``Hit.key``.

        A cursor is the collection, and its own cursor, as JSON.
        """
        first, behind = ("", None) if after is None else json.loads(str(after))
        for name in sorted(self._members):
            if name < first:
                continue
            begin = behind if name == first else None
            for batch in self._members[name].scan(batch_size, begin):
                ids = [Hit(key, 0.0, {}, name).key for key in batch.ids]
                cursor = json.dumps([name, batch.cursor])
                values = None if self._given is None else [name] * len(ids)
                yield KeyBatch(ids, batch.vectors, cursor, values)

    def fetch(self, ids: Sequence[Id]) -> KeyBatch:
        """Read those of the keys that are there, by ``Hit.key``; failing collections have none."""
        wanted: dict[str, list[Id]] = {}
        for key in ids:
            name, own = part_key(key)
            if name in self._members:
                wanted.setdefault(name, []).append(own)
        found: list[Id] = []
        vectors = [np.empty((0, self._info.dim), dtype=np.float32)]
        for name, own_ids in wanted.items():
            try:
                batch = self._members[name].fetch(own_ids)
            except Exception as exc:  # noqa: BLE001 - as a search does without it
                _log.debug("%r cannot be read: %s", name, exc)
                continue
            found += [Hit(key, 0.0, {}, name).key for key in batch.ids]
            vectors.append(batch.vectors)
        return KeyBatch(found, np.concatenate(vectors))

    @property
    def exhaustive(self) -> bool:
        """Whether ``exact`` looks at every key of every collection."""
        return all(one.exhaustive for one in self._members.values())

    @property
    def timeout(self) -> float | None:
        """Seconds for a search that names none itself."""
        return self._timeout

    def describe(self) -> Construction:
        """Name the collections; nothing is changed."""
        facts = tuple(
            (name, f"{one.info.database}, {one.count():,} keys")
            for name, one in self._members.items()
        )
        return with_cells(self, Construction(facts))

    def failure(self, exc: BaseException) -> Failure:
        """Say what an error of a search means, as the collection that raised it would."""
        if isinstance(exc, TimeoutError):
            return Failure.OUTAGE
        told = [one.failure(exc) for one in self._members.values()]
        return next((one for one in told if one is not Failure.OTHER), Failure.OTHER)

    def unroutable(self, request: SearchRequest, *, rewritten: bool) -> str | None:  # noqa: ARG002 - each collection is searched natively
        """Say why a plan would change what a request means, or None."""
        return "rewrite: several collections" if rewritten else None

    def current(self) -> SeveralCollections:
        """Look at every collection again; one that cannot be looked at stays what it is."""
        now = {}
        for name, one in self._members.items():
            try:
                now[name] = one.current()
            except Exception as exc:  # noqa: BLE001, PERF203 - the others go on
                _log.debug("%r cannot be looked at again: %s", name, exc)
                now[name] = one
        if all(now[name] is one for name, one in self._members.items()):
            return self
        check_members(now)
        other = copy.copy(self)
        other._members = now
        return other

    def upsert(
        self,
        ids: Sequence[Id],  # noqa: ARG002 - refused
        vectors: FloatArray,  # noqa: ARG002
        fields: Sequence[Mapping[str, Any]] | None = None,  # noqa: ARG002
        cells: IntArray | None = None,  # noqa: ARG002
    ) -> None:
        """Refuse: nobody says which of them a key belongs to."""
        raise self._not_written()

    def delete(self, ids: Sequence[Id]) -> None:  # noqa: ARG002 - refused
        """Refuse: an id may be in several of them."""
        raise self._not_written()

    def _not_written(self) -> InvalidInput:
        return InvalidInput(
            f"{self._info.name!r} is several collections searched as one; write to the one that a "
            f"key belongs to: {', '.join(self._members)}."
        )

    def overflow(self) -> int:
        """Return the number of keys of collections that a router does not know."""
        if self._given is None:
            return 0
        known = self._given.values
        return sum(one.count() for name, one in self._members.items() if name not in known)

    @property
    def partitions(self) -> Partitions | None:
        """The collections that are cells of a plan, or None."""
        return self._given

    def partitioned(self, partitions: Partitions | None) -> SeveralCollections:
        """Return an object of the same collections, with these of them as the cells of a plan."""
        if partitions is not None and partitions.field is not None:
            raise InvalidInput(
                f"{self._info.name!r} is several collections, which are its partitions; name no "
                f"field, but 'native'."
            )
        view = copy.copy(self)
        view._given = partitions
        return view

    @property
    def layouts(self) -> GivenLayouts:
        """Says how many keys each collection has."""
        given = self._given or Partitions(None, tuple(self._members))

        def sizes() -> list[int]:
            there = self._members
            return [there[str(name)].count() if name in there else 0 for name in given.values]

        return GivenLayouts(self, given, sizes)

    def __enter__(self) -> SeveralCollections:
        """Return the collections themselves; leaving the block closes them."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close them."""
        self.close()

    def close(self) -> None:
        """Close every collection; safe to call twice."""
        for one in self._members.values():
            one.close()
