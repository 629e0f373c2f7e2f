"""What the verified values of a bundle become: a hook, cells for keys, a reference."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from amips_plugins.arrays import readable
from amips_plugins.bundle.contents import (
    CALIBRATION,
    CELLS,
    EFFORT,
    FURTHER_CELLS,
    GOLDEN_OUTPUTS,
    IDS,
    KEY_SAMPLE,
    KNOWN_CELLS,
    MODEL,
    PARTITIONS,
    REFERENCE,
    load,
)
from amips_plugins.bundle.package import Bundle
from amips_plugins.bundle.reference import Reference
from amips_plugins.errors import BundleCorrupt
from amips_plugins.models.cells import KnownCells
from amips_plugins.models.given import GivenCells
from amips_plugins.models.hooks import RewriteHook, RouteHook
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.models.tuned import TunedHook, check_tuned
from amips_plugins.plan import PreQueryHook

__all__ = ["check_loads", "given_cells", "known_cells", "load_hook", "load_reference"]


def check_loads(bundle: Bundle) -> None:
    """Load all of a bundle, as services and ``amips layout`` will, or raise ``BundleCorrupt``."""
    load_hook(bundle)
    load_reference(bundle)
    load(bundle)[KEY_SAMPLE]
    if bundle.manifest.layout and given_cells(bundle) is None:
        known_cells(bundle)


def given_cells(bundle: Bundle) -> GivenCells | None:
    """Read which of the users' own partitions a bundle chooses among; None for cells of ours."""
    if PARTITIONS not in bundle.manifest.files:
        return None
    given = load(bundle)[PARTITIONS]
    if (given.n_cells, given.layout()) != (bundle.manifest.n_cells, bundle.manifest.layout):
        raise BundleCorrupt(f"The partitions of {bundle.location} do not fit its manifest.")
    return given


def known_cells(bundle: Bundle) -> KnownCells:
    """Read the cells of the snapshot's keys, and the rule for any other key."""
    contents = load(bundle)
    cells, lines, recorded = contents[CELLS], contents[IDS].splitlines(), contents[KNOWN_CELLS]
    decoder = msgspec.json.Decoder(int | str)
    fits = recorded.shape == (len(lines), 2) and recorded.dtype == np.int32
    fits = fits and bool(((recorded[:, 0] >= 0) & (recorded[:, 0] < cells.n_cells)).all())
    further = None
    if fits and bundle.manifest.copies:
        further = contents[FURTHER_CELLS]
        fits = further.shape == (bundle.manifest.copies, 2) and further.dtype == np.int32
        limits = (len(lines), cells.n_cells)
        fits = fits and bool(((further >= 0) & (further < limits)).all())
    if not fits or cells.n_cells != bundle.manifest.n_cells:
        raise BundleCorrupt(f"The cells of {bundle.location} do not fit its manifest.")
    with readable(f"{IDS} of {bundle.location}"):
        ids = (decoder.decode(line) for line in lines)
        return KnownCells(cells, bundle.manifest.metric, ids, recorded, further)


def load_hook(bundle: Bundle, threads: int = 1) -> PreQueryHook:
    """Load and check the hook of a bundle."""
    manifest, contents = bundle.manifest, load(bundle)
    if manifest.model == "tuned":
        check_tuned(contents[CALIBRATION], bundle.location)
        return TunedHook(contents[EFFORT], contents[CALIBRATION], manifest.default_recall)
    model = OnnxModel(contents[MODEL], threads)
    if manifest.model == "keynet":
        _check(model, bundle, "rewritten")
        return RewriteHook(model)
    _check(model, bundle, "priority")
    given = given_cells(bundle)
    sizes = contents[CELLS].sizes if given is None else given.sizes
    if len(sizes) != manifest.n_cells:
        raise BundleCorrupt(f"The cells of {bundle.location} do not fit its manifest.")
    # Copies are scanned, but are no keys; the overflow is keys in no cell.
    overflow = 0 if given is None else given.overflow
    n_keys = max(1, int(sizes.sum()) - manifest.copies + overflow)
    shares = np.append(sizes / n_keys, 0.0).astype(np.float32)
    calibration, recall = contents[CALIBRATION], manifest.default_recall
    return RouteHook(model, calibration, manifest.layout, recall, shares, overflow / n_keys)


def load_reference(bundle: Bundle) -> Reference | None:
    """Read what a bundle's model said of held-out queries, or raise ``BundleCorrupt``.

    None of a bundle without a model.
    """
    if bundle.manifest.model == "tuned":
        return None
    reference = load(bundle)[REFERENCE]
    if reference.outputs.shape[1] != _width(bundle):
        raise BundleCorrupt(f"The reference of {bundle.location} does not fit its model.")
    return reference


def _width(bundle: Bundle) -> int:
    """Return how many numbers the model gives for a query."""
    manifest = bundle.manifest
    return manifest.dim if manifest.model == "keynet" else manifest.n_cells


def _check(model: OnnxModel, bundle: Bundle, output: str) -> None:
    """Compare names, last axes and golden outputs with what the hook needs."""
    inputs = {name: _last(shape) for name, shape in model.inputs.items()}
    outputs = {name: _last(shape) for name, shape in model.outputs.items()}
    wanted = {"queries": bundle.manifest.dim}, {output: _width(bundle)}
    if (inputs, outputs) != wanted:
        raise BundleCorrupt(
            f"The model of {bundle.location} takes {inputs} and gives {outputs}, which is not "
            f"what a {bundle.manifest.model} must; publish it again."
        )
    load(bundle)[GOLDEN_OUTPUTS].check(model, output, bundle.location)


def _last(shape: list[Any]) -> Any:
    return shape[-1] if shape else None
