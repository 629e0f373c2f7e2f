"""The rows of the benchmark, and the file that keeps them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from amips_plugins.errors import InvalidInput
from amips_plugins.files import replace_file
from benchmarks.protocols import Protocol

__all__ = ["Row", "Store", "Unit"]


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured in one go.

    Attributes
    ----------
    data
        Name of the data.
    protocol
        ``unseen``, ``noise-split`` or ``zipf``.
    cells
        Number of cells, or of the lists of the index.
    layout
        How the keys are cut: ``native`` or ``query-aware``.
    router
        What chooses the cells.
    seed
        Of the split, the cells and the training.
    """

    data: str
    protocol: Protocol
    cells: int
    layout: str
    router: str
    seed: int


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What one router costs to reach one recall.

    Attributes
    ----------
    data, protocol, cells, layout, router, seed
        See ``Unit``.
    k, recall
        The target: recall@k.
    probes
        Mean number of cells searched.
    scanned, model, total
        Shares of the keys: in the cells searched; the router's multiplications expressed in keys;
        their sum. None where the target is out of reach.
    low, high
        95 % bootstrap interval of ``total`` over the test queries.
    calibrated
        Recall on the test queries at the threshold (or number of probes) that reaches ``recall``
        on the calibration queries.
    promised, promised_total
        Recall and total on the test queries at the threshold that is *guaranteed*, with 95 %
        confidence, to reach ``recall``; None where nothing can be promised.
    seconds
        What training and measuring the router took, without cutting the cells.
    """

    data: str
    protocol: Protocol
    cells: int
    layout: str
    router: str
    seed: int
    k: int
    recall: float
    model: float
    probes: float | None = None
    scanned: float | None = None
    total: float | None = None
    low: float | None = None
    high: float | None = None
    calibrated: float | None = None
    promised: float | None = None
    promised_total: float | None = None
    seconds: float | None = None

    @property
    def unit(self) -> Unit:
        """What the row is a part of."""
        return Unit(
            data=self.data,
            protocol=self.protocol,
            cells=self.cells,
            layout=self.layout,
            router=self.router,
            seed=self.seed,
        )


class Store:
    """Rows, in a JSON file if there is one; a unit that is there need not be measured again.

    Parameters
    ----------
    path
        A JSON array of rows; None keeps them in memory.

    Raises
    ------
    InvalidInput
        The file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: list[Row] = []
        if path is not None and path.exists():
            try:
                self.rows = msgspec.json.decode(path.read_bytes(), type=list[Row])
            except msgspec.MsgspecError as exc:
                raise InvalidInput(f"{path} holds no rows of this benchmark ({exc}).") from exc
        self._units = {row.unit for row in self.rows}

    def __contains__(self, unit: Unit) -> bool:
        return unit in self._units

    def add(self, rows: Iterable[Row]) -> None:
        """Keep the rows of a unit, on disk before this returns."""
        self.rows += rows
        self._units = {row.unit for row in self.rows}
        if self._path is not None:
            lines = b",\n".join(msgspec.json.encode(row) for row in self.rows)
            replace_file(self._path, b"[\n" + lines + b"\n]\n")
