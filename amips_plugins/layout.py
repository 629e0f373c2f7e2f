"""Laying a collection out in the cells of a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from amips_plugins.bundle.contents import CALIBRATION, CELLS, load
from amips_plugins.bundle.identity import check_bundle
from amips_plugins.bundle.loading import given_cells, known_cells
from amips_plugins.bundle.package import Bundle
from amips_plugins.cell_layout import BuildPlan, CellIndex, LayoutSpec, Storage
from amips_plugins.collection import Collection
from amips_plugins.collection.sizing import size_up
from amips_plugins.errors import InvalidInput
from amips_plugins.progress import Progress, no_progress

__all__ = ["backfill", "check_backfill", "lay_out", "plan_layout"]


def lay_out(
    collection: Collection,
    bundle: Bundle,
    progress: Progress = no_progress,
    *,
    storage: Storage | None = None,
    index: CellIndex | None = None,
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
        As in ``LayoutSpec``; without ``index`` cells get what the bundle was trained for.

    Returns
    -------
    Collection
        The collection that has the cells: the same one, or a copy, a new generation of it.

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
    index: CellIndex | None = None,
    alias: str | None = None,
    work: Path | None = None,
    memory: int | None = None,
) -> BuildPlan:
    """Say what ``lay_out`` would do, or refuse as it would; nothing is changed.

    With ``memory``, in bytes, a note says how to keep the collection in it.
    """
    spec = _spec(collection, bundle, storage, index, alias, work)
    plan = collection.layouts.plan(spec)
    if memory is None:
        return plan
    info, kept = collection.info, collection.describe().kept
    if kept is not None and spec.index != "auto":
        kept = replace(kept, index=spec.index.upper())
    sized = size_up(plan.keys, info.dim, memory, info.database, kept)
    return replace(plan, notes=(*plan.notes, sized.text))


def backfill(
    collection: Collection,
    bundle: Bundle,
    progress: Progress = no_progress,
    *,
    verify: bool = False,
) -> int:
    """Give the keys that have no cell theirs.

    Parameters
    ----------
    collection
        A collection in the cells of the bundle.
    bundle
        The bundle.
    progress
        Watches the work.
    verify
        Read every vector, and mend also the keys in the cell of an earlier vector; without it a
        sample is looked at.

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
    return collection.layouts.backfill(known_cells(bundle), progress, verify=verify)


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


def _spec(
    collection: Collection,
    bundle: Bundle,
    storage: Storage | None,
    index: CellIndex | None,
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
    if given_cells(bundle) is not None:
        raise InvalidInput(
            f"Bundle {manifest.version} chooses among the collection's own partitions: there is "
            f"nothing to lay out, it serves as it is."
        )
    # Targets that count an index' misses hold without one, too, but cost more than need be.
    calibration = load(bundle)[CALIBRATION]
    lists, graphs = calibration.lists, calibration.efforts is not None
    trained_for: CellIndex = "flat"
    if graphs:
        trained_for = "hnsw" if lists is None else "ivf_sq8"
    cells = load(bundle)[CELLS]
    return LayoutSpec(
        manifest.layout,
        manifest.n_cells,
        known_cells(bundle),
        manifest.version,
        storage,
        index or trained_for,
        alias,
        work,
        shared=manifest.copies > 0,
        copies=manifest.copies,
        graphs=graphs and lists is None,
        lists=lists,
        sizes=tuple(cells.sizes.tolist()),
        centroids=cells.centroids,
    )
