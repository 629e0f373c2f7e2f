"""A copy of a Milvus collection in cells: how its rows are read, written and compared."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.copies.replica import Replica, found_again, found_enough
from amips_plugins.adapters.copies.row_changes import Row, SourceBaseline, digest
from amips_plugins.adapters.milvus.cell_index import index_search
from amips_plugins.adapters.milvus.failures import failure_of
from amips_plugins.adapters.milvus.opening import describe_index, widest_params
from amips_plugins.adapters.milvus.shared_rows import mend_torn
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.adapters.milvus.writing import write_rows
from amips_plugins.cell_layout import AssignCells, check_assigned
from amips_plugins.collection import Failure, Id
from amips_plugins.errors import CollectionError
from amips_plugins.progress import Progress
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["TableReplica"]

_READ_BYTES = 8 << 20  # of vectors; the other fields of the rows come on top
_BATCH = 2_000  # rows
_SAMPLE = 32  # keys whose neighbours are compared


class TableReplica(Replica):
    """A copy of a table, in the cells that ``assign`` gives; without it new rows are overflow."""

    def __init__(
        self, source: Table, target: Table, assign: AssignCells | None, progress: Progress
    ) -> None:
        super().__init__(progress)
        self.source = source
        self.target = target
        self.assign = assign

    @property
    def names(self) -> tuple[str, str]:
        """The names of both tables."""
        return self.source.name, self.target.name

    def count(self) -> int:
        """Count the source."""
        return self.source.count_keys()

    def rows(self, *, of_copy: bool = False) -> Iterator[Row]:
        """Read a table in the order of the ids."""
        table = self.target if of_copy else self.source
        for page in table.pages(16_384, _READ_BYTES, ["*"]):
            for stored in page:
                values = table.bare(stored)
                yield Row(values[table.key], digest(values), values)

    def digests(self, ids: Sequence[Id]) -> Mapping[Id, int]:
        """Read rows of the copy."""
        found = self.target.read(ids)
        return {key: digest(self.target.bare(row)) for key, row in found.items()}

    def write(self, rows: Sequence[Row], *, new: bool) -> None:
        """Put rows into their cells."""
        written = [dict(row.values) for row in rows]
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

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete rows of the copy."""
        self.target.delete(ids)

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
        chosen = check_assigned(chosen, len(ids), cells.n_cells, shared=cells.shared)
        found = np.full((len(rows), *chosen.shape[1:]), OVERFLOW)
        found[keys] = chosen
        return found

    def unite(self) -> None:
        """Make one of what a run that died has left of keys in several cells."""
        if self.target.shares_keys:
            mend_torn(self.target, self.cells_of)

    def problem(self, base: SourceBaseline) -> str | None:
        """Compare numbers of rows, and the neighbours of a sample."""
        if self.target.count_keys() > len(base.ids):
            self._mend()
        more = self.target.count_keys() - len(base.ids)
        if more:
            return f"The copy {self.target.name!r} has {more:+} keys against {self.source.name!r}"
        # What Milvus counts and never hands out, such as the largest of its ids, is in no copy.
        # What others wrote since then was not meant to be read: so the count before the reading.
        hidden = self.counted - len(base.ids)
        if hidden > 0 and (hidden := hidden - self.source.count_twins()) > 0:
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
        found = float(np.mean([found_again(*pair) for pair in zip(before, after, strict=True)]))
        # One that others upserted beside its row in a cell the source finds twice, the copy once.
        moved = self.changed + max(0, self.source.count_keys() - len(base.ids))
        if found_enough(found, moved, len(base.ids)):
            return None
        return (
            f"The copy {self.target.name!r} finds only {found:.0%} of what {self.source.name!r} "
            f"finds for {len(queries)} sampled keys"
        )

    def _mend(self) -> None:
        """Make one row of those that a client inserted twice, having lost the answer."""
        for page in self.target.pages(_BATCH, _READ_BYTES, ["*"]):
            ids = [row[self.target.key] for row in page]
            once = self.target.all_of(self.target.where_ids(ids), self.target.no_copies)
            if self.target.count(once) > len(ids):
                rows = [self.target.bare(row) for row in page]
                write_rows(self.target, rows, self.cells_of(rows))


def _nearest(table: Table, queries: FloatArray, k: int) -> list[dict[Id, float]]:
    """Return ids and scores of which larger is better, whatever lists they lie in."""
    index = describe_index(table)
    lists = index_search(index).kind == "lists"
    widest = widest_params(index, k, is_lite=table.is_lite) if lists else {}
    answers = table.client.search(
        table.name,
        data=queries,
        anns_field=table.info.field,
        limit=k,
        output_fields=[table.key],
        search_params={"metric_type": table.info.metric.name, "params": widest},
        consistency_level="Strong",
    )
    if any(len({hit["entity"][table.key] for hit in hits}) < len(hits) for hits in answers):
        raise CollectionError(
            f"This Milvus finds a key of {table.name!r} once for each of its rows, which keys in "
            f"more than one cell do not bear; lay out a bundle that was trained with --spill 0."
        )
    sign = 1.0 if table.info.metric.larger_is_better else -1.0
    return [
        {hit["entity"][table.key]: sign * float(hit["distance"]) for hit in hits}
        for hits in answers
    ]
