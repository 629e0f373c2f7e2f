"""Whose bundle it is: names are compared, and some keys of its snapshot with the collection's own.

Two servers, or two files, may have collections of one name, metric and dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from amips_plugins.bundle.contents import KEY_SAMPLE, PARTITIONS, load
from amips_plugins.bundle.package import Bundle
from amips_plugins.collection import Collection, CollectionKey, Id, KeyBatch, collection_key
from amips_plugins.errors import BundleMismatch
from amips_plugins.vectors import Metric

__all__ = ["check_bundle", "check_made_for"]

_LEAST = 0.5  # of the sample has to be there: with less, what was calibrated says nothing either


def check_bundle(collection: Collection, bundle: Bundle) -> None:
    """Raise ``BundleMismatch`` for a collection that the bundle was not made for.

    One that is in the bundle's cells was looked at when it got them: from then on its keys may
    change as they like. Partitions of its users' own say nothing of whose it is.
    """
    info, manifest = collection.info, bundle.manifest
    given = PARTITIONS in manifest.files
    laid_out = manifest.layout and not given and collection.layout() == manifest.layout
    fetch = None if laid_out else collection.fetch
    check_made_for(bundle, collection_key(info), info.metric, info.dim, fetch)


def check_made_for(
    bundle: Bundle,
    key: CollectionKey,
    metric: Metric,
    dim: int,
    fetch: Callable[[Sequence[Id]], KeyBatch] | None,
) -> None:
    """Raise ``BundleMismatch`` for other names, or too few of its keys in what ``fetch`` reads."""
    manifest = bundle.manifest
    manifest.check_serves(key, metric, dim)
    sample = load(bundle)[KEY_SAMPLE]  # verified, whether it is needed or not
    if fetch is None:
        return
    same = sample.count_same(fetch(sample.ids), manifest.metric)
    if same < _LEAST * len(sample.ids):
        raise BundleMismatch(
            f"Bundle {manifest.version} was made for other keys than those of {key.name!r}: of "
            f"{len(sample.ids)} keys of its snapshot {same} are there with the same vector; train "
            f"one on a snapshot of this collection."
        )
