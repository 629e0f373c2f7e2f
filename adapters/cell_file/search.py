"""Searching a cell file: whole cells of codes, then the vectors of the best candidates.

Two rounds of reads, those of a round under way together, however many cells and queries.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from amips_plugins.adapters.cell_file.codes import LEAST, Scorer, oversampling_of
from amips_plugins.adapters.cell_file.key_ids import plain_id
from amips_plugins.adapters.cell_file.opened import OpenCellFile, Rows
from amips_plugins.adapters.cell_file.recent import Recent
from amips_plugins.collection import Hit, Id, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import BoolArray, FloatArray, IntArray, Metric, native_scores, normalise

__all__ = ["CellFileSearch", "check_params", "deadline_of"]

_CODES = 32 << 20  # bytes of codes read in one round
_QUERIES = 256  # answered together
_MOST_OVERSAMPLING = 1_000
_MORE = 4  # times as many candidates where a filter has left too few


@dataclass
class _Candidates:
    """The best rows of one query by their codes, and as many as are to be kept; None for all."""

    most: int | None
    rows: list[IntArray] = field(default_factory=list)
    scores: list[FloatArray] = field(default_factory=list)
    held: int = 0

    def add(self, rows: IntArray, scores: FloatArray) -> None:
        if self.most is not None and len(rows) > self.most:
            best = np.argpartition(-scores, self.most - 1)[: self.most]
            rows, scores = rows[best], scores[best]
        self.rows.append(rows)
        self.scores.append(scores)
        self.held += len(rows)
        if self.most is not None and self.held > 16 * self.most:
            self.rows, self.scores = [self.best()], [self._best_scores]
            self.held = len(self.rows[0])

    def best(self) -> IntArray:
        """Return the rows, the best first."""
        if not self.rows:
            return np.empty(0, dtype=np.int64)
        rows, scores = np.concatenate(self.rows), np.concatenate(self.scores)
        order = np.argsort(-scores, kind="stable")[: self.most]
        self._best_scores = scores[order]
        return rows[order]


class CellFileSearch:
    """One request and plan on one state of a file."""

    def __init__(
        self, file: OpenCellFile, recent: Recent, request: SearchRequest, deadline: float | None
    ) -> None:
        self._file, self._recent, self._request = file, recent, request
        self._metric = file.header.metric
        self._deadline = deadline
        self._more, self._once = 1.0, False

    def by_codes(
        self,
        plan: QueryPlan,
        everything: BoolArray,
        *,
        oversampling: float = 1.0,
        once: bool = False,
    ) -> list[list[Hit]]:
        """Search the runs of the plan's cells, or all of them.

        With so many times the usual candidates; ``once`` where nobody will read the same again.
        """
        self._more, self._once = oversampling, once
        answers: list[list[Hit]] = []
        for low in range(0, len(self._request.queries), _QUERIES):
            rows = range(low, min(low + _QUERIES, len(self._request.queries)))
            answers += self._some(rows, plan, everything)
        return answers

    def _some(self, rows: range, plan: QueryPlan, everything: BoolArray) -> list[list[Hit]]:
        request = self._request
        ranking = request.queries if plan.rewritten is None else plan.rewritten
        keep = request.k if plan.rewritten is None else max(plan.rescore, request.k)
        wanted = self._wanted(keep)
        most = wanted if request.filter is None else None
        found = [_Candidates(most) for _ in rows]
        whole = [plan.cells is None or bool(everything[row : row + 1].any()) for row in rows]
        asking = self._asking(rows, plan, whole)
        placed = ranking[rows.start : rows.stop]
        if self._metric is Metric.COSINE:
            placed = normalise(placed)
        scorer = Scorer(self._file.coder, placed)
        for numbers in self._portions(sorted(asking)):
            blocks = self._file.read_runs(numbers, self._deadline, once=self._once)
            for number, block in zip(numbers, blocks, strict=True):
                self._score(number, block, asking[number], scorer, found)
        ordered = [one.best() for one in found]
        picked = self._picked(ordered, wanted)
        answers = []
        for place, row in enumerate(rows):
            chosen = None if whole[place] or plan.cells is None else plan.cells[row]
            hits = self._hits(ranking[row], picked[place], chosen, keep)
            if plan.rewritten is not None:
                hits = self._scored_again(hits, request.queries[row])
            answers.append([self._shown(hit) for hit in hits[: request.k]])
        return answers

    def _wanted(self, keep: int) -> int:
        """Return how many candidates are scored by their vectors for so many hits."""
        header, params = self._file.header, self._request.params or {}
        told = params.get("oversampling")
        if told is not None:
            return math.ceil(self._more * keep * float(told))
        usual = math.ceil(self._more * keep * oversampling_of(header.bits, header.dim))
        return max(usual, LEAST[header.bits])

    def _asking(self, rows: range, plan: QueryPlan, whole: list[bool]) -> dict[int, list[int]]:
        """Return for each run that has keys which of the rows want it."""
        header, starts = self._file.header, self._file.starts
        loose = range(header.n_cells, header.n_runs)
        asking: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            if whole[place] or plan.cells is None:
                numbers: Sequence[int] = range(header.n_runs)
            else:
                cells = {cell for cell in plan.cells[row].tolist() if 0 <= cell < header.n_cells}
                numbers = [*cells, *loose]
            for number in numbers:
                if starts[number + 1] > starts[number]:
                    asking.setdefault(number, []).append(place)
        return asking

    def _portions(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Cut runs into portions that are read at once."""
        codes, portion, size = self._file.runs["code"], list[int](), 0
        for number in numbers:
            length = int(codes[number + 1] - codes[number])
            if portion and size + length > _CODES:
                yield portion
                portion, size = [], 0
            portion.append(number)
            size += length
        if portion:
            yield portion

    def _score(
        self,
        number: int,
        block: bytes,
        asked: list[int],
        scorer: Scorer,
        found: list[_Candidates],
    ) -> None:
        low, high = self._file.starts[number : number + 2].tolist()
        scores = scorer.score(block, high - low, asked)
        rows = np.arange(low, high, dtype=np.int64)
        hidden = self._recent.hidden
        first, last = np.searchsorted(hidden, [low, high]) if len(hidden) else (0, 0)
        if last > first:
            kept = np.ones(high - low, dtype=np.bool_)
            kept[hidden[first:last] - low] = False
            rows, scores = rows[kept], scores[:, kept]
        for place, own in zip(asked, scores, strict=True):
            found[place].add(rows, own)

    def _picked(self, ordered: list[IntArray], wanted: int) -> list[_Picked]:
        """Read the best candidates of all queries together; more where a filter leaves too few."""
        picked = [_Picked() for _ in ordered]
        ends = [0] * len(ordered)
        more = [wanted] * len(ordered)
        while True:
            due = [
                place
                for place, rows in enumerate(ordered)
                if ends[place] < len(rows) and len(picked[place].rows) < wanted
            ]
            if not due:
                return picked
            parts = {place: ordered[place][ends[place] :][: more[place]] for place in due}
            numbers = np.unique(np.concatenate(list(parts.values())))
            read = self._file.read_rows(numbers, self._deadline)
            fields = self._fields(read)
            for place, part in parts.items():
                at = np.searchsorted(numbers, part)
                picked[place].add(read, fields, at[self._passes(read, fields, at)])
                ends[place] += len(part)
                more[place] *= _MORE

    def _fields(self, rows: Rows) -> list[Mapping[str, Any]] | None:
        if self._request.filter is None and not self._request.fields:
            return None
        return self._file.read_fields(rows, self._deadline)

    def _passes(
        self, rows: Rows, fields: list[Mapping[str, Any]] | None, at: IntArray
    ) -> BoolArray:
        chosen = self._request.filter
        if chosen is None or fields is None:
            return np.ones(len(at), dtype=np.bool_)
        return np.array(
            [bool(chosen(plain_id(rows["id"][one]), fields[one])) for one in at.tolist()],
            dtype=np.bool_,
        )

    def _hits(
        self, query: FloatArray, picked: _Picked, chosen: IntArray | None, k: int
    ) -> list[_Found]:
        """Score what was read, and what is recent, exactly; return the best."""
        recent, request = self._recent, self._request
        mine = np.ones(len(recent.ids), dtype=np.bool_)
        if chosen is not None:
            mine = np.isin(recent.cells, [-1, *chosen.tolist()])
        places = np.flatnonzero(mine).tolist()
        if request.filter is not None:
            places = [one for one in places if request.filter(recent.ids[one], recent.fields(one))]
        found = [
            *picked.found(),
            *(_Found(recent.ids[one], recent.vectors[one], recent.fields(one)) for one in places),
        ]
        return best_of(found, query, self._metric, k)

    def _scored_again(self, found: list[_Found], query: FloatArray) -> list[_Found]:
        return best_of(found, query, self._metric, len(found))

    def _shown(self, found: _Found) -> Hit:
        wanted = self._request.fields
        fields = {name: found.fields[name] for name in wanted if name in found.fields}
        return Hit(found.id, found.score, fields)

    def exactly(self) -> list[list[Hit]]:
        """Compare with every key: reads all vectors."""
        queries, k, hidden = self._request.queries, self._request.k, self._recent.hidden
        best: list[list[_Found]] = [[] for _ in queries]
        for low, rows in self._file.every_row(self._deadline):
            kept = ~np.isin(np.arange(low, low + len(rows)), hidden)
            fields = self._fields(rows)
            at = np.flatnonzero(kept)
            at = at[self._passes(rows, fields, at)]
            vectors = rows["vector"][at]
            for place, query in enumerate(queries):
                scores = native_scores(query, vectors, self._metric)
                ranked = scores if self._metric is Metric.L2 else -scores
                some = at[np.argsort(ranked, kind="stable")[:k]]
                picked = _Picked()
                picked.add(rows, fields, some)
                best[place] = best_of([*best[place], *picked.found()], query, self._metric, k)
        answers = []
        for query, found in zip(queries, best, strict=True):
            beside = self._hits(query, _Picked(), None, k)
            hits = best_of([*found, *beside], query, self._metric, k)
            answers.append([self._shown(hit) for hit in hits])
        return answers


@dataclass
class _Found:
    """A key that was read."""

    id: Id
    vector: FloatArray
    fields: Mapping[str, Any]
    score: float = 0.0


class _Picked:
    """The candidates of one query that were read."""

    def __init__(self) -> None:
        self.rows: list[tuple[Rows, int, Mapping[str, Any]]] = []

    def add(self, rows: Rows, fields: list[Mapping[str, Any]] | None, at: IntArray) -> None:
        self.rows += [(rows, one, {} if fields is None else fields[one]) for one in at.tolist()]

    def found(self) -> list[_Found]:
        return [
            _Found(plain_id(rows["id"][one]), rows["vector"][one], fields)
            for rows, one, fields in self.rows
        ]


def best_of(found: list[_Found], query: FloatArray, metric: Metric, k: int) -> list[_Found]:
    """Score keys as a database does, and return the best."""
    if not found:
        return []
    scores = native_scores(query, np.stack([one.vector for one in found]), metric)
    ranked = scores if metric is Metric.L2 else -scores
    for one, score in zip(found, scores.tolist(), strict=True):
        one.score = score
    return [found[place] for place in np.argsort(ranked, kind="stable")[:k].tolist()]


def check_params(params: Mapping[str, Any] | None) -> None:
    """Refuse an oversampling that cannot be; other parameters are left aside."""
    times = (params or {}).get("oversampling")
    number = isinstance(times, Real) and not isinstance(times, bool)
    if times is not None and not (number and 1.0 <= float(times) <= _MOST_OVERSAMPLING):
        raise InvalidInput(
            f"oversampling={times!r} cannot be; pass how many candidates to score by their vectors "
            f"for every hit: 1 to {_MOST_OVERSAMPLING}."
        )


def deadline_of(timeout: float | None) -> float | None:
    """Return when a search of so many seconds has to end."""
    return None if timeout is None else time.monotonic() + timeout
