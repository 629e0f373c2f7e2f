"""What Milvus said of a collection a moment ago, and every search needs to know."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from amips_plugins.adapters.milvus.opening import describe_index
from amips_plugins.adapters.milvus.table import Table

__all__ = ["Recent"]

_PARTITIONS_STAY = 1.0  # seconds in which a new one is not seen: Milvus' own reads lag by as much
_INDEX_STAYS = 30.0  # seconds in which another index is not seen, as a router's refresh


class Recent:
    """Remembers, and asks again when it is time."""

    def __init__(self) -> None:
        self._index: tuple[float, Mapping[str, Any]] = (float("-inf"), {})
        self._partitions: tuple[float, list[str]] = (float("-inf"), [])
        self._overflow: tuple[float, bool] = (float("-inf"), True)

    def index(self, table: Table, timeout: float | None = None) -> Mapping[str, Any]:
        """Return the index of the vector."""
        if time.monotonic() - self._index[0] > _INDEX_STAYS:
            known = self._index[1]
            try:
                known = describe_index(table, timeout)
            except Exception:  # of a server that is away the search itself tells, in its own words
                if not known:
                    raise
            self._index = time.monotonic(), known
        return self._index[1]

    def partitions(self, table: Table, name: str, timeout: float | None) -> list[str]:
        """Return the partitions of what a name stands for; none where they do not matter."""
        if self.asks(table):
            known = self._partitions[1]
            try:
                found = table.client.list_partitions(name, timeout=timeout)
                known = [str(one) for one in found]
            except Exception:  # of a server that is away the search itself tells, in its own words
                if not known or table.is_lite:
                    raise
            self._partitions = time.monotonic(), known
        return self._partitions[1]

    @property
    def no_overflow(self) -> bool:
        """Tell whether it is known that nothing lies in the overflow."""
        when, some = self._overflow
        return not some and time.monotonic() - when <= _PARTITIONS_STAY

    def has_overflow(self, table: Table, there: Sequence[str], timeout: float | None) -> bool:
        """Tell whether something lies in the overflow, among the partitions that are ``there``."""
        if time.monotonic() - self._overflow[0] > _PARTITIONS_STAY:
            rows = table.client.query(
                table.name,
                filter=table.any_id,
                output_fields=["count(*)"],
                partition_names=table.overflow_partitions(there),
                consistency_level="Eventually",  # of what no search sees yet, none needs to know
                timeout=timeout,
            )
            self._overflow = time.monotonic(), rows[0]["count(*)"] > 0
        return self._overflow[1]

    def asks(self, table: Table) -> bool:
        """Tell whether the next reading of the partitions waits for the database."""
        age = time.monotonic() - self._partitions[0]
        return table.by_partitions and (table.is_lite or age > _PARTITIONS_STAY)
