"""Strays: points with something under a cell's key that is no whole number.

Nobody who knows the key writes such a thing, and nobody can be kept from it. They are overflow like
all that has no cell, and the only ones that a server's index cannot list. One that comes while a
collection serves is missed by searches of cells until the collection is looked at again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.failures import translated_errors
from amips_plugins.adapters.qdrant.search import strays_of
from amips_plugins.adapters.qdrant.strict_mode import Limits
from amips_plugins.errors import CollectionError, require

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["may_have_strays"]

_PATIENCE = 5  # seconds; to leave cells out instead is no more than slower


def may_have_strays(
    client: QdrantClient,
    name: str,
    shard_key: int | str | None,
    found: models.CollectionInfo,
    record: LayoutRecord | None,
) -> bool:
    """Tell whether searches of cells have to look for strays; also where nobody can say.

    They do, too, where strict mode could refuse the other form of a search, for its conditions.
    """
    if record is None or record.places:
        return False
    limits, index = Limits(found.config.strict_mode_config), found.payload_schema.get(record.key)
    if limits.counts_conditions or not limits.allows_exact:
        return True
    if index is None or index.data_type is not models.PayloadSchemaType.INTEGER:
        return True  # somebody has made it of another kind, which lists other things
    # While a server optimises it counts some points twice in one of these numbers only.
    calm = found.status is models.CollectionStatus.GREEN
    if calm and index.points == found.points_count:
        return False  # under every key there is a whole number, or a list of some
    try:
        with translated_errors("The server"):
            strays = client.count(
                name,
                strays_of(record),
                exact=True,
                shard_key_selector=shard_key,
                timeout=limits.seconds(_PATIENCE),
            )
    except CollectionError:  # such as for the time it takes
        return True
    return strays.count > 0
