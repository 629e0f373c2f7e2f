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
    """Recall against cost of one candidate on the test split.

    Attributes
    ----------
    candidate, k
        Which, and which recall@k.
    total
        Keys scanned and the model's multiplications as a share of the keys, rising.
    recall
        Mean recall at each.
    """

    candidate: ModelKind
    k: int
    total: list[float]
    recall: list[float]


class Epochs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a candidate trained.

    Attributes
    ----------
    candidate
        Which.
    loss
        Mean loss of each epoch.
    cost
        Mean share of the keys that recalls around the target cost on the validation split, model
        included, after each.
    """

    candidate: ModelKind
    loss: list[float]
    cost: list[float]


class Promises(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What calibration promises, and what the test split shows of it, by threshold.

    Attributes
    ----------
    k
        Which recall@k.
    promised
        The guaranteed recall.
    measured
        Mean recall on the test split, which neither chose nor calibrated the thresholds.
    scanned
        Mean share of the keys searched, on the test split.
    """

    k: int
    promised: list[float]
    measured: list[float]
    scanned: list[float]


class FlatMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Some keys and test queries on their first two principal axes.

    Attributes
    ----------
    keys, queries
        Pairs of coordinates.
    cells
        The cell of each of the keys.
    variance
        Share of the variance that the two axes hold.
    shift
        Distance between the means of keys and queries, over the keys' root mean square distance
        from theirs.
    """

    keys: list[tuple[float, float]]
    queries: list[tuple[float, float]]
    cells: list[int]
    variance: float
    shift: float


class Curves(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All of it.

    Attributes
    ----------
    format
        Version of this structure.
    version
        The bundle it belongs to.
    lines, epochs
        Of every candidate.
    probes
        Test queries by the number of cells that they search at the default target, from 0 cells
        on; empty for a KeyNet.
    demand
        True top keys of the test queries in each cell.
    promises
        None for a KeyNet.
    flat
        The map.
    """

    format: int = _FORMAT
    version: str
    lines: list[Line]
    epochs: list[Epochs]
    probes: list[int]
    demand: list[int]
    promises: Promises | None
    flat: FlatMap


def read_curves(path: Path) -> Curves | None:
    """Read the file of a run; None where there is none.

    Raises
    ------
    InvalidInput
        It is damaged, or of a newer format.
    """
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
