"""What a Qdrant server counts of its own work: the bytes of vectors that its searches have scored.

With ``service.hardware_reporting`` every answer bears the count, which is the same on every run;
the client leaves it out, so it is read from the raw answers over REST. It does not count what a
filter costs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["ScoredBytes", "scored_bytes"]


@dataclass
class ScoredBytes:
    """The sum over the answers so far; None where no answer has told."""

    total: int | None = None

    def add(self, answer: bytes) -> None:
        """Add what one answer tells, if it does."""
        try:
            told = json.loads(answer)["usage"]["hardware"]["cpu"]
        except (ValueError, KeyError, TypeError):
            return
        self.total = (self.total or 0) + int(told)


@contextmanager
def scored_bytes(client: Any) -> Iterator[ScoredBytes]:
    """Sum up what answers tell until the block is left; over gRPC, and in local mode, none does."""
    counted = ScoredBytes()
    remote = getattr(client, "_client", None)
    rest = getattr(getattr(getattr(remote, "http", None), "client", None), "_client", None)
    hooks = getattr(rest, "event_hooks", None)
    if rest is None or hooks is None:
        yield counted
        return

    def look(response: Any) -> None:
        response.read()
        if "/points/query" in response.request.url.path:
            counted.add(response.content)

    before = {name: list(some) for name, some in hooks.items()}
    rest.event_hooks = {**before, "response": [*before.get("response", []), look]}
    try:
        yield counted
    finally:
        rest.event_hooks = before
