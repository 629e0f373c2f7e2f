"""Writing through the router: keys get cells, whatever happens to the cells meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from amips_plugins.background.forks import ForkLock
from amips_plugins.bundle.loading import known_cells
from amips_plugins.bundle.package import Bundle
from amips_plugins.collection import Id
from amips_plugins.errors import CollectionError
from amips_plugins.models.cells import KnownCells
from amips_plugins.routing.checks import as_ids, as_keys
from amips_plugins.routing.fallbacks import Fallbacks
from amips_plugins.routing.refresh import ServingFollower
from amips_plugins.routing.serving import Serving
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["Writer"]

_SWITCHES = 10  # generations that one write follows: more in a row is a fault


class Writer:
    """Writes keys into the cells of what serves."""

    def __init__(self, follower: ServingFollower, fallbacks: Fallbacks) -> None:
        self._follower = follower
        self._fallbacks = fallbacks
        self._read: tuple[Bundle, KnownCells] | None = None
        self._lock = ForkLock()

    def upsert(
        self, ids: Sequence[Id], vectors: Any, fields: Sequence[Mapping[str, Any]] | None
    ) -> None:
        """Write keys (see ``LearnedRouter.upsert``)."""
        dim = self._follower.serving.collection.info.dim
        keys, rows = as_keys(ids, vectors, fields, dim)

        def write(serving: Serving) -> None:
            cells = None
            if serving.bundle is not None and serving.has_cells_of_bundle():
                try:
                    cells = self._assign(serving.bundle, keys, rows)
                except Exception as exc:  # noqa: BLE001 - the write must not suffer from a bundle
                    reason = f"write: {type(exc).__name__}"
                    serving.note(self._fallbacks, reason, exc)
            serving.collection.upsert(keys, rows, fields, cells)

        self._write(write)

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete keys (see ``LearnedRouter.delete``)."""
        keys = as_ids(ids)
        self._write(lambda serving: serving.collection.delete(keys))

    def _assign(self, bundle: Bundle, ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        """Return each key's cell, by records that are read at the first use and kept."""
        with self._lock:
            if self._read is None or self._read[0].manifest != bundle.manifest:
                self._read = bundle, known_cells(bundle)
            _, known = self._read
        return known(ids, vectors)

    def _write(self, write: Callable[[Serving], None]) -> None:
        """Write until the generation written to is the one that serves."""
        for _ in range(_SWITCHES):
            serving = self._follower.serving
            if serving.collection.current() is not serving.collection:
                if not self._follower.look():
                    self._follower.follow()  # so that its own error shows
                serving = self._follower.serving
            try:
                write(serving)
            except CollectionError:  # a switch may have come between, as whose it is refused
                if serving.collection.current() is serving.collection:
                    raise
                continue
            if serving.collection.current() is serving.collection:
                return
        name = self._follower.serving.collection.info.name
        raise CollectionError(
            f"The collection behind {name!r} was replaced {_SWITCHES} times during one write; "
            f"write again when it has come to rest."
        )
