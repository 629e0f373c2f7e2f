"""Which of Qdrant's strict-mode settings forbid what cells need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qdrant_client import models

__all__ = ["batch_limit", "refusal", "strict_notes", "time_limit"]

_CONDITIONS = 4  # at most in a filter of ours, before the caller's own
_BATCH = 100  # smaller batches of ids would take a call for next to nothing


def refusal(
    strict: models.StrictModeConfigOutput | None, n_cells: int, n_indexes: int
) -> str | None:
    """Say in a sentence why strict mode cannot have cells, or return None.

    Parameters
    ----------
    strict
        The collection's configuration.
    n_cells
        Number of cells; one condition may have to name them all.
    n_indexes
        Payload indexes that the collection would have with the one of the cells.
    """
    if strict is None or not strict.enabled:
        return None
    for setting, found, reason in _obstacles(strict, n_cells, n_indexes):
        return (
            f"Strict mode of the collection has {setting} = {found}, and {reason}; change that "
            "setting, or search without cells."
        )
    return None


def _obstacles(
    strict: models.StrictModeConfigOutput, n_cells: int, n_indexes: int
) -> Iterator[tuple[str, object, str]]:
    if strict.search_allow_exact is False:
        yield "search_allow_exact", "false", "cells are searched exactly"
    needed: tuple[tuple[str, int | None, int, str], ...] = (
        (
            "filter_max_conditions",
            strict.filter_max_conditions,
            _CONDITIONS,
            f"cells take filters of up to {_CONDITIONS} conditions",
        ),
        (
            "condition_max_size",
            strict.condition_max_size,
            max(n_cells + 1, _BATCH),
            f"{n_cells} cells take conditions of up to {max(n_cells + 1, _BATCH)} values",
        ),
        (
            "max_query_limit",
            strict.max_query_limit,
            _BATCH,
            f"points are read in pages of at least {_BATCH}",
        ),
        (
            "max_payload_index_count",
            strict.max_payload_index_count,
            n_indexes,
            f"the index of the cells would be number {n_indexes}",
        ),
    )
    for setting, limit, least, reason in needed:
        if limit is not None and limit < least:
            yield setting, limit, reason


def batch_limit(strict: models.StrictModeConfigOutput | None, wanted: int) -> int:
    """Return how many ids or points one call may have, at most as many as wanted."""
    if strict is None or not strict.enabled:
        return wanted
    limits = (strict.max_query_limit, strict.condition_max_size, wanted)
    return max(1, min(limit for limit in limits if limit is not None))


def time_limit(strict: models.StrictModeConfigOutput | None, wanted: int) -> int:
    """Return how many seconds one call may ask for."""
    if strict is None or not strict.enabled or strict.max_timeout is None:
        return wanted
    return min(strict.max_timeout, wanted)


def strict_notes(strict: models.StrictModeConfigOutput | None) -> Iterator[str]:
    """Say what strict mode will do to a build or a search without forbidding it."""
    if strict is None or not strict.enabled:
        return
    for setting, limit, what in (
        ("read_rate_limit", strict.read_rate_limit, "reads a minute"),
        ("write_rate_limit", strict.write_rate_limit, "writes a minute"),
    ):
        if limit is not None:
            yield (
                f"Strict mode allows {limit} {what} ({setting}): a build that is stopped by it "
                "goes on when it is run again."
            )
    if strict.search_max_batchsize is not None:
        yield (
            f"Strict mode allows {strict.search_max_batchsize} queries a batch "
            "(search_max_batchsize), with cells as without."
        )
