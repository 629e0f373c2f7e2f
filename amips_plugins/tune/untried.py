"""What might be cheaper and is not measured by ``amips tune``, since it takes training: and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from amips_plugins.collection.construction import Construction
from amips_plugins.tune.rows import Row, dropped
from amips_plugins.tuning import Build

__all__ = ["CELLS_ROW", "KEYNET_ROW", "untried"]

CELLS_ROW, KEYNET_ROW = "cells with graphs", "KeyNet"

_MANY_GRAPHS = 8  # below, a search of all of them is cheap enough (docs/performance.md)
_WORTH_IT = (
    "not tried, for it takes training. Every search asks {graphs} segments here; where it was "
    "measured with 64 graphs, cells with a graph each took 2.6 / 3.2 / 2.5 times less CPU than "
    "all of them at recall@10 .90 / .95 / .98, and with 32 2.7 / 2.2 / 1.3 times "
    "(docs/performance.md). Fewer and larger ones are the cheaper cure where they can be had; else "
    "amips snapshot, amips train --index hnsw{spill}, amips publish, amips layout, and amips "
    "evaluate compares"
)
_FEW = (
    "not tried: every search asks {graphs} {name}, and below 8 cells with a graph each "
    "lose to asking all (docs/performance.md)"
)
_KEYNET = (
    "not tried: it takes training, and lost by far where it was measured in front of an IVF index: "
    "10.4 against 2.3 CPU seconds for 1,000 searches, half of that since candidates are scored by "
    "their ids (docs/performance.md); amips train --model keynet, and amips evaluate compares"
)


def untried(database: str, built: Construction, builds: Sequence[Build]) -> Iterator[Row]:
    """Give a row and a reason for each way that a model would search this collection."""
    if built.graphs is not None:
        text = _FEW if built.graphs < _MANY_GRAPHS else _WORTH_IT
        name = "segment" if built.graphs == 1 else "segments"
        spill = "" if database == "milvus" else " --spill 0.27"  # which Milvus' partitions refuse
        text = text.format(graphs=built.graphs, name=name, spill=spill)
        yield dropped(CELLS_ROW, text)
    if built.native == "lists" or any(build.knob.name == "nprobe" for build in builds):
        yield dropped(KEYNET_ROW, _KEYNET)
