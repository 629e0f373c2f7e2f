"""Laying a collection out in the cells of a bundle."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from amips_plugins.arrays import read_npy
from amips_plugins.bundle.manifest import CELLS, IDS, KNOWN_CELLS, Bundle
from amips_plugins.bundle.registry import Registry, collection_key
from amips_plugins.cell_layout import LayoutPlan, LayoutSpec, Storage
from amips_plugins.collection import Collection
from amips_plugins.errors import BundleCorrupt, BundleMismatch, InvalidInput
from amips_plugins.models.cells import Cells, KnownCells
from amips_plugins.progress import Progress, no_progress

__all__ = [
    "backfill",
    "check_backfill",
    "check_bundle",
    "known_cells",
    "lay_out",
    "plan_layout",
    "serving_bundle",
]

_log = logging.getLogger(__name__)


def lay_out(
    collection: Collection,
    bundle: Bundle,
    progress: Progress = no_progress,
    *,
    storage: Storage | None = None,
    index: Literal["FLAT", "source"] = "FLAT",
    alias: str | None = None,
    work: Path | None = None,
) -> Collection:
    """Put every key of a collection into its cell, while others go on reading and writing.

    Killed at any point and called again, it goes on from there.

    Parameters
    ----------
    collection
        The collection that the bundle was made for.
    bundle
        A bundle with cells.
    progress
        Watches the work.
    storage, index, alias, work
        As in ``adapters.layouts.LayoutSpec``.

    Returns
    -------
    Collection
        The collection that has the cells: the same one, or (Milvus) a new generation of it.

    Raises
    ------
    InvalidInput
        The bundle has no cells, or the collection has them already or cannot have them.
    BundleMismatch
        The bundle was made for another collection.
    BundleCorrupt
        A file of the bundle is not what its manifest says.
    CollectionError
        The database refuses, or has too little room.
    """
    return collection.layouts.build(
        _spec(collection, bundle, storage, index, alias, work), progress
    )


def plan_layout(
    collection: Collection,
    bundle: Bundle,
    *,
    storage: Storage | None = None,
    index: Literal["FLAT", "source"] = "FLAT",
    alias: str | None = None,
    work: Path | None = None,
) -> LayoutPlan:
    """Say what ``lay_out`` would do, or refuse as it would; nothing is changed."""
    return collection.layouts.plan(_spec(collection, bundle, storage, index, alias, work))


def backfill(collection: Collection, bundle: Bundle, progress: Progress = no_progress) -> int:
    """Give the keys that have no cell theirs.

    Parameters
    ----------
    collection
        A collection in the cells of the bundle.
    bundle
        The bundle.
    progress
        Watches the work.

    Returns
    -------
    int
        How many keys got a cell.

    Raises
    ------
    InvalidInput
        The collection has no cells, or those of another bundle.
    BundleMismatch, BundleCorrupt
        As for ``lay_out``.
    """
    check_backfill(collection, bundle)
    return collection.layouts.backfill(known_cells(bundle), progress)


def check_backfill(collection: Collection, bundle: Bundle) -> None:
    """Refuse what ``backfill`` would refuse; nothing is changed."""
    check_bundle(collection, bundle)
    layout, manifest = collection.layout(), bundle.manifest
    if layout is None:
        raise InvalidInput(
            f"{collection.info.name!r} has no cells to give; lay it out first: amips layout."
        )
    if layout != manifest.layout:
        raise InvalidInput(
            f"{collection.info.name!r} is laid out in the cells {layout!r}, not in those of bundle "
            f"{manifest.version} ({manifest.layout!r}); backfill with the bundle they come from."
        )


def check_bundle(collection: Collection, bundle: Bundle) -> None:
    """Refuse a bundle that was made for another collection.

    Raises
    ------
    BundleMismatch
        Name, field, metric or dimension differ.
    """
    info = collection.info
    key = collection_key(info)
    bundle.manifest.check_serves(key.database, key.name, key.field, info.metric, info.dim)


def serving_bundle(
    collection: Collection, registry: Registry, latest_version: str | None = None
) -> Bundle:
    """Open the bundle to search a collection with: the latest one that its cells come from.

    A newer bundle has to wait until the collection is laid out in its cells.

    Parameters
    ----------
    collection
        The collection, as it is laid out now.
    registry
        Where its bundles are.
    latest_version
        The latest, where that is known; else the registry is asked.

    Raises
    ------
    BundleNotFound, BundleCorrupt, BundleUnsigned
        Nothing sound is published for the collection, or nothing that the registry lets pass.
    BundleMismatch
        The collection has cells that no published bundle knows.
    """
    key, name = collection_key(collection.info), collection.info.name
    latest = registry.open(key, latest_version)
    layout = collection.layout() if latest.manifest.layout else None
    if layout is None or layout == latest.manifest.layout:
        return latest
    version = collection.layouts.status().version
    older = latest if version is None else registry.open(key, version)
    if older.manifest.layout != layout:
        raise BundleMismatch(
            f"{name!r} is laid out in the cells {layout!r}, which are not those of bundle "
            f"{older.manifest.version}; lay it out again: amips layout."
        )
    _log.info(
        "Bundle %s serves %r until it is laid out in the cells of the latest one, %s.",
        older.manifest.version,
        name,
        latest.manifest.version,
    )
    return older


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


def _spec(
    collection: Collection,
    bundle: Bundle,
    storage: Storage | None,
    index: Literal["FLAT", "source"],
    alias: str | None,
    work: Path | None,
) -> LayoutSpec:
    """Check a bundle against the collection it is to be laid out in."""
    manifest = bundle.manifest
    check_bundle(collection, bundle)
    if not manifest.layout:
        raise InvalidInput(
            f"Bundle {manifest.version} rewrites queries and has no cells: the collection stays as "
            f"it is."
        )
    return LayoutSpec(
        manifest.layout,
        manifest.n_cells,
        known_cells(bundle),
        manifest.version,
        storage,
        index,
        alias,
        work,
    )
