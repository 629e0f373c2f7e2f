"""What takes training is named, with its reason."""

from __future__ import annotations

import pytest

from amips_plugins.collection.construction import Construction
from amips_plugins.tune.untried import CELLS_ROW, KEYNET_ROW, untried
from amips_plugins.tuning import Build, Knob

IVF = Build("IVF_FLAT", Knob("nprobe", (1, 2)), 4.0)


def reasons(database: str, built: Construction, *builds: Build) -> dict[str, str]:
    return {row.search: row.dropped or "" for row in untried(database, built, builds)}


@pytest.mark.parametrize("graphs", [1, 7])
def test_few_graphs_rule_cells_with_graphs_out(graphs: int) -> None:
    found = reasons("qdrant", Construction((), "graph", graphs=graphs))
    assert list(found) == [CELLS_ROW]
    assert f"every search asks {graphs} segment" in found[CELLS_ROW]


def test_many_graphs_have_them_proposed_with_the_commands_and_what_was_measured() -> None:
    proposed = reasons("qdrant", Construction((), "graph", graphs=8))[CELLS_ROW]
    assert "asks 8 segments" in proposed
    assert "amips train --index hnsw --spill 0.27" in proposed
    assert "2.6 / 3.2 / 2.5" in proposed
    milvus = reasons("milvus", Construction((), "graph", graphs=64))[CELLS_ROW]
    assert "amips train --index hnsw, amips" in milvus  # Milvus stores no key twice


def test_keynet_is_ruled_out_where_there_is_an_ivf_index_or_may_be_one() -> None:
    assert list(reasons("milvus", Construction((), "lists", 128))) == [KEYNET_ROW]
    assert list(reasons("milvus", Construction((), "scan"), IVF)) == [KEYNET_ROW]
    assert not reasons("qdrant", Construction(()))
