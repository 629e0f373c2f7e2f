"""The members of several collections: what they are called, and whether they compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from amips_plugins.collection import Collection, CollectionInfo, Id
from amips_plugins.errors import InvalidInput
from amips_plugins.vectors import Metric

__all__ = ["check_members", "member_name", "name_members", "part_key"]

_ROOTS = ("qdrant", "qdrant-edge")  # whose L2 scores are distances, not squared


def name_members(
    collections: Sequence[Collection] | Mapping[str, Collection],
) -> dict[str, Collection]:
    """Give every collection a name that does not depend on the others."""
    given: object = collections
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InvalidInput(
            f"{type(collections).__name__} is no list of collections; pass [connect(URI), ...], or "
            f"a mapping that names them."
        )
    if isinstance(collections, Mapping):
        members = {str(name): _checked(one) for name, one in collections.items()}
    else:
        members = {}
        for one in collections:
            name = member_name(_checked(one))
            if name in members:
                raise InvalidInput(
                    f"Two of the collections are called {name!r}; pass a mapping that names them."
                )
            members[name] = one
    if not members:
        raise InvalidInput("There are no collections to search; pass one or more.")
    return members


def _checked(one: Collection) -> Collection:
    if not hasattr(one, "info"):
        raise InvalidInput(f"A {type(one).__name__} is no collection; pass connect(URI).")
    return one


def member_name(one: Collection) -> str:
    """Return the name that a collection has by itself, such as ``milvus/docs``."""
    info = one.info
    place = f"{info.database}@{info.namespace}" if info.namespace else info.database
    return f"{place}/{info.family or info.name}"


def check_members(members: Mapping[str, Collection]) -> CollectionInfo:
    """Refuse collections whose vectors, or scores, cannot be compared."""
    (first, one), *others = ((name, member.info) for name, member in members.items())
    for name, info in others:
        for what, here, there in (
            ("metric", str(one.metric), str(info.metric)),
            ("dimension", str(one.dim), str(info.dim)),
        ):
            if here != there:
                raise InvalidInput(
                    f"{first!r} has the {what} {here}, {name!r} has {there}; only collections of "
                    f"one model of embedding, and one metric, can be searched as one."
                )
        if one.metric is Metric.L2 and (one.database in _ROOTS) != (info.database in _ROOTS):
            raise InvalidInput(
                f"{first!r} and {name!r} have the metric l2, whose scores are distances on Qdrant "
                f"and their squares elsewhere; search collections of one kind of database as one."
            )
    return one


def part_key(key: Id) -> tuple[str, Id]:
    """Take apart what ``Hit.key`` put together; of anything else no collection has a name."""
    try:
        name, own = json.loads(str(key))
    except (ValueError, TypeError):
        return "", key
    return (name, own) if isinstance(name, str) else ("", key)
