"""Cells in Milvus: a new generation of the collection, and the alias that names the one to use.

A row of Milvus cannot change its partition and a collection gains no field, so cells take a copy:
``docs__g2`` of ``docs``, then ``docs__g3``. The copy is built under a name that nobody reads and
gets its own when it is complete; the alias moves last. Every step can be repeated, so a build that
was killed goes on when it is started again.

What was written to the source shortly before the switch is copied after it. Until that is done a
second alias, ``docs__g2__draining``, names the source, and our writers write there first: so the
source knows the last word on every key, and what is copied late overtakes nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amips_plugins.adapters.copies.row_changes import SourceBaseline
from amips_plugins.adapters.milvus.cells import (
    BUILDING,
    CELL_FIELD,
    SKETCH_FIELD,
    draining,
)
from amips_plugins.adapters.milvus.copying import TableReplica
from amips_plugins.adapters.milvus.generations import Generations
from amips_plugins.adapters.milvus.layout_plan import choose_storage, plan_copy
from amips_plugins.adapters.milvus.new_generation import finish_index, prepare_copy
from amips_plugins.adapters.milvus.opening import open_table
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.adapters.milvus.upkeep import audit, backfill
from amips_plugins.cell_layout import (
    AssignCells,
    BuildPlan,
    LayoutAudit,
    LayoutSpec,
    LayoutStatus,
    check_name,
)
from amips_plugins.collection import Id
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.progress import Progress, no_progress

if TYPE_CHECKING:
    from pymilvus import MilvusClient

    from amips_plugins.adapters.milvus.collection import MilvusCollection

__all__ = ["MilvusLayouts"]

_GRACE_SECONDS = 5.0  # what a reader may be behind, and a write on its way when the alias moved
_ENOUGH = 100  # ids that show that some are missing


@dataclass(frozen=True)
class MilvusLayouts:
    """The cells of a Milvus collection."""

    collection: MilvusCollection

    @property
    def _generations(self) -> Generations:
        return Generations(self._client, self.collection.table())

    @property
    def _client(self) -> MilvusClient:
        return self.collection.client

    def plan(self, spec: LayoutSpec) -> BuildPlan:
        """Check whether the cells can be built and say what that would do; change nothing.

        Reads every id once: the copy would not keep two rows of one id. Where the cells are there
        already no step is left to do.
        """
        check_name(spec)
        table, alias = self.collection.table(), self._alias(spec)
        if self._undrained(spec):
            step = f"copy to {table.name!r} what was written to its source before the switch"
            return BuildPlan((step,), table.count_keys(), 0, 0.0)
        self._check_drained()
        finished = self._finished(spec)
        if finished is not None:
            note = f"{finished!r} has these cells already: nothing is left to copy"
            new = alias is not None and self._target_of(alias) is None
            steps = (f"point alias {alias!r} at {finished!r}",) if new else ()
            return BuildPlan(steps, table.count_keys(), 0, 0.0, (note,))
        complete = self._generations.complete(spec.layout)
        if complete is not None and self._base_of(spec, complete) is None:
            raise InvalidInput(
                f"{complete!r} has these cells already, and may have been written to since it was "
                f"copied; {self._way_out(complete)}."
            )
        self._check_fields(alias, self._field_names(spec))
        target = complete or self._generations.next_name(choose_storage(spec))
        return plan_copy(table, spec, alias, target, self.collection.path)

    def _finished(self, spec: LayoutSpec) -> str | None:
        """Return the collection that has these cells and is the one to search, if there is one."""
        table, alias = self.collection.table(), self._alias(spec)
        served = None if alias is None else self._target_of(alias)
        if self.collection.layout() == spec.layout:
            return table.name if served in (None, table.name) else None
        complete = self._generations.complete(spec.layout)
        if complete is None or not self._generations.copied_from_this(complete):
            return None
        if served is None and self._base_of(spec, complete) is None:
            return complete
        return complete if served == complete else None

    def _way_out(self, complete: str) -> str:
        """Say what to do about a complete copy that does not serve, as the end of a sentence."""
        table = self.collection.table()
        if complete in self.status().older:
            return f"{table.name!r} can roll back to it: amips layout rollback"
        if self.collection.alias is not None and complete in self.status().unfinished:
            return "nothing needs it: drop it, amips layout drop-old, and lay out again"
        return f"if it is what is to be searched, point the alias at {complete!r}"

    def _field_names(self, spec: LayoutSpec) -> set[str]:
        """Return the names of the fields that the copy would have."""
        table = self.collection.table()
        names = {field["name"] for field in table.raw["fields"]} - {CELL_FIELD, SKETCH_FIELD}
        return names | ({CELL_FIELD, SKETCH_FIELD} if choose_storage(spec) == "field" else set())

    def _check_fields(self, alias: str | None, names: set[str]) -> None:
        """Refuse to put other fields behind an alias: clients keep the fields they have seen.

        A client that writes by the old ones has ended the process of a Milvus 2.3.5 server.
        """
        served = None if alias is None else self._target_of(alias)
        if served is None or self.collection.table().is_lite:
            return
        there = {field["name"] for field in self._client.describe_collection(served)["fields"]}
        if there != names:
            raise InvalidInput(
                f"Clients of the alias {alias!r} remember the fields of {served!r}, and writing by "
                f"those to a collection that has a cell field besides can end a Milvus server; "
                f"use the storage 'partitions', or an alias that nobody has used yet."
            )

    def build(self, spec: LayoutSpec, progress: Progress = no_progress) -> MilvusCollection:
        """Copy the collection into its cells, switch to the copy, and return that.

        Ids, fields, properties and the other fields' indexes are kept. Readers of the alias never
        fail and never see two generations; a write that returned is in the copy, whether it went
        to the alias or, before the switch, to the collection's own name.
        """
        if self._undrained(spec):
            table = self.collection.table()
            return self._drain(self._open(draining(table.name)), table, spec, progress)
        self.plan(spec)
        finished, alias = self._finished(spec), self._alias(spec)
        if finished is not None:
            if alias is not None:
                self._point(alias, finished)
            own = finished == self.collection.table().name
            return self.collection if own else self.collection.sibling(finished)
        source = self.collection.table()
        served = None if alias is None else self._target_of(alias)
        name = self._generations.complete(spec.layout)
        if name is not None:
            copy = TableReplica(source, self._open(name), spec.assign, progress)
            copy.unite()
            base = copy.catch_up(self._base_of(spec, name))
            _save_base(spec, name, base)
        else:
            building, new = prepare_copy(spec, source)
            copy = TableReplica(source, self._open(building), spec.assign, progress)
            try:
                if not new:
                    copy.unite()
                base = copy.catch_up(new=new)
                copy.unite()  # of what a client wrote twice, having lost the answer
            except CollectionError:
                if new:  # a row that can never be copied
                    self._client.drop_collection(building)
                raise
            finish_index(copy.target)
            base = copy.verify(base)
            name = self._generations.next_name(choose_storage(spec))
            _save_base(spec, name, base)
            self._client.rename_collection(building, name)
            self._client.load_collection(name)  # Milvus Lite forgets that it was loaded
        if alias is None:
            return self.collection.sibling(name)
        now = self._target_of(alias)
        if now not in (served, name):
            raise CollectionError(
                f"Somebody has moved the alias {alias!r} from {served!r} to {now!r} meanwhile; "
                f"nothing was switched. Lay out what it names now, or drop the copy {name!r}."
            )
        self._switch(alias, source, name)
        return self._drain(source, self._open(name), spec, progress, base)

    def _undrained(self, spec: LayoutSpec) -> bool:
        """Whether this is the target of a switch after which a build died."""
        table = self.collection.table()
        ours = table.cells is not None and table.cells.layout == spec.layout
        return ours and self._client.has_collection(draining(table.name))

    def _check_drained(self) -> None:
        """Refuse to go on from a switch that is not finished: keys would stay behind."""
        table = self.collection.table()
        left = self._target_of(draining(table.name))
        if left is None:
            return
        back = self._generations.number(left) > self._generations.number(table.name)
        again = "roll back again" if back else "lay out with the same bundle again"
        raise InvalidInput(
            f"What was written to {left!r} shortly before the switch to {table.name!r} is not "
            f"copied yet; {again} first, which finishes that."
        )

    def _base_of(self, spec: LayoutSpec, name: str) -> SourceBaseline | None:
        """Return what is known of a complete copy, if it is one of this source."""
        return _load_base(spec, name) if self._generations.copied_from_this(name) else None

    def _switch(self, alias: str, source: Table, target: str) -> None:
        """Move the alias; from before until it is drained the source hears of every write."""
        self._point(draining(target), source.name)
        self._point(alias, target)

    def _drain(
        self,
        source: Table,
        target: Table,
        spec: LayoutSpec,
        progress: Progress,
        base: SourceBaseline | None = None,
    ) -> MilvusCollection:
        copy = TableReplica(source, target, spec.assign, progress)
        if base is None:  # the run before has died; without its notes only what is missing comes
            copy.unite()
            base = _load_base(spec, target.name) or SourceBaseline()
        self._finish_switch(copy, base)
        if spec.work is not None:
            _base_file(spec.work, target.name).unlink(missing_ok=True)
        return self.collection.sibling(target.name)

    def _finish_switch(self, copy: TableReplica, base: SourceBaseline) -> None:
        time.sleep(0.0 if copy.source.is_lite else _GRACE_SECONDS)
        copy.drain(base)
        self._client.drop_alias(draining(copy.target.name))

    def status(self) -> LayoutStatus:
        """Say which cells there are."""
        table = self.collection.table()
        cells = None if BUILDING in table.name else table.cells
        number, numbers = self._generations.number(table.name), self._generations.numbers()
        older = sorted((n for n, at in numbers.items() if at < number), key=numbers.__getitem__)
        unfinished = self._generations.unfinished()
        if self.collection.alias is not None:  # else nobody knows which of them serves
            newer = sorted((n for n, at in numbers.items() if at > number), key=numbers.__getitem__)
            unfinished += [n for n in newer if not self._client.list_aliases(n)["aliases"]]
        if self._client.has_collection(draining(table.name)):
            unfinished.append(draining(table.name))
        return LayoutStatus(
            name=table.name,
            layout=None if cells is None else cells.layout,
            version=(cells.version or None) if cells else None,
            storage=None if cells is None else cells.storage,
            count=table.count_keys(),
            overflow=table.overflow(),
            unfinished=tuple(unfinished),
            older=tuple(older),
        )

    def roll_back(self, *, anyway: bool = False) -> MilvusCollection:
        """Serve the collection that these cells were copied from, and return it.

        Opened by an alias, the alias moves back, and before and after that what was written to
        this generation is copied to the old one (there it is overflow). Opened by its own name
        nothing moves: the caller goes on with what is returned. Ids that the old one holds and
        this generation has not were deleted since, or written to it by its own name; with
        ``anyway`` they are deleted.
        """
        table = self.collection.table()
        left = self._target_of(draining(table.name))
        if left is not None and self._generations.number(left) > self._generations.number(
            table.name
        ):
            # A rollback to here died behind the switch.
            self._finish_switch(
                TableReplica(self._open(left), table, None, no_progress), SourceBaseline()
            )
            return self.collection.sibling(table.name)
        self._check_drained()
        older = self.status().older
        source = table.cells.source if table.cells is not None else ""
        earlier = source if source in older else (older[-1] if older else None)
        if earlier is None:
            raise InvalidInput(f"{table.name!r} has no earlier generation to roll back to.")
        if self.collection.alias is None:
            return self.collection.sibling(earlier)
        copy = TableReplica(table, self._open(earlier), None, no_progress)
        fields = {field["name"] for field in copy.target.raw["fields"]}
        self._check_fields(self.collection.alias, fields)
        lost = [] if anyway else _missing(copy.target, table)
        if lost:
            raise CollectionError(
                f"{earlier!r} holds {len(lost)} ids that {table.name!r} has not, such as "
                f"{lost[0]!r}: they were deleted since, or written to it by its own name; "
                f"to delete them and roll back: --anyway."
            )
        base = copy.catch_up()
        self._switch(self.collection.alias, table, earlier)
        self._finish_switch(copy, base)
        return self.collection.sibling(earlier)

    def drop_old(self, *, anyway: bool = False) -> list[str]:
        """Drop the older generations and what unfinished builds left; return their names.

        Refused where an alias still names one of them.
        """
        table, status = self.collection.table(), self.status()
        for name in status.older:
            aliases = self._client.list_aliases(name)["aliases"]
            if aliases:
                raise CollectionError(
                    f"{name!r} is still what the alias {aliases[0]!r} names; move that first."
                )
        left = [name for name in status.unfinished if name != draining(table.name)]
        dropped = [*status.older, *left]
        for name in () if anyway else dropped:
            lost = [] if BUILDING in name else _missing(self._open(name), table)
            if lost:
                raise CollectionError(
                    f"{name!r} holds {len(lost)} ids that {table.name!r} has not, such as "
                    f"{lost[0]!r}: they were deleted since, or written to it by its own name; "
                    f"to drop it all the same: --anyway."
                )
        for name in dropped:
            self._client.drop_collection(name)
        return dropped

    def backfill(
        self, assign: AssignCells, progress: Progress = no_progress, *, verify: bool = False
    ) -> int:
        """Give the overflow its cells, and return how many keys got one.

        A copy of such a key in another cell, left by a writer who knew nothing of cells, goes.
        Milvus writes whole rows only: another client's write of the same key between reading and
        writing it here, some milliseconds, would be undone.
        """
        return backfill(self._laid_out(), assign, progress, verify=verify)

    def audit(self, sample: int, assign: AssignCells | None = None) -> LayoutAudit:
        """Look whether keys lie in the cells of their own vectors; change nothing."""
        return audit(self._laid_out(), sample, assign)

    def _laid_out(self) -> Table:
        table = self.collection.table()
        if table.cells is None:
            raise InvalidInput(f"{table.name!r} has no cells; lay it out first.")
        return table

    def _alias(self, spec: LayoutSpec) -> str | None:
        return spec.alias if spec.alias is not None else self.collection.alias

    def _open(self, name: str) -> Table:
        return open_table(self._client, name, self.collection.info.field)

    def _target_of(self, alias: str) -> str | None:
        """Return the collection that an alias names, or None."""
        if alias in self._client.list_collections() or not self._client.has_collection(alias):
            return None
        return str(self._client.describe_collection(alias)["collection_name"])

    def _point(self, alias: str, name: str) -> None:
        client = self._client
        if self._target_of(alias) is None:
            client.create_alias(name, alias)
        else:
            client.alter_alias(name, alias)


def _base_file(work: Path, target: str) -> Path:
    return work / f"{target}.base"


def _save_base(spec: LayoutSpec, target: str, base: SourceBaseline) -> None:
    if spec.work is not None:
        base.save(_base_file(spec.work, target))


def _load_base(spec: LayoutSpec, target: str) -> SourceBaseline | None:
    return None if spec.work is None else SourceBaseline.load(_base_file(spec.work, target))


def _missing(old: Table, table: Table) -> list[Id]:
    """Return some ids of the old generation that the new one has not."""
    missing: list[Id] = []
    for page in old.pages(16_384, 1 << 30, [old.key]):
        ids = [row[old.key] for row in page]
        there = table.which(ids)
        missing += [key for key in ids if key not in there]
        if len(missing) >= _ENOUGH:
            break
    return missing
