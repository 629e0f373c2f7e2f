from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.export.executors import LocalExecutor
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.export.train import TrainOptions, train
from amips_plugins.vectors import normalise
from tests.support.training_data import clustered_keys, narrow_queries


def slow_first(shared: float, task: int) -> int:
    time.sleep(shared if task == 0 else 0.0)
    assert torch.get_num_threads() == 1
    return task * task


def failing(shared: int, task: int) -> int:
    if task == shared:
        raise ValueError(f"task {task}")
    return task


@pytest.fixture
def threads() -> Iterator[int]:
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(1)


def test_results_come_in_the_order_of_the_tasks(threads: int) -> None:
    executor = LocalExecutor(dim=8)
    assert executor.workers == threads
    assert list(executor.map(slow_first, 0.1, range(20))) == [task**2 for task in range(20)]
    assert torch.get_num_threads() == threads  # of the caller


def test_few_tasks_are_taken_before_their_results_are_wanted(threads: int) -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(100):
            taken.append(task)
            yield task

    before = threading.active_count()
    results = LocalExecutor(dim=8).map(slow_first, 0.0, tasks())
    assert next(results) == 0
    assert len(taken) <= threads + 1
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= before


@pytest.mark.usefixtures("threads")
def test_what_a_task_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="task 5"):
        list(LocalExecutor(dim=8).map(failing, 5, range(20)))


def test_memory_decides_how_many_work(threads: int) -> None:
    assert LocalExecutor(2.0, 384).workers == threads
    assert LocalExecutor(0.7, 384).workers == 2
    assert LocalExecutor(0.1, 4_096).workers == 1


@pytest.mark.parametrize("model", ["supportnet", "keynet"])
@pytest.mark.slow
def test_as_many_threads_as_there_are_give_the_same_bits(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amips_plugins.export.keys._SHARD", 200)
    monkeypatch.setattr("amips_plugins.export.keys.BLOCK", 100)
    collection = MemoryCollection(normalise(clustered_keys(1_000, 16)))
    snapshot, queries = take_snapshot(collection, tmp_path / "snap"), narrow_queries(300, 16)
    options = TrainOptions(model=model, n_cells=8, epochs=1, k=5, recall=0.9, spill=0.2)  # type: ignore[arg-type]
    if model == "keynet":
        options = TrainOptions(model="keynet", n_cells=8, epochs=1, k=5, recall=0.9)
    alone = train(snapshot, queries, tmp_path / "alone", options)
    torch.set_num_threads(3)
    try:
        together = train(snapshot, queries, tmp_path / "together", options)
    finally:
        torch.set_num_threads(1)
    assert alone.manifest.files == together.manifest.files
