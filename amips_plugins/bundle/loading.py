"""What a bundle has to stand before it is published."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from amips_plugins.arrays import read_npy
from amips_plugins.bundle.golden_outputs import check_canned
from amips_plugins.bundle.manifest import (
    CALIBRATION,
    CANNED,
    CELLS,
    IDS,
    KNOWN_CELLS,
    MODEL,
    Bundle,
)
from amips_plugins.errors import BundleCorrupt
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.cells import Cells, KnownCells
from amips_plugins.models.hooks import RewriteHook, RouteHook
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.plan import PreQueryHook

__all__ = ["check_loads", "known_cells", "load_hook"]


def check_loads(bundle: Bundle) -> None:
    """Load all of a bundle, as the services and ``amips layout`` will.

    Parameters
    ----------
    bundle
        A bundle for any collection.

    Raises
    ------
    BundleCorrupt
        They would refuse it.
    """
    load_hook(bundle)
    if bundle.manifest.layout:
        known_cells(bundle)


def known_cells(bundle: Bundle) -> KnownCells:
    """Read the cells of the snapshot's keys, and the rule for any other key.

    Raises
    ------
    BundleCorrupt
        A file is not what the manifest says, or the files do not fit each other.
    """
    cells = Cells.from_bytes(bundle.read(CELLS))
    lines, array = bundle.read(IDS).splitlines(), bundle.read(KNOWN_CELLS)
    decoder = msgspec.json.Decoder(int | str)
    try:
        recorded = read_npy(array)
        fits = recorded.shape == (len(lines), 2) and recorded.dtype == np.int32
        fits = fits and bool(((recorded[:, 0] >= 0) & (recorded[:, 0] < cells.n_cells)).all())
        fits = fits and cells.n_cells == bundle.manifest.n_cells
        ids = (decoder.decode(line) for line in lines)
        known = KnownCells(cells, bundle.manifest.metric, ids, recorded) if fits else None
    except Exception as exc:  # a damaged array raises whatever numpy raises
        raise BundleCorrupt(
            f"The cells of {bundle.location} cannot be read ({exc}); publish it again."
        ) from exc
    if known is None:
        raise BundleCorrupt(f"The cells of {bundle.location} do not fit its manifest.")
    return known


def load_hook(bundle: Bundle, threads: int = 1) -> PreQueryHook:
    """Load and check the hook of a bundle.

    Raises
    ------
    BundleCorrupt
        A file is not what the manifest says, the model's inputs and outputs do not fit it, or it
        gives other results than when it was published.
    """
    manifest = bundle.manifest
    model = OnnxModel(bundle.read(MODEL), threads)
    if manifest.model == "keynet":
        _check(model, bundle, {"queries": manifest.dim}, {"rewritten": manifest.dim})
        return RewriteHook(model)
    _check(model, bundle, {"queries": manifest.dim}, {"priority": manifest.n_cells})
    calibration = Calibration.from_bytes(bundle.read(CALIBRATION))
    sizes = Cells.from_bytes(bundle.read(CELLS)).sizes
    if len(sizes) != manifest.n_cells:
        raise BundleCorrupt(f"The cells of {bundle.location} do not fit its manifest.")
    shares = np.append(sizes / max(1, sizes.sum()), 0.0).astype(np.float32)
    return RouteHook(model, calibration, manifest.layout, manifest.default_recall, shares)


def _check(
    model: OnnxModel, bundle: Bundle, inputs: dict[str, int], outputs: dict[str, int]
) -> None:
    """Compare names, last axes and canned results with what the hook needs."""
    last_axes = {name: _last(shape) for name, shape in model.inputs.items()}
    given = {name: _last(shape) for name, shape in model.outputs.items()}
    fits = last_axes == inputs and all(given.get(name) == axis for name, axis in outputs.items())
    if not fits:
        raise BundleCorrupt(
            f"The model of {bundle.location} takes {last_axes} and gives {given}, which is not "
            f"what a {bundle.manifest.model} must; publish it again."
        )
    if CANNED in bundle.manifest.files:  # bundles of earlier versions have none
        (output,) = outputs
        check_canned(bundle.read(CANNED), model, output, bundle.location)


def _last(shape: list[Any]) -> Any:
    return shape[-1] if shape else None
