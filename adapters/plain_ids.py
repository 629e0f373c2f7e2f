"""Ids as databases take them, from whatever callers have."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from amips_plugins.collection import Id
from amips_plugins.errors import InvalidInput

__all__ = ["plain_ids"]


def plain_ids(ids: Iterable[Any], beside: Sequence[Id] = ()) -> list[Id]:
    """Return ids as int or str, all of one kind with those ``beside`` them, or refuse them."""
    plain: list[Any] = [one.item() if isinstance(one, np.generic) else one for one in ids]
    plain = [str(one) if isinstance(one, uuid.UUID) else one for one in plain]
    kinds = {type(one) for one in (*plain, *beside)}
    if not (kinds <= {int} or kinds <= {str}):
        raise InvalidInput("Ids are all whole numbers or all text; pass ids of one kind.")
    return plain
