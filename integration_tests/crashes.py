"""A collection of some thousand keys on a server, laid out while things go wrong."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pymilvus

from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.cell_layout import LayoutSpec, Storage
from amips_plugins.collection import Id
from amips_plugins.vectors import FloatArray, IntArray

__all__ = [
    "COUNT",
    "DIM",
    "N_CELLS",
    "Build",
    "by_remainder",
    "in_two_cells",
    "make",
    "spec",
    "until_it_works",
]

COUNT = 1500
DIM = 8
N_CELLS = 4
ROOT = Path(__file__).parent.parent
_PATIENCE = 120.0


def vectors(count: int = COUNT) -> FloatArray:
    return np.random.default_rng(0).standard_normal((count, DIM)).astype(np.float32)


def make(client: Any) -> str:
    """Make a collection with an alias, and return the alias."""
    name = f"crash_{secrets.token_hex(3)}"
    schema = client.create_schema(auto_id=False)
    schema.add_field("key", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("v", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    index = client.prepare_index_params()
    index.add_index("v", index_type="FLAT", metric_type="IP")
    client.create_collection(name, schema=schema, index_params=index, num_shards=1)
    rows = [{"key": key, "v": vector} for key, vector in enumerate(vectors())]
    client.insert(name, rows)
    client.create_alias(name, f"{name}_live")
    return f"{name}_live"


def by_remainder(ids: Sequence[Id], _: FloatArray) -> IntArray:
    return np.asarray(ids, dtype=np.int64) % N_CELLS


def in_two_cells(ids: Sequence[Id], _: Any = None) -> IntArray:
    """Give every third key a second cell."""
    numbers = np.asarray(ids, dtype=np.int64)
    own = numbers % N_CELLS
    return np.stack([own, np.where(numbers % 3 == 0, (own + 1) % N_CELLS, own)], axis=1)


def spec(work: Path, storage: Storage = "partitions", *, shared: bool = False) -> LayoutSpec:
    assign = in_two_cells if shared else by_remainder
    return LayoutSpec("crash1", N_CELLS, assign, "v1", storage=storage, work=work, shared=shared)


def until_it_works(
    client: Any, alias: str, work: Path, *, shared: bool = False
) -> MilvusCollection:
    """Run the build until it ends well, as an operator does after a crash."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            live = MilvusCollection(client, alias)
            if live.layout() is not None and not live.layouts.status().unfinished:
                return live
            return live.layouts.build(spec(work, shared=shared))
        except pymilvus.MilvusException:  # noqa: PERF203 - an attempt takes seconds
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


class Build:
    """A build, or a backfill, in a process of its own that can be killed at any moment."""

    def __init__(
        self, uri: str, alias: str, work: Path, verb: str = "build", *, shared: bool = False
    ) -> None:
        given = [uri, alias, str(work), verb, "shared" if shared else "apart"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration_tests.crashes", *given],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
        )

    def kill_after(self, seconds: float) -> bool:
        """Kill it unless it ends before; return whether it was killed."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return True
        assert code == 0, f"the build ended with {code}"
        return False


if __name__ == "__main__":
    uri, alias, work, verb, kind = sys.argv[1:]
    shared = kind == "shared"
    client = pymilvus.MilvusClient(uri)
    live = MilvusCollection(client, alias)
    if verb == "backfill":
        live.layouts.backfill(in_two_cells if shared else by_remainder)
    else:
        live.layouts.build(spec(Path(work), shared=shared))
    client.close()
