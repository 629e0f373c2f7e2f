"""A watch that takes every filter for known, so that searches under it are routed at once."""

from __future__ import annotations

from typing import Any

from amips_plugins.health.filters import FilterClasses, FilterVerdict
from amips_plugins.health.monitor import HealthMonitor, Watch


class _Every(FilterClasses):
    def verdict(self, given: Any) -> FilterVerdict:
        return FilterVerdict(1.0, None)

    def to_try(self, shape: str) -> None:
        return None


class KnowsEveryFilter(HealthMonitor):
    """Routes filtered searches, and learns nothing of them."""

    def begin(self, watch: Watch | None) -> None:
        super().begin(watch)
        if watch is not None:
            watch.filters = _Every()
