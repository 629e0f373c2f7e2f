"""The seam between what plans and what searches: a database's collection, and its values."""

from amips_plugins.collection.checks import check_keys, check_layout
from amips_plugins.collection.protocol import AsyncCollection, Collection, ThoroughCollection
from amips_plugins.collection.values import (
    CollectionInfo,
    CollectionKey,
    Cursor,
    Failure,
    Hit,
    Id,
    Incomplete,
    KeyBatch,
    SearchRequest,
    collection_key,
)

__all__ = [
    "AsyncCollection",
    "Collection",
    "CollectionInfo",
    "CollectionKey",
    "Cursor",
    "Failure",
    "Hit",
    "Id",
    "Incomplete",
    "KeyBatch",
    "SearchRequest",
    "ThoroughCollection",
    "check_keys",
    "check_layout",
    "collection_key",
]
