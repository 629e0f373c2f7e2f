"""The router: plan with the model, search once, and never do worse than the native search."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from amips_plugins.background.single_flight import PeriodicJob
from amips_plugins.bundle.manifest import Manifest
from amips_plugins.bundle.package import Bundle
from amips_plugins.bundle.registry import Registry
from amips_plugins.collection import Collection, Id, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.health.gate import Health
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.plan import NATIVE, PreQueryHook, Target
from amips_plugins.routing.checks import Matrix, SearchOptions, Vector, as_search, check_settings
from amips_plugins.routing.effects import Effects, SearchBy, run, search_collection
from amips_plugins.routing.execution import execute
from amips_plugins.routing.fallbacks import Fallbacks
from amips_plugins.routing.hits import Hits, Trace
from amips_plugins.routing.observers import Observer, Observers
from amips_plugins.routing.planner import WATCHED, plan_search
from amips_plugins.routing.refresh import ServingFollower
from amips_plugins.routing.serving import Serving, bundle_in, serve_bundle
from amips_plugins.routing.traces import traces
from amips_plugins.routing.writer import Writer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Hits", "LearnedRouter", "Trace"]


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
        Threads of one model call. At 1 the caller's own thread computes and ONNX Runtime starts
        none, so a server of many workers or processes is not oversubscribed; more help large
        batches only, and where a process has the cores to itself.
    refresh
        Seconds after which a search has the database and the registry looked at again, on a
        thread of its own (see ``refresh``); None to do so only on request.
    overflow_warning
        Share of keys without a cell past which a refresh logs a warning.
    observers
        Told of every answered search, see ``observe``: a ``QueryLog``, ``SearchSpans``, your own.
    plan_timeout
        Seconds that the model may take for one query (a batch gets a millisecond more for each of
        the others), and never more than a quarter of a search's ``timeout``; then the native
        search answers.
    watch
        Samples live searches and holds the router to its target, see ``health``; left out, one
        with its defaults; ``HealthMonitor(share=0, drift_share=0)`` watches only the overflow.

    Raises
    ------
    InvalidInput
        More than one of ``registry``, ``bundle`` and ``hook`` is given, or another argument
        cannot be used.
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
        refresh: float | None = 30.0,
        overflow_warning: float = 0.05,
        observers: Sequence[Observer] = (),
        plan_timeout: float = 0.25,
        watch: HealthMonitor | None = None,
    ) -> None:
        if sum(given is not None for given in (registry, bundle, hook)) > 1:
            raise InvalidInput("Give the router one of registry, bundle and hook, not several.")
        check_settings(refresh, overflow_warning, plan_timeout)
        _ = collection.info  # what cannot be searched is refused here
        self._observers = Observers(observers)
        self._fallbacks = Fallbacks()
        self._plan_timeout = plan_timeout
        self._enabled = os.environ.get("AMIPS_DISABLED", "") in ("", "0")
        serving = Serving(collection, hook)
        known: Registry | None = None
        if bundle is not None:
            opened = bundle if isinstance(bundle, Bundle) else bundle_in(Path(bundle))
            serving = serve_bundle(collection, opened, threads)
        elif hook is None:
            known = registry if isinstance(registry, Registry) else Registry(registry)
        self._monitor = HealthMonitor() if watch is None else watch
        self._follower = ServingFollower(serving, known, threads, overflow_warning, self._monitor)
        self._writer = Writer(self._follower, self._fallbacks)
        self._refresher = PeriodicJob(self._follower.look, refresh)

    @classmethod
    def over(
        cls,
        collections: Sequence[Collection] | Mapping[str, Collection],
        *,
        name: str = "all",
        strict: bool = False,
        at_once: int = 8,
        timeout: float = 10.0,
        **options: Any,
    ) -> LearnedRouter:
        """Search several collections, of any databases, as one: see docs/partitions.md.

        The model published under ``name`` chooses whom a query is asked of; without one, all are.
        ``options`` are those of this class, the others those of ``SeveralCollections``, which also
        says what is refused.
        """
        from amips_plugins.adapters.several.collection import SeveralCollections

        more: Any = {"name": name, "strict": strict, "at_once": at_once, "timeout": timeout}
        return cls(SeveralCollections(collections, **more), **options)

    @property
    def collection(self) -> Collection:
        """The collection searched, as it was last looked at."""
        return self._follower.serving.collection

    @property
    def fallbacks(self) -> Counter[str]:
        """How often the native search answered in place of the model, by reason."""
        return self._fallbacks.counts

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the bundle in use, or None."""
        return self._follower.serving.manifest

    @property
    def learned(self) -> bool:
        """Whether there is a hook to plan with; without one every search is native."""
        return self._follower.serving.hook is not None

    @property
    def last_overflow_share(self) -> float | None:
        """What ``overflow_share`` last found, for every refresh asks it; None before the first."""
        return self._follower.overflow_share

    @property
    def enabled(self) -> bool:
        """Whether the model is asked at all; set it to False to have every search native.

        A process that starts with ``AMIPS_DISABLED=1`` in its environment begins so.
        """
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)

    @property
    def health(self) -> Health | None:
        """Which way the router searches, and what live searches showed; None without a model."""
        return self._monitor.health

    def observe(self, observer: Observer) -> None:
        """Tell an observer of every search to come, once it is answered.

        It is called on the caller's thread, before the hits are returned, and of no search that
        raises. What it raises itself is logged once and never reaches the caller.

        Raises
        ------
        InvalidInput
            It cannot be called.
        """
        self._observers.add(observer)

    @overload
    def search(
        self, queries: Matrix, k: int = 10, **options: Unpack[SearchOptions]
    ) -> list[Hits]: ...

    @overload
    def search(self, queries: Vector, k: int = 10, **options: Unpack[SearchOptions]) -> Hits: ...

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
    ) -> Hits | list[Hits]:
        """Search.

        Parameters
        ----------
        queries
            ``(dim,)`` or ``(n_queries, dim)``, finite numbers.
        k
            Number of hits wanted; where there are fewer keys, all of them are found.
        recall
            Recall@k to reach on average, in (0, 1], with the confidence of the calibration; left
            out, the bundle's own target. 1 looks at every key. Route mode only.
        n_probes
            Number of cells to search, in place of a recall target. Route mode only.
        filter
            The database's own filter; hits satisfy it. Without ``n_probes`` the native search
            answers until sampled ones show that routing holds its target under such filters.
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
        request, target, single = as_search(
            self.collection.info.dim, queries, k, recall, n_probes, filter, fields, params, timeout
        )
        found = run(self.search_effects(request, target, explain=explain))
        return found[0] if single else found

    def search_effects(
        self,
        request: SearchRequest,
        target: Target,
        *,
        explain: bool = False,
        search: SearchBy = search_collection,
        sampled: bool = True,
        wanted: bool = True,
    ) -> Effects[list[Hits]]:
        """Search for a request that has been checked; how to wait is the caller's matter.

        ``search`` performs every search of a collection that it takes, by its plan or natively,
        and decides what a hit is: all that is asked of its result is a list for each query.
        Where the request does not say all that is asked, it is not to be ``sampled``. Who has the
        hits from ``search`` already does not want them again, and none are returned.
        """
        effects = self._search(request, target, search, explain, sampled, wanted)
        return self._observers.around(effects) if self._observers.surround else effects

    def _search(
        self,
        request: SearchRequest,
        target: Target,
        search: SearchBy,
        explain: bool,
        sampled: bool,
        wanted: bool,
    ) -> Effects[list[Hits]]:
        self._refresher.run_if_due()
        serving = self._follower.serving  # taken once: a look meanwhile is the next search's
        health = None if serving.watch is None else serving.watch.health
        started = time.perf_counter()
        if self._enabled:
            plan, fallback = yield from plan_search(
                serving, self._fallbacks, request, target, self._plan_timeout, health
            )
        else:
            plan, fallback = NATIVE, serving.note(self._fallbacks, "disabled")
        planned = time.perf_counter()
        try:
            answered = yield from execute(search, serving.collection, request, plan, started)
        except Exception as exc:  # noted here, and the caller's as it is
            late = request.timeout is not None and time.perf_counter() - started >= request.timeout
            if serving.failed(plan, exc, late=late):
                self._refresher.run_soon()
            raise
        ended = time.perf_counter()
        if serving.account(self._fallbacks, plan, answered):
            self._refresher.run_soon()
        if sampled and serving.watch and health and self._monitor.chosen(len(request.queries)):
            free = target.n_probes is not None or target.recall == 1.0
            if not free and answered.fallback is None and fallback in WATCHED:
                found = answered.found, answered.plan
                self._monitor.offer(serving.watch, health.widen, request, target, *found)
        if not (wanted or self._observers):
            return []
        times = planned - started, ended - planned
        traced = traces(answered, serving, fallback, times, explain=explain)
        if self._observers:
            self._observers.tell(serving, request, answered, traced, times)
        return [Hits(hits, trace) for hits, trace in zip(answered.found, traced, strict=True)]

    @property
    def plans(self) -> bool:
        """Whether a model plans the searches to come, as far as is known before they are asked."""
        serving = self._follower.serving
        return self._enabled and serving.hook is not None and serving.obstacle is None

    def rests(self) -> bool:
        """Tell, and count, that the native search has to answer a search that nobody watches.

        Whoever would answer it natively in another way can do that at once.
        """
        if self.plans or self._observers:
            return False
        serving = self._follower.serving
        self._refresher.run_if_due()
        reason = (serving.obstacle or "no bundle") if self._enabled else "disabled"
        serving.note(self._fallbacks, reason, serving.hint if self._enabled else None)
        return True

    def upsert(
        self,
        ids: Sequence[Id],
        vectors: Any,
        fields: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Write keys, in place of those with the same ids; safe and searched when it returns.

        Each key gets the cell that the bundle gives it: for a key of the snapshot that has kept
        its vector the recorded one, which takes 16 bytes of memory a key of the snapshot from the
        first call on. Where there is no bundle, or the collection has no cells of it, keys are
        written without (``amips backfill`` gives them theirs), and are searched all the same.

        Parameters
        ----------
        ids
            One int or string a key, each once.
        vectors
            ``(n, dim)``, finite numbers.
        fields
            Stored fields of each key.

        Raises
        ------
        InvalidInput
            An argument cannot be used; nothing has been written.
        CollectionError
            The collection was replaced time and again during the call.
        """
        self._writer.upsert(ids, vectors, fields)

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete keys; ids that are not there are none of its business.

        Raises
        ------
        InvalidInput
            The ids cannot be used.
        CollectionError
            The collection was replaced time and again during the call.
        """
        self._writer.delete(ids)

    def overflow_share(self) -> float:
        """Count the keys that have no cell, which every query searches.

        Returns
        -------
        float
            Their share of all keys; 0 where the collection has no cells.
        """
        return self._follower.count_overflow()

    def refresh(self) -> bool:
        """Look at the database and the registry again now, and serve what is new there.

        A moved alias, new cells and a new bundle serve the next searches; those under way end as
        they began. A bundle that cannot serve is refused, which is logged, and the one that runs
        serves on, as everything does while the database or the registry cannot be reached.

        Returns
        -------
        bool
            Whether something else serves now.
        """
        return self._follower.look(thoroughly=True)

    def __reduce__(self) -> Any:
        raise TypeError("A LearnedRouter cannot be pickled; make one in every process.")
