"""The router: plan with the model, search once, and never do worse than the native search."""

from __future__ import annotations

import logging
import numbers
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from amips_plugins.bundle import CELLS, MANIFEST, Bundle, Manifest
from amips_plugins.cells import Cells
from amips_plugins.errors import BundleCorrupt, InvalidInput
from amips_plugins.hooks import ModelFault, load_hook
from amips_plugins.plan import NATIVE, PreQueryHook, QueryPlan, Target
from amips_plugins.registry import Registry, collection_key
from amips_plugins.vectors import FloatArray, IntArray, as_queries

if TYPE_CHECKING:
    from amips_plugins.adapters.base import Collection, Hit, SearchRequest

__all__ = ["Hits", "LearnedRouter", "Trace"]

_log = logging.getLogger(__name__)
_TOO_FEW = "cells: fewer than k hits"


@dataclass(frozen=True, slots=True)
class Trace:
    """How a query was answered.

    Attributes
    ----------
    mode
        ``route``, ``rewrite`` or ``native``.
    n_probes
        Cells searched; None when the whole collection was.
    version
        Version of the bundle that planned; None without one.
    fallback
        Why the native search answered in place of the model; None when nothing went wrong.
    cells
        With ``explain=True``, the cells searched, best first.
    scanned
        With ``explain=True``, the share of the snapshot's keys in those cells, plus the model's
        own multiplications expressed in keys.
    plan_us, search_ms
        With ``explain=True``, microseconds spent on the plan of the whole batch and milliseconds
        in the database's client.
    """

    mode: str
    n_probes: int | None = None
    version: str | None = None
    fallback: str | None = None
    cells: tuple[int, ...] | None = None
    scanned: float | None = None
    plan_us: float | None = None
    search_ms: float | None = None


class Hits(Sequence["Hit"]):
    """The hits of one query, best first, and how they were found.

    Attributes
    ----------
    trace
        How the query was answered.
    """

    __slots__ = ("_hits", "trace")

    def __init__(self, hits: Sequence[Hit], trace: Trace) -> None:
        self._hits = tuple(hits)
        self.trace = trace

    @overload
    def __getitem__(self, index: int) -> Hit: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...

    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self._hits[index]

    def __len__(self) -> int:
        return len(self._hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self._hits)

    def __repr__(self) -> str:
        return f"Hits({list(self._hits)!r}, trace={self.trace!r})"


class LearnedRouter:
    """Searches a collection through the model published for it.

    Without a usable model every search is the native one; ``fallbacks`` counts why.

    Parameters
    ----------
    collection
        The collection to search.
    registry
        Where to find the bundle: a folder, an fsspec URL or a ``Registry``; left out,
        ``$AMIPS_REGISTRY`` or the folder ``registry``.
    bundle
        A bundle, or the folder of one, to use in place of the registry's latest.
    hook
        A pre-query hook of your own, in place of any bundle.
    threads
        Threads of one model call.

    Raises
    ------
    InvalidInput
        More than one of ``registry``, ``bundle`` and ``hook`` is given.
    BundleError
        The ``bundle`` given cannot serve the collection. (A registry's bundle that cannot is
        logged, and the native search serves.)

    Examples
    --------
    >>> import numpy as np
    >>> from amips_plugins import LearnedRouter, MemoryCollection
    >>> from amips_plugins.plan import QueryPlan
    >>> class Halve:
    ...     def plan(self, queries, target):
    ...         return QueryPlan(rewritten=queries / 2, rescore=10)
    >>> router = LearnedRouter(MemoryCollection(np.eye(3, dtype=np.float32)), hook=Halve())
    >>> hits = router.search([0.0, 1.0, 0.1], k=2)
    >>> [hit.id for hit in hits], hits.trace.mode
    ([1, 2], 'rewrite')
    """

    def __init__(
        self,
        collection: Collection,
        *,
        registry: Registry | str | Path | None = None,
        bundle: Bundle | str | Path | None = None,
        hook: PreQueryHook | None = None,
        threads: int = 1,
    ) -> None:
        if sum(given is not None for given in (registry, bundle, hook)) > 1:
            raise InvalidInput("Give the router one of registry, bundle and hook, not several.")
        self._collection = collection
        self._threads = threads
        self._hook: PreQueryHook | None = hook
        self._manifest: Manifest | None = None
        self._sizes: IntArray | None = None
        self._no_hook = "no bundle"
        self._count = collection.count()
        self.fallbacks: Counter[str] = Counter()
        self._logged: set[str] = set()
        if bundle is not None:
            self._load(bundle if isinstance(bundle, Bundle) else _bundle_in(Path(bundle)))
        elif hook is None:
            self._load_latest(registry if isinstance(registry, Registry) else Registry(registry))

    @property
    def collection(self) -> Collection:
        """The collection searched."""
        return self._collection

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the bundle in use, or None."""
        return self._manifest

    @property
    def learned(self) -> bool:
        """Whether there is a hook to plan with; without one every search is native."""
        return self._hook is not None

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        recall: float | None = None,
        n_probes: int | None = None,
        filter: Any = None,  # noqa: A002 - both databases call it so
        fields: Sequence[str] = (),
        params: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        explain: bool = False,
    ) -> Any:
        """Search.

        Parameters
        ----------
        queries
            ``(dim,)`` or ``(n_queries, dim)``, finite numbers.
        k
            Number of hits wanted, from 1 to the number of keys.
        recall
            Recall@k to reach on average, in (0, 1], with the confidence of the calibration; left
            out, the bundle's own target. Route mode only.
        n_probes
            Number of cells to search, in place of a recall target. Route mode only.
        filter
            The database's own filter; hits satisfy it, whatever the model chose.
        fields
            Stored fields to return with the hits.
        params
            The database's own search parameters.
        timeout
            Seconds the database may take.
        explain
            Fill in the trace's details.

        Returns
        -------
        Hits or list of Hits
            ``Hits`` for one vector, a list of them for a matrix.

        Raises
        ------
        InvalidInput
            An argument cannot be used.
        """
        from amips_plugins.adapters.base import SearchRequest

        rows, single = as_queries(queries, self._collection.info.dim)
        self._check_k(k)
        check_target(recall, n_probes)
        if isinstance(fields, str):
            raise InvalidInput(f"fields={fields!r} is one name; pass a list of names.")
        k = int(k)
        target = Target(k=k, recall=recall, n_probes=n_probes)
        request = SearchRequest(rows, k, filter, tuple(fields), params, timeout)
        started = time.perf_counter()
        plan, fallback = self._plan(rows, target)
        planned = time.perf_counter()
        found, plan, fallback = self._search(request, plan, fallback, started)
        completed = self._complete(request, plan, found, started)
        version = None if self._manifest is None else self._manifest.version
        base = Trace(_mode(plan), version=version, fallback=fallback)
        if explain:
            base = replace(
                base,
                plan_us=(planned - started) * 1e6,
                search_ms=(time.perf_counter() - planned) * 1e3,
            )
        traces = [self._row_trace(base, plan, row, explain) for row in range(len(found))]
        for row in completed:
            routed = traces[row].scanned
            scanned = None if routed is None else routed + 1.0  # the cells, and then every key
            traces[row] = replace(traces[row], mode="native", fallback=_TOO_FEW, scanned=scanned)
        answers = [Hits(hits, trace) for hits, trace in zip(found, traces, strict=True)]
        return answers[0] if single else answers

    def _check_k(self, k: int) -> None:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
            raise InvalidInput(f"k={k!r} asks for nothing; pass a whole number of 1 or more.")
        if k > self._count:
            self._count = self._collection.count()  # it may have grown since
            if k > self._count:
                raise InvalidInput(
                    f"k={k} is more than the {self._count} keys of "
                    f"{self._collection.info.name!r}; ask for at most that many."
                )

    def _plan(self, queries: FloatArray, target: Target) -> tuple[QueryPlan, str | None]:
        if self._hook is None:
            return NATIVE, self._fall_back(self._no_hook)
        try:
            plan = self._hook.plan(queries, target)
            _check_plan(plan, queries)
        except InvalidInput:
            raise  # the caller's own argument
        except Exception as exc:  # noqa: BLE001 - whatever a model does, the native search answers
            return NATIVE, self._fall_back(f"model: {type(exc).__name__}", exc)
        return plan, None  # the adapter refuses cells of another layout; asking here costs a call

    def _search(
        self, request: SearchRequest, plan: QueryPlan, fallback: str | None, started: float
    ) -> tuple[list[list[Hit]], QueryPlan, str | None]:
        if plan.cells is None and plan.rewritten is None:
            return self._collection.search(request), plan, fallback
        try:
            return self._collection.search(request, plan), plan, None
        except Exception as exc:
            left = _what_is_left(request, started)
            if left is None:
                raise
            found = self._collection.search(left)  # an error of the database shows here too
            return found, NATIVE, self._fall_back(f"search: {type(exc).__name__}", exc)

    def _complete(
        self, request: SearchRequest, plan: QueryPlan, found: list[list[Hit]], started: float
    ) -> set[int]:
        """Search natively where a plan found fewer than k hits: small cells, a narrow filter."""
        if plan.cells is None and plan.rewritten is None:
            return set()
        short = [row for row, hits in enumerate(found) if len(hits) < request.k]
        left = _what_is_left(request, started) if short else None
        if left is None:
            return set()
        again = self._collection.search(replace(left, queries=request.queries[short]))
        for row, hits in zip(short, again, strict=True):
            found[row] = hits
        self._fall_back(_TOO_FEW)
        return set(short)

    def _row_trace(self, base: Trace, plan: QueryPlan, row: int, explain: bool) -> Trace:
        if plan.cells is None:
            return base
        cells = tuple(cell for cell in plan.cells[row].tolist() if cell >= 0)
        if not explain:
            return replace(base, n_probes=len(cells))
        return replace(base, n_probes=len(cells), cells=cells, scanned=self._scanned(cells))

    def _scanned(self, cells: tuple[int, ...]) -> float | None:
        if self._sizes is None or self._manifest is None:
            return None
        model = self._manifest.parameters / self._manifest.dim
        return (float(self._sizes[list(cells)].sum()) + model) / self._manifest.count

    def _fall_back(self, reason: str, cause: BaseException | None = None) -> str:
        """Count a reason, and log it the first time."""
        self.fallbacks[reason] += 1
        if reason not in self._logged:
            self._logged.add(reason)
            _log.warning(
                "The native search answers for %r: %s%s",
                self._collection.info.name,
                reason,
                f" ({cause})" if cause is not None else "",
            )
        return reason

    def _load(self, bundle: Bundle) -> None:
        info = self._collection.info
        key = collection_key(info)
        bundle.manifest.check_serves(key.database, key.name, key.field, info.metric, info.dim)
        hook = load_hook(bundle, self._threads)
        if bundle.manifest.layout:
            sizes = Cells.from_bytes(bundle.read(CELLS)).sizes
            if len(sizes) != bundle.manifest.n_cells:
                raise BundleCorrupt(f"The cells of {bundle.location} do not fit its manifest.")
            self._sizes = sizes
        self._hook, self._manifest = hook, bundle.manifest

    def _load_latest(self, registry: Registry) -> None:
        try:
            self._load(registry.open(collection_key(self._collection.info)))
        except Exception as exc:  # noqa: BLE001 - whatever the registry's storage raises, native serves
            self._no_hook = f"bundle: {type(exc).__name__}"
            _log.warning("No bundle serves %r: %s", self._collection.info.name, exc)
            self._logged.add(self._no_hook)


def _bundle_in(folder: Path) -> Bundle:
    inner = folder / "bundle"  # the folder that training wrote holds the bundle
    home = inner if (inner / MANIFEST).exists() else folder
    return Bundle.open(str(home), lambda name: (home / name).read_bytes())


def _what_is_left(request: SearchRequest, started: float) -> SearchRequest | None:
    """Return the request for another search within the caller's one deadline, or None."""
    if request.timeout is None:
        return request
    left = request.timeout - (time.perf_counter() - started)
    return replace(request, timeout=left) if left > 0 else None


def check_target(recall: Any, n_probes: Any) -> None:
    """Refuse a target that makes no sense for any model; None is no target.

    Raises
    ------
    InvalidInput
        The recall is no share, or the probes are no whole number of 1 or more.
    """
    real = isinstance(recall, numbers.Real) and not isinstance(recall, bool)
    if recall is not None and not (real and 0.0 < recall <= 1.0):
        raise InvalidInput(f"recall={recall!r} is no share; pass a number in (0, 1].")
    whole = isinstance(n_probes, (int, np.integer)) and not isinstance(n_probes, bool)
    if n_probes is not None and not (whole and n_probes >= 1):
        raise InvalidInput(
            f"n_probes={n_probes!r} searches nothing; pass a whole number of 1 or more."
        )


def _check_plan(plan: QueryPlan, queries: FloatArray) -> None:
    """Refuse a plan that does not fit its queries: a hook may be anyone's."""
    rewritten, cells = plan.rewritten, plan.cells
    if rewritten is not None and rewritten.shape != queries.shape:
        raise ModelFault(f"{len(queries)} queries were rewritten to shape {rewritten.shape}.")
    if rewritten is not None and not np.isfinite(rewritten).all():
        raise ModelFault("A rewritten query is not finite.")
    if cells is not None and (cells.ndim != 2 or len(cells) != len(queries)):
        raise ModelFault(f"{len(queries)} queries got cells of shape {cells.shape}.")


def _mode(plan: QueryPlan) -> str:
    if plan.cells is not None:
        return "route"
    return "native" if plan.rewritten is None else "rewrite"
