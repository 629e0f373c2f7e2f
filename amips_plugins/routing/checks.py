"""Arguments and plans that make no sense are refused before anything is asked."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict
from uuid import UUID

import numpy as np

from amips_plugins.collection import Id, SearchRequest, check_keys
from amips_plugins.errors import InvalidInput
from amips_plugins.models.hooks import ModelFault
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray, as_queries

__all__ = [
    "Matrix",
    "SearchOptions",
    "Vector",
    "as_ids",
    "as_keys",
    "as_search",
    "check_plan",
    "check_settings",
    "check_target",
]

Vector = Sequence[float] | np.ndarray[tuple[int], np.dtype[Any]]
Matrix = Sequence[Sequence[float] | np.ndarray[Any, Any]] | np.ndarray[tuple[int, int], Any]


class SearchOptions(TypedDict, total=False):
    """What ``LearnedRouter.search`` may be given beside queries and k."""

    recall: float | None
    n_probes: int | None
    filter: Any
    fields: Sequence[str]
    params: Mapping[str, Any] | None
    timeout: float | None
    explain: bool


def as_search(
    dim: int,
    queries: Any,
    k: Any,
    recall: Any,
    n_probes: Any,
    filter: Any,  # noqa: A002 - both databases call it so
    fields: Sequence[str],
    params: Mapping[str, Any] | None,
    timeout: float | None,
) -> tuple[SearchRequest, Target, bool]:
    """Check the arguments of a search; say what is asked, aimed at, and if it is one vector."""
    rows, single = as_queries(queries, dim)
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InvalidInput(f"k={k!r} asks for nothing; pass a whole number of 1 or more.")
    if recall is not None or n_probes is not None:
        check_target(recall, n_probes)
    if isinstance(fields, str):
        raise InvalidInput(f"fields={fields!r} is one name; pass a list of names.")
    request = SearchRequest(rows, int(k), filter, tuple(fields), params, timeout)
    return request, Target(int(k), recall, n_probes), single


def check_settings(refresh: float | None, overflow_warning: float, plan_timeout: float) -> None:
    """Refuse numbers that no router can be made with."""
    if refresh is not None and not refresh > 0:
        raise InvalidInput(f"refresh={refresh!r} is no time; pass seconds above 0, or None.")
    if not 0.0 <= overflow_warning <= 1.0:
        raise InvalidInput(f"overflow_warning={overflow_warning!r} is no share from 0 to 1.")
    if not plan_timeout > 0:
        raise InvalidInput(f"plan_timeout={plan_timeout!r} is no time; pass seconds above 0.")


def check_target(recall: Any, n_probes: Any) -> None:
    """Refuse a target that makes no sense for any model; None is no target."""
    real = isinstance(recall, numbers.Real) and not isinstance(recall, bool)
    if recall is not None and not (real and 0.0 < recall <= 1.0):
        raise InvalidInput(f"recall={recall!r} is no share; pass a number in (0, 1].")
    whole = isinstance(n_probes, (int, np.integer)) and not isinstance(n_probes, bool)
    if n_probes is not None and not (whole and n_probes >= 1):
        raise InvalidInput(
            f"n_probes={n_probes!r} searches nothing; pass a whole number of 1 or more."
        )


def check_plan(plan: QueryPlan, queries: FloatArray) -> None:
    """Raise ``ModelFault`` for a plan that does not fit its queries: a hook may be anyone's."""
    rewritten, cells, shares = plan.rewritten, plan.cells, plan.shares
    if rewritten is not None and rewritten.shape != queries.shape:
        raise ModelFault(f"{len(queries)} queries were rewritten to shape {rewritten.shape}.")
    if rewritten is not None and not np.isfinite(rewritten).all():
        raise ModelFault("A rewritten query is not finite.")
    if cells is not None and (cells.ndim != 2 or len(cells) != len(queries)):
        raise ModelFault(f"{len(queries)} queries got cells of shape {cells.shape}.")
    if shares is not None and shares.shape != (len(queries),):
        raise ModelFault(f"{len(queries)} queries got shares of shape {shares.shape}.")


def as_ids(ids: Any) -> list[Id]:
    """Make plain Python values of ids, for the clients know no numpy integers; or refuse them."""
    if isinstance(ids, (str, bytes)):
        raise InvalidInput(f"ids={ids!r} is one id; pass a list of ids.")
    try:
        plain = [_plain(key) for key in ids]
    except TypeError as exc:
        raise InvalidInput(f"ids={ids!r} is no list of ids.") from exc
    for key in plain:
        if isinstance(key, bool) or not isinstance(key, (int, str)):
            raise InvalidInput(f"The id {key!r} is no whole number and no string.")
    if len(set(plain)) != len(plain):
        raise InvalidInput("An id comes twice in one call; pass every id once.")
    return plain


def _plain(key: Any) -> Any:
    if isinstance(key, np.integer):
        return int(key)
    return str(key) if isinstance(key, UUID) else key


def as_keys(
    ids: Any, vectors: Any, fields: Sequence[Mapping[str, Any]] | None, dim: int
) -> tuple[list[Id], FloatArray]:
    """Check keys to be written, and bring ids and vectors into one form."""
    plain = as_ids(ids)
    rows, _ = as_queries(vectors, dim, ("Vector", "Vectors"))
    check_keys(dim, None, plain, rows, fields, None)
    return plain, rows
