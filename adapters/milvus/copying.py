"""Making one Milvus collection equal to another, and keeping it so."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.milvus.failures import failure_of
from amips_plugins.adapters.milvus.row_changes import (
    Change,
    Row,
    SourceBaseline,
    diff_rows,
    digest,
)
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.adapters.milvus.writing import write_rows
from amips_plugins.cell_layout import AssignCells, check_assigned
from amips_plugins.collection import Failure, Id
from amips_plugins.errors import CollectionError
from amips_plugins.progress import Progress, Step
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["Replica"]

_READ_BYTES = 8 << 20  # of vectors; the other fields of the rows come on top
_BATCH = 2_000  # rows
_MAX_PASSES = 20
_FEW = 0.0005  # changes in a pass, as a share of the keys, that the next step may leave
_SAMPLE = 32  # keys whose neighbours are compared
_FOUND = 0.9  # share of the neighbours that the copy has to find again; others may be writing


@dataclass
class Replica:
    """A copy of a table, in the cells that ``assign`` gives; without it new rows are overflow.

    ``counted`` is what the source counted before the last pass, and ``changed`` the keys that the
    pass wrote or deleted.
    """

    source: Table
    target: Table
    assign: AssignCells | None
    progress: Progress
    counted: int = 0
    changed: int = 0

    def catch_up(self, base: SourceBaseline | None = None, *, new: bool = False) -> SourceBaseline:
        """Pass until the copy is equal but for what others write during one pass."""
        before = float("inf")
        for number in range(_MAX_PASSES):
            now = self.run(base, new=new and number == 0)
            if self.changed <= _FEW * len(now.ids) or self.changed > before / 2:
                break
            base, before = None if base is None else now, self.changed
        return now

    def drain(self, base: SourceBaseline) -> None:
        """After the switch: bring over what was written to the source until there is no more."""
        for _ in range(_MAX_PASSES):
            base = self.run(base)
            if not self.changed:
                return
        raise CollectionError(
            f"{self.source.name!r} is still being written to after the switch to "
            f"{self.target.name!r}: some writer names it and not the alias; stop that writer and "
            f"run the same command again."
        )

    def run(self, base: SourceBaseline | None, *, new: bool = False) -> SourceBaseline:
        """Make one pass, and return the source as it read it.

        Of a ``new`` copy nothing is read, and rows are inserted; ``base`` is as for ``diff_rows``.
        """
        seen = SourceBaseline()
        title = "copy" if new else "compare"
        self.counted = self.source.count()
        with self.progress(title, self.counted, 0, "keys") as step:
            rows = self._watched(_rows(self.source), seen, step)
            there: Iterator[Row] = iter(()) if new else _rows(self.target)
            self.changed = 0
            for found in _batches(diff_rows(rows, there, base), _BATCH):
                some = found if base is None else self._still_due(found)
                self._apply(some, new=new)
                self.changed += len(some)
        return seen

    @staticmethod
    def _watched(rows: Iterator[Row], seen: SourceBaseline, step: Step) -> Iterator[Row]:
        for row in rows:
            seen.add(row)
            step.advance(1)
            yield row

    def _still_due(self, found: Sequence[Change]) -> list[Change]:
        """Leave out what others have written to the copy since it was read."""
        now = self.target.read([change.id for change in found])
        return [
            change
            for change in found
            if (change.old.digest if change.old else None)
            == (digest(self.target.bare(now[change.id])) if change.id in now else None)
        ]

    def _apply(self, some: Sequence[Change], *, new: bool) -> None:
        written = [dict(change.row.values) for change in some if change.row is not None]
        if written:
            cells = self.cells_of(written)
            try:
                write_rows(self.target, written, cells, new=new)
            except Exception as exc:
                if not new or failure_of(exc) is not Failure.OTHER:
                    raise
                raise CollectionError(
                    f"Milvus does not take back a row of {self.source.name!r} as it hands it out "
                    f"({getattr(exc, 'message', exc)}); change such rows and lay out again."
                ) from exc
        self.target.delete([change.id for change in some if change.row is None])

    def cells_of(self, rows: Sequence[dict[str, Any]]) -> IntArray | None:
        """Give rows their cells in the target."""
        cells = self.target.cells
        if cells is None:
            return None
        found = np.full(len(rows), OVERFLOW)
        if self.assign is None:
            return found
        keys = [place for place, row in enumerate(rows) if self.target.has_vector(row)]
        if len(keys) < len(rows) and not self.target.vector_is_nullable:
            raise CollectionError(
                f"{self.source.name!r} hands out rows without a vector, which its copy cannot "
                f"take; delete these rows and lay out again."
            )
        some = [rows[place] for place in keys]
        ids = [row[self.target.key] for row in some]
        chosen = self.assign(ids, self.target.vectors(some))
        found[keys] = check_assigned(chosen, len(ids), cells.n_cells)
        return found

    def verify(self, base: SourceBaseline) -> SourceBaseline:
        """Refuse a copy that finds neighbours worse than its source, or has other keys.

        Others may write to the source while the two are compared, so a copy that fails catches up
        and is compared again before it is given up. Returns the base of the last pass.
        """
        for _ in range(_MAX_PASSES):
            problem = self._problem(base)
            if problem is None:
                return base
            base = self.run(None)
            if not self.changed:
                break
        raise CollectionError(f"{problem}; nothing was switched.")

    def _mend(self) -> None:
        """Make one row of those that a client inserted twice, having lost the answer."""
        for page in self.target.pages(_BATCH, _READ_BYTES, ["*"]):
            ids = [row[self.target.key] for row in page]
            if self.target.count(self.target.where_ids(ids)) > len(ids):
                rows = [self.target.bare(row) for row in page]
                write_rows(self.target, rows, self.cells_of(rows))

    def _problem(self, base: SourceBaseline) -> str | None:
        if self.target.count() > len(base.ids):
            self._mend()
        more = self.target.count() - len(base.ids)
        if more:
            return f"The copy {self.target.name!r} has {more:+} keys against {self.source.name!r}"
        # What Milvus counts and never hands out, such as the largest of its ids, is in no copy. What
        # others wrote since the count was not meant to be read: so the count before the reading.
        hidden = self.counted - len(base.ids)
        if hidden > 0 and (hidden := hidden - self.source.count_copies()) > 0:
            return (
                f"{self.source.name!r} counts {hidden} rows more than it hands out, which a copy "
                f"would lack (such as the id {2**63 - 1}); delete these"
            )
        rng = random.Random(0)  # noqa: S311 - a sample, no secret
        ids = rng.sample(base.ids, min(_SAMPLE, len(base.ids)))
        rows = self.source.read(ids, [self.source.key, self.source.info.field])
        rows = {key: row for key, row in rows.items() if self.source.has_vector(row)}
        if not rows:
            return None
        queries = self.source.vectors(list(rows.values()))
        k = min(10, len(base.ids))
        before, after = _nearest(self.source, queries, k), _nearest(self.target, queries, k)
        found = np.mean([_found_again(*pair) for pair in zip(before, after, strict=True)])
        # Two neighbours are lost for a key that moved since: where it was and where it went. So for
        # one that others upserted beside its row in a cell: the source finds both, the copy one.
        moved = self.changed + max(0, self.source.count() - len(base.ids))
        if found >= _FOUND - 2 * moved / max(1, len(base.ids)):
            return None
        return (
            f"The copy {self.target.name!r} finds only {found:.0%} of what {self.source.name!r} "
            f"finds for {len(queries)} sampled keys"
        )


def _rows(table: Table) -> Iterator[Row]:
    for page in table.pages(16_384, _READ_BYTES, ["*"]):
        for stored in page:
            values = table.bare(stored)
            yield Row(values[table.key], digest(values), values)


def _batches(found: Iterator[Change], size: int) -> Iterator[list[Change]]:
    some: list[Change] = []
    for change in found:
        some.append(change)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def _nearest(table: Table, queries: FloatArray, k: int) -> list[dict[Id, float]]:
    """Return ids and scores of which larger is better."""
    answers = table.client.search(
        table.name,
        data=queries,
        anns_field=table.info.field,
        limit=k,
        output_fields=[table.key],
        search_params={"metric_type": table.info.metric.name},
        consistency_level="Strong",
    )
    sign = 1.0 if table.info.metric.larger_is_better else -1.0
    return [
        {hit["entity"][table.key]: sign * float(hit["distance"]) for hit in hits}
        for hits in answers
    ]


def _found_again(before: dict[Id, float], after: dict[Id, float]) -> float:
    """Return the share of hits that are found again, or give way to better ones."""
    if not before:
        return 1.0
    worst = min(after.values(), default=float("-inf")) if len(after) >= len(before) else -np.inf
    slack = 1e-4 * max(abs(score) for score in before.values())
    return float(np.mean([key in after or score <= worst + slack for key, score in before.items()]))
