"""The codes that Qdrant can search in place of vectors, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from amips_plugins.tuning import GRAPH_EFFORTS, Build, Knob

__all__ = ["build_of", "code_builds", "kind_of", "present_build"]

# Bits of each coordinate, and the server's own words.
_CODES: dict[str, tuple[float, dict[str, Any]]] = {
    "int8 codes": (8, {"scalar": {"type": "int8"}}),
    "4-bit codes": (4, {"turbo": {"bits": "bits4"}}),
    "2-bit codes": (2, {"turbo": {"bits": "bits2"}}),
    "binary codes": (1, {"binary": {}}),
}
_FLOAT = "vectors"


def kind_of(quantised: Mapping[str, Any] | None) -> str:
    """Name the codes of a configuration, such as ``{"turbo": {"bits": "bits4"}}``."""
    given = {name: options for name, options in (quantised or {}).items() if options is not None}
    if not given:
        return _FLOAT
    (kind, options), *_ = given.items()
    for name, (_, spelled) in _CODES.items():
        wanted = spelled.get(kind)
        if wanted is not None and all(
            str((options or {}).get(key)).lower() == value for key, value in wanted.items()
        ):
            return name
    return kind


def present_build(quantised: Mapping[str, Any] | None, dim: int, *, applies: bool) -> Build:
    """Return the build of a configuration, to the letter."""
    found = build_of(kind_of(quantised), dim, applies=applies)
    given = {name: options for name, options in (quantised or {}).items() if options is not None}
    return replace(found, options=given)


def build_of(kind: str, dim: int, *, applies: bool) -> Build:
    """Return the build with these codes, or without any."""
    if kind == _FLOAT:
        return Build(_FLOAT, Knob("hnsw_ef", GRAPH_EFFORTS), 4.0 * dim, {}, applies)
    bits, spelled = _CODES.get(kind, (8, {}))
    knob = Knob("hnsw_ef", GRAPH_EFFORTS, rescored=True)
    return Build(kind, knob, bits * dim / 8, spelled, applies and bool(spelled))


def code_builds(dim: int, present: str, *, applies: bool) -> list[Build]:
    """Return every build but the present one."""
    return [build_of(kind, dim, applies=applies) for kind in (_FLOAT, *_CODES) if kind != present]
