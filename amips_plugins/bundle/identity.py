"""Whose bundle it is: names are compared, and some keys of its snapshot with the collection's own.

Two servers, or two files, may have collections of one name, metric and dimension.
"""

from __future__ import annotations

from amips_plugins.bundle.contents import KEY_SAMPLE, PARTITIONS, load
from amips_plugins.bundle.package import Bundle
from amips_plugins.collection import Collection, collection_key
from amips_plugins.errors import BundleMismatch

__all__ = ["check_bundle"]

_LEAST = 0.5  # of the sample has to be there: with less, what was calibrated says nothing either


def check_bundle(collection: Collection, bundle: Bundle) -> None:
    """Raise ``BundleMismatch`` for a collection that the bundle was not made for.

    One that is in the bundle's cells was looked at when it got them: from then on its keys may
    change as they like. Partitions of its users' own say nothing of whose it is.
    """
    info, manifest = collection.info, bundle.manifest
    manifest.check_serves(collection_key(info), info.metric, info.dim)
    sample = load(bundle)[KEY_SAMPLE]  # verified, whether it is needed or not
    given = PARTITIONS in manifest.files
    if manifest.layout and not given and collection.layout() == manifest.layout:
        return
    same = sample.count_same(collection.fetch(sample.ids), manifest.metric)
    if same < _LEAST * len(sample.ids):
        raise BundleMismatch(
            f"Bundle {manifest.version} was made for other keys than those of {info.name!r}: of "
            f"{len(sample.ids)} keys of its snapshot {same} are there with the same vector; train "
            f"one on a snapshot of this collection."
        )
