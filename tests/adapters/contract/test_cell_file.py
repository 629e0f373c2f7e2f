from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.cell_file.collection import CellFileCollection
from amips_plugins.adapters.cell_file.file_format import Bits
from amips_plugins.adapters.cell_file.key_ids import ids_as_array
from amips_plugins.adapters.cell_file.writing import CellFileSpec, Keys, write_cell_file
from amips_plugins.collection import Collection, CollectionKey, Id
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions
from amips_plugins.vectors import FloatArray, Metric
from tests.adapters.contract.collection_contract import COUNT, CollectionContract, cells_of


class TestCellFile(CollectionContract):
    shares_keys = False
    sketches = False
    bits: Bits = 8
    folder: Path

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.numbers = itertools.count()

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        path = self.folder / f"{next(self.numbers)}.cells"
        origin = CollectionKey(database="qdrant", name="docs", field="")
        spec = CellFileSpec(collection=origin, metric=metric, dim=keys.shape[1], bits=self.bits)
        fields = [{"group": group, "other": row} for row, group in enumerate(groups)]
        source = Keys(
            ids_as_array(ids), lambda rows: keys[rows], lambda rows: [fields[row] for row in rows]
        )
        write_cell_file(path, spec, source, np.full(len(keys), -1))
        return CellFileCollection(path)

    def group_filter(self, group: str) -> Callable[[Id, Mapping[str, Any]], bool]:
        return lambda _, fields: fields.get("group") == group

    def add_without_cell(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        assert isinstance(collection, CellFileCollection)
        CellFileCollection(collection._location).upsert(ids, keys)

    def rewrite_in_place(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        pytest.skip("A key's vector and its cell are written together.")

    def in_groups(self, collection: Collection, *groups: str) -> Collection:
        with pytest.raises(InvalidInput, match="name no field"):
            collection.partitioned(Partitions("group", groups or ("g0",)))
        pytest.skip("A cell file has the cells that it was written with, and no others.")

    def test_new_cells_roll_back_to_the_old_ones(self) -> None:
        first = self.fresh_laid_out()
        second = first.layouts.build(self.spec("def456", 2))
        assert (second.layout(), second.count()) == ("def456", COUNT)
        with pytest.raises(InvalidInput, match="nothing is kept to roll back to"):
            second.layouts.roll_back()
        # One that was open goes on with the file that it has.
        assert first.layout() == "abc123"
        assert first.current().layout() == "def456"

    def test_what_is_old_can_be_dropped(self) -> None:
        second = self.fresh_laid_out().layouts.build(
            replace(self.spec("def456", 2), assign=lambda ids, _: cells_of(ids) % 2)
        )
        assert second.layouts.drop_old() == []
        assert second.count() == COUNT


class TestCellFileOf4Bits(TestCellFile):
    bits = 4

    def test_native_search_equals_the_reference(self) -> None:
        pytest.skip("Codes of 4 bits keep next to all, and not all, of the best.")
