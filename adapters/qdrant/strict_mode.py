"""Which of Qdrant's strict-mode settings forbid what cells need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdrant_client import models

__all__ = ["Limits"]

_CONDITIONS = 4  # at most in a filter of ours, before the caller's own
_BATCH = 100  # smaller batches of ids would take a call for next to nothing


@dataclass(frozen=True, slots=True)
class Limits:
    """What strict mode allows; everything where there is none."""

    strict: models.StrictModeConfigOutput | None

    def of(self, setting: str) -> Any:
        """Return a setting that is in force, or None."""
        if self.strict is None or not self.strict.enabled:
            return None
        return getattr(self.strict, setting, None)

    @property
    def allows_exact(self) -> bool:
        """Whether a search or a count may be exact."""
        return self.of("search_allow_exact") is not False

    @property
    def needs_index(self) -> bool:
        """Whether a filter takes an index."""
        asked = ("unindexed_filtering_retrieve", "unindexed_filtering_update")
        return any(self.of(one) is False for one in asked)

    @property
    def counts_searches(self) -> bool:
        """Whether more searches for the same answer could be refused."""
        return any(self.of(one) for one in ("read_rate_limit", "search_max_batchsize"))

    @property
    def counts_conditions(self) -> bool:
        """Whether a filter with more conditions for the same points could be refused."""
        return any(self.of(one) for one in ("read_rate_limit", "filter_max_conditions"))

    @property
    def max_candidates(self) -> int | None:
        """How many hits one search may have."""
        limit = self.of("max_query_limit")
        return None if limit is None else int(limit)

    def refused_search(self, n_cells: int) -> str | None:
        """Name the setting that forbids searches of cells, in a few words; or return None."""
        if not self.allows_exact:
            return "search_allow_exact: strict mode forbids the exact searches that plans take"
        size = self.of("condition_max_size")
        if size is not None and size < n_cells - 1:  # a search names the cells that it leaves out
            return "condition_max_size: strict mode allows fewer values than there are cells"
        return None

    def refusal(self, n_cells: int, n_indexes: int) -> str | None:
        """Say in a sentence why there can be no cells, or as many indexes; or return None."""
        for setting, found, reason in self._obstacles(n_cells, n_indexes):
            return (
                f"Strict mode of the collection has {setting} = {found}, and {reason}; change that "
                "setting, or search without cells."
            )
        return None

    def _obstacles(self, n_cells: int, n_indexes: int) -> Iterator[tuple[str, object, str]]:
        if not self.allows_exact:
            yield "search_allow_exact", "false", "cells are searched exactly"
        largest = max(n_cells, _BATCH)
        needed = (
            (
                "filter_max_conditions",
                _CONDITIONS,
                f"cells take filters of up to {_CONDITIONS} conditions",
            ),
            (
                "condition_max_size",
                largest,
                f"{n_cells} cells take conditions of up to {largest} values",
            ),
            ("max_query_limit", _BATCH, f"points are read in pages of at least {_BATCH}"),
            (
                "max_payload_index_count",
                n_indexes,
                f"the index of the cells would be number {n_indexes}",
            ),
        )
        for setting, least, reason in needed:
            limit = self.of(setting)
            if limit is not None and limit < least:
                yield setting, limit, reason

    def points(self, wanted: int) -> int:
        """Return how many ids or points one call may have, at most as many as wanted."""
        limits = (self.of("max_query_limit"), self.of("condition_max_size"), wanted)
        return max(1, min(limit for limit in limits if limit is not None))

    def upserts(self, wanted: int) -> int:
        """Return how many points one call may write."""
        return min(wanted, self.of("upsert_max_batchsize") or wanted)

    def seconds(self, wanted: int) -> int:
        """Return how many seconds one call may ask for."""
        return min(wanted, self.of("max_timeout") or wanted)

    def notes(self) -> Iterator[str]:
        """Say what strict mode will do to a build or a search without forbidding it."""
        for setting, what in (
            ("read_rate_limit", "reads a minute"),
            ("write_rate_limit", "writes a minute"),
        ):
            limit = self.of(setting)
            if limit is not None:
                yield (
                    f"Strict mode allows {limit} {what} ({setting}): a build waits where it is "
                    "stopped by it, and if it ends goes on when it is run again."
                )
        batch = self.of("search_max_batchsize")
        if batch is not None:
            yield (
                f"Strict mode allows {batch} queries a batch (search_max_batchsize), with cells as "
                "without."
            )
