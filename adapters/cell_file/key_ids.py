"""Ids as a cell file stores them: whole numbers of 64 bits, or UTF-8 of a fixed length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from amips_plugins.collection import Id
from amips_plugins.errors import InvalidInput

__all__ = ["can_be_stored", "ids_as_array", "plain_id", "stored_ids"]

_LONGEST = 1000  # bytes of a text
_HALF = 2**63


def ids_as_array(ids: Sequence[Id]) -> npt.NDArray[Any]:
    """Store ids, all of one kind, or raise ``InvalidInput``."""
    if len({isinstance(one, str) for one in ids}) > 1:
        raise InvalidInput(
            "Ids in a cell file are all whole numbers or all texts, not some of each."
        )
    if len(ids) and isinstance(ids[0], str):
        try:
            texts = [str(one).encode() for one in ids]
        except UnicodeEncodeError as exc:
            raise InvalidInput(f"The id {exc.object!r} is no text that UTF-8 has.") from exc
        longest = max(map(len, texts))
        odd = [one for one in texts if one.endswith(b"\0")]
        if longest > _LONGEST or odd or not all(texts):
            raise InvalidInput(
                f"Ids of texts are up to {_LONGEST} bytes long, not empty, and end with no zero."
            )
        return np.array(texts, dtype=f"S{longest}")
    try:
        return np.array(ids, dtype="<i8")
    except OverflowError:
        pass
    try:
        return np.array(ids, dtype="<u8")
    except (OverflowError, ValueError):
        raise InvalidInput("Ids of whole numbers are below 2^64, or from -2^63 on.") from None


def stored_ids(ids: Sequence[Id], kind: np.dtype[Any]) -> tuple[list[int], npt.NDArray[Any]]:
    """Return the places of those ids that a file of this kind can hold, and these as stored."""
    if kind.kind == "S":
        texts = [
            (place, one.encode(errors="surrogatepass"))
            for place, one in enumerate(ids)
            if isinstance(one, str) and not one.endswith("\0")  # which numpy would cut off
        ]
        fit = [(place, one) for place, one in texts if 0 < len(one) <= kind.itemsize]
        return [place for place, _ in fit], np.array([one for _, one in fit], dtype=kind)
    low, high = (-_HALF, _HALF) if kind.kind == "i" else (0, 2 * _HALF)
    whole = [(place, one) for place, one in enumerate(ids) if isinstance(one, int)]
    numbers = [(place, one) for place, one in whole if low <= one < high]
    return [place for place, _ in numbers], np.array([one for _, one in numbers], dtype=kind)


def can_be_stored(key: Id) -> bool:
    """Tell whether any file may hold an id."""
    try:
        ids_as_array([key])
    except InvalidInput:
        return False
    return True


def plain_id(stored: Any) -> Id:
    """Return an id as callers know it."""
    return stored.decode() if isinstance(stored, bytes) else int(stored)
