"""What a training keeps of its measurements beside the bundle, for ``amips report``.

It stays in the run's folder and is never published: of vectors it holds nothing but points of a
flat map.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from amips_plugins.bundle.manifest import ModelKind
from amips_plugins.errors import InvalidInput
from amips_plugins.files import read_file

__all__ = ["CURVES", "Curves", "Epochs", "FlatMap", "Line", "Promises", "read_curves"]

CURVES = "curves.json"
_LIMIT = 64 << 20  # bytes
_FORMAT = 1


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Recall against cost of one candidate on the test split."""

    candidate: ModelKind
    k: int
    total: list[float]  # keys scanned and the model's multiplications, as a share of the keys
    recall: list[float]


class Epochs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a candidate trained, epoch by epoch."""

    candidate: ModelKind
    loss: list[float]
    cost: list[float]  # of recalls around the target on the validation split, model included


class Promises(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What calibration promises, and what the test split shows of it, threshold by threshold."""

    k: int
    promised: list[float]
    measured: list[float]  # on the test split, which neither chose nor calibrated the thresholds
    scanned: list[float]


class FlatMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Some keys and test queries on their first two principal axes."""

    keys: list[tuple[float, float]]
    queries: list[tuple[float, float]]
    cells: list[int]  # of each of the keys
    variance: float  # the share that the two axes hold
    shift: float  # between the means of keys and queries, over the keys' spread


class Curves(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of it."""

    format: int = _FORMAT
    version: str  # of the bundle
    lines: list[Line]
    epochs: list[Epochs]
    probes: list[int]  # test queries by the number of cells they search, from 0 on
    demand: list[int]  # true top keys of the test queries in each cell
    promises: Promises | None  # None for a KeyNet
    flat: FlatMap


def read_curves(path: Path) -> Curves | None:
    """Read the file of a run, or None; raise ``InvalidInput`` where it is damaged, or newer."""
    try:
        data = read_file(path, _LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        curves = msgspec.json.decode(data, type=Curves)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidInput(f"{path} cannot be read ({exc}); delete it to report without.") from exc
    if curves.format != _FORMAT:
        raise InvalidInput(
            f"{path} has format {curves.format}, this version of amips-plugins reads {_FORMAT}; "
            f"upgrade the package, or delete the file to report without."
        )
    return curves
