"""Cells in a copy of a Qdrant collection: a new generation, and the alias that names it.

Writing cells in place moves every point out of its segment, and the server builds the graph again
while others search. So where there is a graph, the points are copied into a collection beside it,
each with its cell from the first write on, the copy catches up with what others write meanwhile,
and the alias moves in one step. Every step can be repeated: a build that was killed goes on when
it is started again.

What was written to the source shortly before the switch is copied after it. Until that is done
the copy's metadata say so, and our writers write to the source first: so it knows the last word on
every key, and what is copied late overtakes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from amips_plugins.adapters.copies.row_changes import SourceBaseline
from amips_plugins.adapters.qdrant.cell_shards import notes_on_sharing
from amips_plugins.adapters.qdrant.cells import LayoutRecord, LayoutState
from amips_plugins.adapters.qdrant.copying import PointReplica
from amips_plugins.adapters.qdrant.failures import translated_errors
from amips_plugins.adapters.qdrant.generations import Generation, Generations
from amips_plugins.adapters.qdrant.new_generation import (
    build_graph,
    copied_indexes,
    create_copy,
)
from amips_plugins.adapters.qdrant.new_shards import (
    SHARD_BYTES,
    create_shard_keys,
    fans_out,
    no_shards,
    planned_record,
)
from amips_plugins.cell_layout import AssignCells, BuildPlan, LayoutSpec, check_name
from amips_plugins.collection import CollectionInfo, Id
from amips_plugins.errors import CollectionError, InvalidInput, require
from amips_plugins.progress import Progress, no_progress

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models
else:
    models = require("qdrant_client.models", "qdrant")

__all__ = ["CopiedLayouts"]

GRACE = 5.0  # seconds that a write may be on its way when the alias has moved
_PER_POINT = 200  # bytes beside the vectors: ids, cell, sketch, links of the graph
_CPU_PER_POINT = 0.9e-3  # seconds of the server's, measured (docs/operations.md)
_SAMPLE = 100  # ids that show that some are missing
_PAGE = 10_000  # ids


_OTHER_WRITERS = (
    "From the switch on the server refuses writes that name no shard key: let writers go through "
    "the router or a routed client, or write with shard_key_selector={!r} and delete the id in all "
    "other shard keys."
)


@dataclass(frozen=True)
class CopiedLayouts:
    """Copies of a collection that was opened by a name, or an alias, on a server."""

    client: QdrantClient
    opened: str
    info: CollectionInfo
    server: str

    @property
    def generations(self) -> Generations:
        """The generations of this family."""
        return Generations(self.client, self.info.family or self.opened)

    @property
    def alias(self) -> str | None:
        """The alias by which the collection was opened, if it is one."""
        return self.opened if self.opened in self.generations.aliases() else None

    @property
    def here(self) -> str:
        """The collection's own name."""
        return self.generations.aliases().get(self.opened, self.opened)

    def no_shards(self) -> str | None:
        """Say why a copy can have no shard keys, or None."""
        return no_shards(self.client)

    def fans_out(self) -> bool:
        """Tell whether a search of what serves asks many shards."""
        return fans_out(self.client, self.here)

    def plan(self, spec: LayoutSpec, count: int) -> BuildPlan:
        """Say what a copy would do; change nothing."""
        check_name(spec)
        alias, source = self._alias_for(spec), self.here
        self._check(spec, source)
        name = self._begun(spec.layout, source) or self.generations.next(source, spec.layout)[0]
        record = planned_record(spec)
        shards = len(record.shard_keys)
        keyed = f", with {shards} shard keys for its cells, and one for the overflow" * bool(shards)
        place = (
            "in the shard key of its cell"
            if shards
            else (f"with one of {spec.n_cells} cells in its payload")
        )
        steps = (
            f"create {name!r} as {source!r} is, with an integer index of {record.key!r}{keyed}",
            f"copy {count} points into it, each {place}, "
            "until nothing is missing that others wrote meanwhile",
            "wait until its graph is built, and compare neighbours",
            f"point the alias {alias!r} at {name!r}; {source!r} is kept to roll back to",
        )
        n_bytes = count * (6 * self.info.dim + _PER_POINT)  # vectors, and room to optimise them
        n_bytes += (shards + 1) * SHARD_BYTES if shards else 0
        return BuildPlan(
            steps,
            count,
            n_bytes,
            count * _CPU_PER_POINT,
            (
                f"The server stores everything twice until drop-old, about {n_bytes >> 20} MB "
                f"more, and needs some {count * _CPU_PER_POINT:.0f} seconds of CPU, little more "
                "than the first load. Searches of others are served by the collection as it is.",
                *([_OTHER_WRITERS.format(record.overflow_shard)] if shards else []),
                *notes_on_sharing(spec.n_cells, shards, graphs=spec.graphs),
            ),
        )

    def build(self, spec: LayoutSpec, progress: Progress) -> None:
        """Copy the collection, and have the alias name the copy."""
        with translated_errors(self.server, "write to"):
            self._build(spec, progress)

    def _build(self, spec: LayoutSpec, progress: Progress) -> None:
        check_name(spec)
        alias, source, generations = self._alias_for(spec), self.here, self.generations
        own = generations.read(source)
        if own.draining and own.layout == spec.layout:
            self._drain(own.source, source, spec.assign, progress, self._noted(spec, source))
            self._forget(spec, source)
            return
        self._check(spec, source)
        record = planned_record(spec)
        name = self._begun(spec.layout, source)
        new = name is None
        if name is None:
            name, generation = generations.next(source, spec.layout)
            create_copy(self.client, source, name, generation, record, self.info)
        else:
            generation = generations.read(name)
            record = LayoutState.read(self._metadata(name), self.info).serving or record
        create_shard_keys(self.client, name, record)
        copied_indexes(self.client, source, name, record)
        copy = self._replica((source, name), record, spec.assign, progress)
        # Nobody else writes to the copy yet: from here on only the source has to be read.
        base = copy.run(None, new=new)
        build_graph(self.client, source, name, progress, record=record, dim=self.info.dim)
        self._limit(source, name)
        base = copy.verify(copy.catch_up(base))
        if spec.work is not None:
            base.save(_base_file(spec.work, name))
        self._switch(generation, alias, source, name)
        self._drain(source, name, spec.assign, progress, base)
        self._forget(spec, name)

    def _limit(self, source: str, name: str) -> None:
        """Set the source's strict mode, which would have slowed the copying, in the copy."""
        strict = self.client.get_collection(source).config.strict_mode_config
        if strict is not None:
            from qdrant_client import models

            config = models.StrictModeConfig(**strict.model_dump())
            self.client.update_collection(name, strict_mode_config=config)

    def _switch(self, generation: Generation, alias: str, source: str, name: str) -> None:
        now = self.generations.aliases().get(alias)
        if now not in (None, source, name):
            raise CollectionError(
                f"Somebody has moved the alias {alias!r} from {source!r} to {now!r} meanwhile; "
                f"nothing was switched. Lay out what it names now, or drop the copy {name!r}."
            )
        self._note(name, replace(generation, source=source, complete=True, draining=True))
        self.generations.point(alias, name)

    def _drain(
        self,
        source: str,
        name: str,
        assign: AssignCells | None,
        progress: Progress,
        base: SourceBaseline,
    ) -> None:
        time.sleep(GRACE)
        here = LayoutState.read(self._metadata(name), self.info).serving
        self._replica((source, name), here, assign, progress).drain(base)
        self._note(name, replace(self.generations.read(name), draining=False))

    def _noted(self, spec: LayoutSpec, name: str) -> SourceBaseline:
        """Return what a run that died had copied; unknown, only what is missing comes."""
        found = None if spec.work is None else SourceBaseline.load(_base_file(spec.work, name))
        return found or SourceBaseline()

    def _forget(self, spec: LayoutSpec, name: str) -> None:
        if spec.work is not None:
            _base_file(spec.work, name).unlink(missing_ok=True)

    def roll_back(self, *, anyway: bool) -> str | None:
        """Serve the generation before; return its name, or None where there is none."""
        with translated_errors(self.server, "write to"):
            return self._roll_back(anyway=anyway)

    def _roll_back(self, *, anyway: bool) -> str | None:
        name, generations = self.here, self.generations
        own = generations.read(name)
        if own.draining and self._is_back(own):  # a rollback to here died behind the switch
            self._drain(own.source, name, None, no_progress, SourceBaseline())
            return name
        earlier = self.earlier()
        if earlier is None:
            return None
        if own.draining:
            raise InvalidInput(
                f"What was written to {own.source!r} shortly before the switch to {name!r} is not "
                "copied yet; lay out with the same bundle again first, which finishes that."
            )
        alias = self.alias
        if alias is None:
            raise InvalidInput(
                f"{name!r} was opened by its own name; open it by its alias, which rolls back, or "
                f"search {earlier!r}."
            )
        lost = [] if anyway else self.missing(earlier, name)
        if lost:
            raise CollectionError(
                f"{earlier!r} holds {len(lost)} ids that {name!r} has not, such as {lost[0]!r}: "
                "they were deleted since, or written to it by its own name; to delete them and "
                "roll back: --anyway."
            )
        state = LayoutState.read(self._metadata(earlier), self.info)
        copy = self._replica((name, earlier), state.serving, None, no_progress)
        base = copy.catch_up(copy.run(None))
        back = replace(generations.read(earlier), source=name, draining=True)
        self._note(earlier, back)
        generations.point(alias, earlier)
        self._drain(name, earlier, None, no_progress, base)
        return earlier

    def _is_back(self, own: Generation) -> bool:
        return self.generations.read(own.source).number > own.number

    def earlier(self) -> str | None:
        """Return the generation that what serves was copied from, if it is still there."""
        here = self.generations.read(self.here)
        older = self.older()
        return here.source if here.source in older else (older[-1] if older else None)

    def older(self) -> list[str]:
        """Return the complete generations before the one that serves, oldest first."""
        number = self.generations.read(self.here).number
        found = self.generations.all().items()
        return [name for name, one in found if one.complete and one.number < number]

    def unfinished(self) -> list[str]:
        """Return what builds that were interrupted left, and copies that nobody serves."""
        here, aliased = self.here, set(self.generations.aliases().values())
        number = self.generations.read(here).number
        return [
            name
            for name, one in self.generations.all().items()
            if name != here
            and name not in aliased
            and (not one.complete or (self.alias is not None and one.number > number))
        ]

    def drop_old(self, *, anyway: bool) -> list[str]:
        """Drop the older generations and what is unfinished; return their names."""
        here, aliases = self.here, self.generations.aliases()
        complete = {name: one.complete for name, one in self.generations.all().items()}
        dropped = [*self.older(), *self.unfinished()]
        with translated_errors(self.server, "write to"):
            for name in dropped:
                named = sorted(alias for alias, target in aliases.items() if target == name)
                if named:
                    raise CollectionError(
                        f"{name!r} is still what the alias {named[0]!r} names; move that first."
                    )
                lost = [] if anyway or not complete[name] else self.missing(name, here)
                if lost:
                    raise CollectionError(
                        f"{name!r} holds {len(lost)} ids that {here!r} has not, such as "
                        f"{lost[0]!r}: they were deleted since, or written to it by its own name; "
                        f"to drop it all the same: --anyway."
                    )
            for name in dropped:
                self.client.delete_collection(name)
        return dropped

    def missing(self, old: str, name: str) -> list[Id]:
        """Return some ids that one generation has and another has not."""
        missing: list[Id] = []
        for ids in self._ids(old):
            there = {one.id for one in self.client.retrieve(name, list(ids), with_payload=False)}
            missing += [one for one in ids if one not in there]
            if len(missing) >= _SAMPLE:
                break
        return missing

    def _ids(self, name: str) -> Iterator[Sequence[Id]]:
        offset = None
        while True:
            records, offset = self.client.scroll(
                name, limit=_PAGE, offset=offset, with_payload=False
            )
            yield [record.id for record in records]  # type: ignore[misc]  # int or str
            if offset is None:
                return

    def begun(self, layout: str) -> bool:
        """Tell whether a copy with these cells waits to be finished."""
        source = self.here
        own = self.generations.read(source)
        return self._begun(layout, source) is not None or (own.draining and own.layout == layout)

    def _begun(self, layout: str, source: str) -> str | None:
        """Return the copy with these cells that nobody serves, if there is one."""
        served = set(self.generations.aliases().values())
        found = [
            name
            for name, one in self.generations.all().items()
            if (one.layout, one.source) == (layout, source) and name not in served
        ]
        return found[-1] if found else None

    def _alias_for(self, spec: LayoutSpec) -> str:
        alias = spec.alias if spec.alias is not None else self.alias
        if alias is None:
            raise InvalidInput(
                f"A copy takes the place of {self.opened!r} by an alias, and {self.opened!r} is a "
                "collection's own name: open it by an alias, or name one for the copy (--alias), "
                "which applications then search."
            )
        return alias

    def _check(self, spec: LayoutSpec, source: str) -> None:
        state = LayoutState.read(self._metadata(source), self.info)
        if state.serving is not None and state.serving.layout == spec.layout:
            raise InvalidInput(f"{source!r} has the cells {spec.layout!r} already.")
        own = self.generations.read(source)
        if own.draining:
            raise InvalidInput(
                f"What was written to {own.source!r} shortly before the switch to {source!r} is "
                "not copied yet; run the command that was interrupted again first."
            )
        if spec.alias is not None:
            taken = {found.name for found in self.client.get_collections().collections}
            if spec.alias in taken:
                raise InvalidInput(
                    f"{spec.alias!r} is a collection, and cannot be an alias; name another one."
                )

    def _replica(
        self,
        names: tuple[str, str],
        record: LayoutRecord | None,
        assign: AssignCells | None,
        progress: Progress,
    ) -> PointReplica:
        """Compare points without what lies beside this vector in either collection."""
        records = [] if record is None else [record]
        served = []
        for name in names:
            state = LayoutState.read(self._metadata(name), self.info)
            records += [one for one in (state.serving, *state.kept().values()) if one is not None]
            served.append(state.serving)
        forgotten = [key for one in records for key in one.keys]
        return PointReplica(
            self.client, names, self.info, record, forgotten, served, assign, progress
        )

    def _metadata(self, name: str) -> dict[str, object]:
        return dict(self.client.get_collection(name).config.metadata or {})

    def _note(self, name: str, generation: Generation) -> None:
        self.client.update_collection(name, metadata=generation.entry())


def _base_file(work: Path, target: str) -> Path:
    return work / f"{target}.base"
