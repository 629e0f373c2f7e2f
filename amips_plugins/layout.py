"""Laying a collection out in the cells of a bundle."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from amips_plugins.bundle import CELLS, IDS, KNOWN_CELLS, Bundle
from amips_plugins.cells import Cells, KnownCells
from amips_plugins.errors import BundleCorrupt, InvalidInput
from amips_plugins.progress import Progress, no_progress
from amips_plugins.registry import collection_key

if TYPE_CHECKING:
    from amips_plugins.adapters.base import Collection

__all__ = ["known_cells", "lay_out"]


def lay_out(collection: Collection, bundle: Bundle, progress: Progress = no_progress) -> Collection:
    """Put every key of a collection into its cell.

    Parameters
    ----------
    collection
        The collection that the bundle was made for.
    bundle
        A bundle with cells.
    progress
        Watches the work.

    Returns
    -------
    Collection
        The collection that has the cells: the same one, or (Milvus) a new generation of it.

    Raises
    ------
    InvalidInput
        The bundle has no cells, or the collection is laid out in them already.
    BundleMismatch
        The bundle was made for another collection.
    """
    manifest, info = bundle.manifest, collection.info
    key = collection_key(info)
    manifest.check_serves(key.database, key.name, key.field, info.metric, info.dim)
    if not manifest.layout:
        raise InvalidInput(
            f"Bundle {manifest.version} rewrites queries and has no cells: the collection stays as "
            f"it is."
        )
    if collection.layout() == manifest.layout:
        raise InvalidInput(f"{info.name!r} is laid out in the cells of {manifest.version} already.")
    return collection.lay_out(manifest.layout, manifest.n_cells, known_cells(bundle), progress)


def known_cells(bundle: Bundle) -> KnownCells:
    """Read the cells of the snapshot's keys, and the rule for any other key.

    Raises
    ------
    BundleCorrupt
        A file is not what the manifest says, or the files do not fit each other.
    """
    cells = Cells.from_bytes(bundle.read(CELLS))
    lines, array = bundle.read(IDS).splitlines(), bundle.read(KNOWN_CELLS)
    try:
        decoder = msgspec.json.Decoder(int | str)
        ids = [decoder.decode(line) for line in lines]
        chosen = np.load(io.BytesIO(array), allow_pickle=False)
        fits = chosen.shape == (len(ids),) and chosen.dtype.kind in "iu"
        fits = fits and bool(((chosen >= 0) & (chosen < cells.n_cells)).all())
    except Exception as exc:  # a damaged array raises whatever numpy raises
        raise BundleCorrupt(
            f"The cells of {bundle.location} cannot be read ({exc}); publish it again."
        ) from exc
    if not fits or cells.n_cells != bundle.manifest.n_cells:
        raise BundleCorrupt(f"The cells of {bundle.location} do not fit its manifest.")
    return KnownCells(cells, bundle.manifest.metric, dict(zip(ids, chosen.tolist(), strict=True)))
