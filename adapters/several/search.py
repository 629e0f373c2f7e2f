"""Searching several collections together, blocking and awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from amips_plugins.adapters.several.fan_out import Answers, FanOut, Refused
from amips_plugins.background.abandonable import run_abandonable
from amips_plugins.collection import (
    Collection,
    CollectionInfo,
    Failure,
    Hit,
    Incomplete,
    SearchRequest,
    check_layout,
)
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions
from amips_plugins.plan import NATIVE, QueryPlan

__all__ = ["SearchedTogether"]

_Rows = dict[str, list[int]]


class SearchedTogether:
    """The part of ``SeveralCollections`` that searches."""

    _members: dict[str, Collection]
    _info: CollectionInfo
    _given: Partitions | None
    _strict: bool
    _timeout: float
    _fan_out: FanOut

    def layout(self) -> str | None:
        """Identify the collections that a router knows; None where they are no cells."""
        return None if self._given is None else self._given.layout

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search the collections that a plan names, and those it does not know; natively all.

        ``filter`` and ``params`` of the request go to each of them; a mapping of their names says
        what each gets. Their own models are not asked.

        Raises
        ------
        InvalidInput
            The plan's cells are of another layout, or the request asks for something that cannot
            be merged, such as an offset.
        Exception
            Whatever the databases raise, if all collections fail, or one and this is ``strict``.
        """
        rows = self._rows(request, plan)
        jobs = {name: partial(self._ask, name, request, own) for name, own in rows.items()}
        answers = self._fan_out.ask(jobs, self._seconds(request))
        return self._merged(request, rows, answers, planned=plan.cells is not None)

    async def search_async(
        self, client: Any, request: SearchRequest, plan: QueryPlan = NATIVE
    ) -> list[list[Hit]]:
        """Search as ``search`` does, in tasks.

        ``client`` maps names of collections to asynchronous clients; what has none is searched on
        a thread. None for threads alone.
        """
        clients = _clients(client, self._members)
        rows = self._rows(request, plan)
        jobs: dict[str, Callable[[float], Awaitable[Any]]] = {}
        for name, own in rows.items():
            if name in clients:
                jobs[name] = partial(self._ask_async, name, clients[name], request, own)
            else:
                ask = partial(self._ask, name, request, own)
                jobs[name] = partial(_on_thread, ask)
        answers = await self._fan_out.ask_async(jobs, self._seconds(request))
        return self._merged(request, rows, answers, planned=plan.cells is not None)

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Search all of them exactly, as far as each can."""
        request = replace(request, params=None)
        rows = self._rows(request, NATIVE)
        jobs = {
            name: partial(self._ask, name, request, own, exact=True) for name, own in rows.items()
        }
        answers = self._fan_out.ask(jobs, self._seconds(request))
        return self._merged(request, rows, answers, planned=False)

    def _seconds(self, request: SearchRequest) -> float:
        return self._timeout if request.timeout is None else request.timeout

    def _rows(self, request: SearchRequest, plan: QueryPlan) -> _Rows:
        """Say which queries each collection is asked."""
        check_layout(plan, self.layout(), self._info.name)
        everything = list(range(len(request.queries)))
        if plan.cells is None or self._given is None:
            return dict.fromkeys(self._members, everything)
        known = self._given.values
        rows: _Rows = {name: everything for name in self._members if name not in known}
        for row, cells in enumerate(plan.cells.tolist()):
            for value in self._given.chosen(cells):
                if value in self._members:
                    rows.setdefault(str(value), []).append(row)
        return rows

    def _own_request(
        self, name: str, request: SearchRequest, rows: list[int], seconds: float
    ) -> SearchRequest:
        own = replace(
            request,
            queries=request.queries[rows],
            filter=self._for_one(name, request.filter),
            params=self._for_one(name, request.params),
            timeout=seconds,
        )
        if own.params:
            reason = self._members[name].unroutable(own, rewritten=False)
            if own.params.get("offset"):
                reason = "params: offset"
            if reason is not None and reason.startswith("params"):
                raise InvalidInput(
                    f"What several collections answer cannot be merged under {reason}; leave it "
                    f"out, or search {name!r} by itself."
                )
        return own

    def _for_one(self, name: str, given: Any) -> Any:
        """Return what one collection gets of a filter, or of parameters."""
        named = isinstance(given, Mapping) and given and given.keys() <= self._members.keys()
        return given.get(name) if named else given

    def _ask(
        self,
        name: str,
        request: SearchRequest,
        rows: list[int],
        seconds: float,
        *,
        exact: bool = False,
    ) -> list[list[Hit]]:
        one = self._members[name]
        try:
            own = self._own_request(name, request, rows, seconds)
            return one.exact(own) if exact else one.search(own)
        except Exception as exc:
            raise self._told(name, exc) from exc

    async def _ask_async(
        self, name: str, client: Any, request: SearchRequest, rows: list[int], seconds: float
    ) -> list[list[Hit]]:
        one: Any = self._members[name]
        try:
            own = self._own_request(name, request, rows, seconds)
            found: list[list[Hit]] = await one.search_async(client, own)
        except Exception as exc:
            raise self._told(name, exc) from exc
        return found

    def _told(self, name: str, exc: Exception) -> Exception:
        """Tell the caller's own fault from the collection's."""
        own = isinstance(exc, InvalidInput) or self._members[name].failure(exc) is Failure.REQUEST
        return Refused(exc) if own else exc

    def _merged(
        self, request: SearchRequest, rows: _Rows, answers: Answers, *, planned: bool
    ) -> list[list[Hit]]:
        """Merge what each query was answered by score; what is missing stands with its hits."""
        found, errors = answers
        if errors and (self._strict or not (found or planned)):
            raise next(iter(errors.values()))
        by_row: list[list[Hit]] = [[] for _ in request.queries]
        for name in self._members:
            for row, hits in zip(rows.get(name, ()), found.get(name, ()), strict=name in found):
                by_row[row] += [Hit(hit.id, hit.score, hit.fields, name) for hit in hits]
        sign = -1.0 if self._info.metric.larger_is_better else 1.0
        merged = [sorted(hits, key=lambda hit: sign * hit.score)[: request.k] for hits in by_row]
        if not errors:
            return merged
        missing: list[list[str]] = [[] for _ in request.queries]
        for name in errors:
            for row in rows[name]:
                missing[row].append(name)
        self._fan_out.count(name for names in missing for name in names)
        return [
            Incomplete(hits, tuple(names)) if names else hits
            for hits, names in zip(merged, missing, strict=True)
        ]


async def _on_thread(ask: Callable[[float], Any], seconds: float) -> Any:
    return await asyncio.wrap_future(run_abandonable(partial(ask, seconds)))


def _clients(client: Any, members: Iterable[str]) -> Mapping[str, Any]:
    """Return the asynchronous client of each collection that has one."""
    if client is None:
        return {}
    names = list(members)
    if not isinstance(client, Mapping) or not set(client) <= set(names):
        raise InvalidInput(
            f"Several collections take a mapping of their names to asynchronous clients, of "
            f"{', '.join(names)}; one that is left out is searched on a thread."
        )
    return client
