"""What a report is made of, read from a run's folder or a bundle's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from amips_plugins.bundle.contents import CALIBRATION, CELLS, load
from amips_plugins.bundle.loading import given_cells
from amips_plugins.bundle.manifest import MANIFEST, Manifest
from amips_plugins.bundle.package import Bundle
from amips_plugins.errors import InvalidInput
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.cells import Cells
from amips_plugins.models.given import GivenCells
from amips_plugins.report.training_record import CURVES, Curves, read_curves

__all__ = ["ReportData", "Timings", "read_report"]


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """What searches of the collection itself showed, one query at a time."""

    k: int
    target: float  # recall@k that was asked for
    native_ms: list[float]  # of each query, model and client included
    routed_ms: list[float]
    native_recall: float  # mean, against the exact search
    routed_recall: float
    fallbacks: int  # queries that the native search answered in place of the model
    caveat: str = ""  # why the times are not those of the collection in use


@dataclass(frozen=True)
class ReportData:
    """All that there is; None where a run, a KeyNet or the command line has none of it."""

    bundle: Bundle
    cells: Cells | GivenCells | None
    calibration: Calibration | None
    curves: Curves | None
    timings: Timings | None = None

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest


def read_report(path: Path) -> ReportData:
    """Read a run's folder, or a bundle's.

    Raises ``BundleError`` without a sound bundle, ``InvalidInput`` where the training's record is
    damaged or of another one.
    """
    folder = path if (path / MANIFEST).is_file() else path / "bundle"
    bundle = Bundle.in_folder(folder)
    if bundle.manifest.model == "tuned":
        raise InvalidInput(
            f"Nothing was trained for {folder}, a bundle that sets search parameters; amips tune "
            f"says what it measured, and amips evaluate measures again."
        )
    # A bundle that still lies in its run has the curves beside it.
    curves = read_curves(folder.parent / CURVES) if folder.name == "bundle" else None
    if curves is not None and curves.version != bundle.manifest.version:
        raise InvalidInput(
            f"{folder.parent / CURVES} is of bundle {curves.version}, not "
            f"{bundle.manifest.version}; delete it to report without."
        )
    cells: Cells | GivenCells | None = None
    calibration = None
    if bundle.manifest.model != "keynet":
        given = given_cells(bundle)
        cells = load(bundle)[CELLS] if given is None else given
        calibration = load(bundle)[CALIBRATION]
    return ReportData(bundle, cells, calibration, curves)
