"""Collections with a graph for every value of a payload key, and none over all points.

Qdrant advises this for tenants (``m=0``, ``payload_m>0``). Its search then finds the neighbours
of one value; where several are named, or none, it silently finds a fraction of them. So several
values are as many searches, merged, and no value is an exact search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amips_plugins.errors import require

if TYPE_CHECKING:
    from qdrant_client import models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["by_value", "tenant_keys"]

_VALUES = 100  # searches in one call at most; of more values the search is exact
_KINDS = (
    models.PayloadSchemaType.KEYWORD,
    models.PayloadSchemaType.INTEGER,
    models.PayloadSchemaType.UUID,
    models.PayloadSchemaType.BOOL,
)


def tenant_keys(found: models.CollectionInfo, field: str) -> frozenset[str] | None:
    """Return the payload keys whose values have graphs; None where one is over all, or none is."""
    vectors, overall = found.config.params.vectors, found.config.hnsw_config
    vector = vectors.get(field) if isinstance(vectors, dict) else vectors
    own = None if vector is None else vector.hnsw_config
    links = overall.m if own is None or own.m is None else own.m
    inside = overall.payload_m if own is None or own.payload_m is None else own.payload_m
    if links or not inside:
        return None
    return frozenset(
        key
        for key, index in found.payload_schema.items()
        if index.data_type in _KINDS and getattr(index.params, "enable_hnsw", None) is not False
    )


def by_value(condition: models.Filter | None, keys: frozenset[str]) -> list[models.Filter] | None:
    """Cut a filter into one for each value that it names; None where a graph cannot serve it."""
    musts: Any = None if condition is None else condition.must
    conditions = musts if isinstance(musts, list) else [musts]
    best: tuple[list[Any], int] | None = None
    for place, one in enumerate(conditions):
        values = _values(one, keys)
        if values and (best is None or len(values) < len(best[0])):
            best = values, place
    if condition is None or best is None or len(best[0]) > _VALUES:
        return None
    values, place = best
    parts = []
    for value in values:
        named = models.FieldCondition(
            key=conditions[place].key, match=models.MatchValue(value=value)
        )
        must = [*conditions[:place], named, *conditions[place + 1 :]]
        parts.append(condition.model_copy(update={"must": must}))
    return parts


def _values(condition: Any, keys: frozenset[str]) -> list[Any]:
    """Return the values that a condition names of a key with graphs."""
    if not isinstance(condition, models.FieldCondition) or condition.key not in keys:
        return []
    if isinstance(condition.match, models.MatchValue):
        return [condition.match.value]
    if isinstance(condition.match, models.MatchAny):
        return list(dict.fromkeys(condition.match.any))
    return []
