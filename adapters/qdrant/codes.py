"""Quantised codes: searches of cells scan those, and score the best candidates by their vectors.

An exact search reads the vectors themselves, which is several times the CPU, and from disk hundreds
of times the bytes. Whether codes are scanned is the engine's choice: where a filter leaves more
keys than ``full_scan_threshold`` it follows the graph, which loses keys under the filter of a cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Codes", "break_even_of", "codes_of"]

# How many candidates are scored by their vectors for every hit, so that next to none is lost:
# measured on sentence embeddings in 64 cells, where exact searches agree to .999 and more.
_OVERSAMPLING = {
    "bits8": 1.5,
    "scalar": 1.5,
    "bits4": 2.0,
    "bits2": 4.0,
    "bits1_5": 8.0,
    "two_bits": 4.0,
    "one_and_half_bits": 8.0,
    "bits1": 16.0,
    "binary": 16.0,
}
_COARSEST = 16.0
_HALF = 0.5  # the engine guesses how many keys a filter leaves
_THOROUGH = 4.0  # times as many candidates of a search that others are judged by
_EFFORT = 512  # and its ef, where there is a graph


@dataclass(frozen=True, slots=True)
class Codes:
    """How a collection's codes are searched: with how many candidates for every hit.

    Above a ``share`` of the keys in its cells the engine may follow its graph, and is not scanned.
    """

    oversampling: float
    share: float = 1.0

    def scan(self, share: float | None) -> bool:
        """Tell whether cells with this share of the keys are scanned, whatever filters are added.

        None is a share that nobody knows.
        """
        return self.share >= 1.0 if share is None else share <= self.share

    def thorough(self) -> dict[str, Any]:
        """Return the parameters, as plain values, of a search that loses next to nothing."""
        oversampling = _THOROUGH * self.oversampling
        return {
            "quantization": {"rescore": True, "oversampling": oversampling},
            "hnsw_ef": _EFFORT,
        }


def break_even_of(in_memory: float, codes: Codes | None, *, on_disk: bool) -> float:
    """Return the share of the keys above which a full scan is cheaper than a search of cells.

    Of vectors on a disk that are compared themselves, cells always read less.
    """
    by_codes = codes is not None and codes.scan(None)
    return 1.0 if on_disk and not by_codes else in_memory


def codes_of(
    quantised: Mapping[str, Any] | None, graph: Mapping[str, Any], dim: int, keys: int
) -> Codes | None:
    """Say how a vector's codes are searched, from the engine's configuration; None without codes.

    ``quantised`` is such as ``{"turbo": {"bits": "bits4"}}``, ``graph`` the HNSW configuration.
    """
    kind = next((name for name, found in (quantised or {}).items() if found is not None), None)
    if quantised is None or kind is None:
        return None
    options = quantised[kind] or {}
    bits = str(options.get("bits") or options.get("encoding") or kind)
    oversampling = _OVERSAMPLING.get(bits, _COARSEST)
    if not (graph.get("m") or graph.get("payload_m")):
        return Codes(oversampling)
    scanned = _HALF * 1024 * float(graph.get("full_scan_threshold") or 0) / (4 * dim)
    return Codes(oversampling, min(1.0, scanned / max(1, keys)))
