"""The router: plan with the model, search once, and never do worse than the native search."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amips_plugins.answering import answer, traces
from amips_plugins.bundle import Bundle, Manifest
from amips_plugins.checks import as_ids, as_keys, check_k, check_plan, check_target
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.fallbacks import Fallbacks
from amips_plugins.observe.observers import Observer, Observers
from amips_plugins.plan import NATIVE, PreQueryHook, QueryPlan, Target
from amips_plugins.refresher import Refresher
from amips_plugins.registry import Registry
from amips_plugins.serving import Serving, bundle_in, follow, serve_bundle, serve_latest
from amips_plugins.trace import Hits, Trace
from amips_plugins.vectors import FloatArray, as_queries
from amips_plugins.writes import Assigner

if TYPE_CHECKING:
    from amips_plugins.adapters.base import Collection, Id
    from amips_plugins.health.gate import Health

__all__ = ["Hits", "LearnedRouter", "Trace"]

_log = logging.getLogger(__name__)
_SWITCHES = 10  # generations that one write follows: more in a row is a fault


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
    refresh
        Seconds after which a search has the database and the registry looked at again, on a
        thread of its own (see ``refresh``); None to do so only on request.
    overflow_warning
        Share of keys without a cell past which a refresh logs a warning.
    observers
        Told of every answered search, see ``observe``: a ``QueryLog``, ``SearchSpans``, your own.

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
    ) -> None:
        if sum(given is not None for given in (registry, bundle, hook)) > 1:
            raise InvalidInput("Give the router one of registry, bundle and hook, not several.")
        if refresh is not None and not refresh > 0:
            raise InvalidInput(f"refresh={refresh!r} is no time; pass seconds above 0, or None.")
        if not 0.0 <= overflow_warning <= 1.0:
            raise InvalidInput(f"overflow_warning={overflow_warning!r} is no share from 0 to 1.")
        self._threads = threads
        self._registry: Registry | None = None
        self._count = collection.count()
        self._assigner = Assigner()
        self._overflow_warning = overflow_warning
        self._overflows = False
        self._last_overflow: float | None = None
        self._observers = Observers(observers)
        self._fallbacks = Fallbacks()
        self._refreshing = threading.Lock()
        self._problem: str | None = None
        self._serving = Serving(collection, hook)
        if bundle is not None:
            opened = bundle if isinstance(bundle, Bundle) else bundle_in(Path(bundle))
            self._serving = serve_bundle(collection, opened, threads)
        elif hook is None:
            self._registry = registry if isinstance(registry, Registry) else Registry(registry)
            serving, problem = self._load_latest(self._registry, self._serving)
            self._adopt(serving)
            self._say(problem)
        self._refresher = Refresher(self.refresh, refresh)

    @property
    def collection(self) -> Collection:
        """The collection searched, as it was last looked at."""
        return self._serving.collection

    @property
    def fallbacks(self) -> Counter[str]:
        """How often the native search answered in place of the model, by reason."""
        return self._fallbacks.counts

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the bundle in use, or None."""
        return self._serving.manifest

    @property
    def learned(self) -> bool:
        """Whether there is a hook to plan with; without one every search is native."""
        return self._serving.hook is not None

    @property
    def last_overflow_share(self) -> float | None:
        """What ``overflow_share`` last found, for every refresh asks it; None before the first."""
        return self._last_overflow

    @property
    def health(self) -> Health | None:
        """How the router does; None while nothing watches it."""
        return None

    def observe(self, observer: Observer) -> None:
        """Tell an observer of every search to come, once it is answered.

        It is called on the caller's thread before the hits are returned. What it raises is logged
        once and never reaches the caller. A search that raises is not told of.

        Raises
        ------
        InvalidInput
            It cannot be called.
        """
        self._observers.add(observer)

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

        self._refresher.look()
        serving = self._serving  # taken once: a refresh meanwhile is the next search's
        rows, single = as_queries(queries, serving.collection.info.dim)
        check_k(k)
        self._check_count(k, serving.collection)
        check_target(recall, n_probes)
        if isinstance(fields, str):
            raise InvalidInput(f"fields={fields!r} is one name; pass a list of names.")
        k = int(k)
        target = Target(k=k, recall=recall, n_probes=n_probes)
        request = SearchRequest(rows, k, filter, tuple(fields), params, timeout)
        started = time.perf_counter()
        plan, fallback = self._plan(serving, rows, target)
        planned = time.perf_counter()
        answered = answer(
            serving.collection, request, plan, started, self._fall_back, self._refresher.hurry
        )
        ended = time.perf_counter()
        version = None if serving.manifest is None else serving.manifest.version
        base = Trace(_mode(answered.plan), version=version, fallback=fallback or answered.fallback)
        if explain:
            base = replace(
                base,
                plan_us=(planned - started) * 1e6,
                search_ms=(ended - planned) * 1e3,
            )
        rows_traced = traces(
            answered, base, serving.collection, serving.model_share, explain=explain
        )
        if self._observers:
            self._observers.tell(
                serving.collection,
                request,
                answered,
                rows_traced,
                serving.model_share,
                (planned - started, ended - planned),
            )
        answers = [Hits(hits, t) for hits, t in zip(answered.found, rows_traced, strict=True)]
        return answers[0] if single else answers

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
        keys, rows = as_keys(ids, vectors, fields, self.collection.info.dim)

        def write(serving: Serving) -> None:
            cells = None
            if serving.bundle is not None and serving.has_cells_of_bundle():
                try:
                    cells = self._assigner.assign(serving.bundle, keys, rows)
                except Exception as exc:  # noqa: BLE001 - the write must not suffer from a bundle
                    self._fall_back(f"write: {type(exc).__name__}", exc)
            serving.collection.upsert(keys, rows, fields, cells)

        self._write(write)

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete keys; ids that are not there are none of its business.

        Raises
        ------
        InvalidInput
            The ids cannot be used.
        CollectionError
            The collection was replaced time and again during the call.
        """
        keys = as_ids(ids)
        self._write(lambda serving: serving.collection.delete(keys))

    def overflow_share(self) -> float:
        """Count the keys that have no cell, which every query searches.

        Returns
        -------
        float
            Their share of all keys; 0 where the collection has no cells.
        """
        collection = self.collection
        if collection.layout() is None:
            self._last_overflow = 0.0
            return 0.0
        self._last_overflow = share = collection.overflow() / max(1, collection.count())
        crossed, self._overflows = not self._overflows, share > self._overflow_warning
        if self._overflows and crossed:
            _log.warning(
                "%.1f %% of the keys of %r have no cell and are searched by every query; to give "
                "them theirs: amips backfill.",
                100 * share,
                collection.info.name,
            )
        return share

    def refresh(self) -> bool:
        """Look at the database and the registry again now, and serve what is new there.

        A moved alias, new cells and a newly published bundle show here. The next searches use
        them; those under way end as they began. A bundle that cannot serve is refused, which is
        logged, and the one that runs serves on; so does everything while the database or the
        registry cannot be reached.

        Returns
        -------
        bool
            Whether something else serves now.
        """
        with self._refreshing:
            before, problem = self._serving, None
            try:
                serving = follow(before)
                if self._registry is not None:
                    serving, problem = self._load_latest(self._registry, serving)
                self._adopt(serving)
                self.overflow_share()
            except Exception as exc:  # noqa: BLE001 - whatever is out of reach, the router serves on
                problem = f"{before.collection.info.name!r} cannot be looked at again: {exc}"
            self._say(problem)
            return self._serving is not before

    def _load_latest(self, registry: Registry, running: Serving) -> tuple[Serving, str | None]:
        """Return what the registry has for the collection, or what runs and why it still does."""
        name = running.collection.info.name
        try:
            return serve_latest(running, registry, self._threads), None
        except Exception as exc:  # noqa: BLE001 - whatever the registry's storage raises, native serves
            if running.hook is not None:
                return running, f"The bundle that runs serves {name!r} on: {exc}"
            obstacle = f"bundle: {type(exc).__name__}"
            if running.obstacle != obstacle:
                running = replace(running, obstacle=obstacle)
            return running, f"No bundle serves {name!r}: {exc}"

    def _adopt(self, serving: Serving) -> None:
        """Let the searches to come use another state."""
        if serving is self._serving:
            return
        self._serving = serving
        # What goes wrong from now on is news; why there is no bundle is said where it is known.
        self._fallbacks.start_over(*([serving.obstacle or ""] if serving.hook is None else []))
        _log.info(
            "%r is searched with bundle %s.",
            serving.collection.info.name,
            None if serving.manifest is None else serving.manifest.version,
        )

    def _say(self, problem: str | None) -> None:
        """Log what a look around found wrong, once until it is another matter."""
        if problem is not None and problem != self._problem:
            _log.warning("%s", problem)
        self._problem = problem

    def _write(self, write: Callable[[Serving], None]) -> None:
        """Write until the generation written to is the one that serves."""
        for _ in range(_SWITCHES):
            serving = self._serving
            if serving.collection.current() is not serving.collection:
                if not self.refresh():
                    self._adopt(follow(serving))  # so that its own error shows
                serving = self._serving
            write(serving)
            if serving.collection.current() is serving.collection:
                return
        raise CollectionError(
            f"The collection behind {self.collection.info.name!r} was replaced {_SWITCHES} times "
            f"during one write; write again when it has come to rest."
        )

    def _check_count(self, k: int, collection: Collection) -> None:
        if k > self._count:
            self._count = collection.count()  # it may have grown since
            if k > self._count:
                raise InvalidInput(
                    f"k={k} is more than the {self._count} keys of {collection.info.name!r}; "
                    f"ask for at most that many."
                )

    def _plan(
        self, serving: Serving, queries: FloatArray, target: Target
    ) -> tuple[QueryPlan, str | None]:
        if serving.obstacle is not None or serving.hook is None:
            return NATIVE, self._fall_back(serving.obstacle or "no bundle", serving.hint)
        try:
            plan = serving.hook.plan(queries, target)
            check_plan(plan, queries)
        except InvalidInput:
            raise  # the caller's own argument
        except Exception as exc:  # noqa: BLE001 - whatever a model does, the native search answers
            return NATIVE, self._fall_back(f"model: {type(exc).__name__}", exc)
        return plan, None

    def _fall_back(self, reason: str, cause: object = None) -> str:
        return self._fallbacks.note(self.collection.info.name, reason, cause)


def _mode(plan: QueryPlan) -> str:
    if plan.cells is not None:
        return "route"
    return "native" if plan.rewritten is None else "rewrite"
