"""A small cluster of Ray on this machine: the same bits as here, whatever is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.errors import InvalidInput, MissingExtra, SnapshotError, TrainingError
from amips_plugins.export.executors import opened
from amips_plugins.export.ray_executor import RayExecutor, ray_executor
from amips_plugins.export.snapshot import Snapshot, take_snapshot
from amips_plugins.export.train import TrainOptions, train
from amips_plugins.vectors import normalise
from benchmarks.stages import descendants
from tests.support.training_data import clustered_keys, narrow_queries

pytestmark = pytest.mark.slow

QUERIES = narrow_queries(300, 16)
OPTIONS = TrainOptions(model="linear", n_cells=8, epochs=1, k=5, recall=0.9, spill=0.2)
RAY = "ray is not installed: pip install 'amips-plugins[scale]'"
Work = Callable[[Any, Any], Any]

LOOPBACK = {  # as the kernel writes them
    "0100007F",
    "0000000000000000FFFF00000100007F",
    "00000000000000000000000001000000",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayExecutor]:
    pytest.importorskip("ray", reason=RAY)
    with ray_executor(None, 0.7, 384) as executor:
        yield executor


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are cut in this process; workers have the sizes that they were imported with."""
    monkeypatch.setattr("amips_plugins.export.keys._SHARD", 200)


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return take_snapshot(MemoryCollection(normalise(clustered_keys(1_000, 16))), tmp_path / "snap")


def open_files(process: int) -> Iterator[str]:
    """What a process has open, as far as it still lives."""
    with suppress(OSError):
        for link in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                yield str(link.readlink())


def square(shared: int, task: int) -> int:
    return shared * task**2


def refusing(shared: str, task: int) -> int:
    raise SnapshotError(f"{shared} {task} is damaged; take it again.")


def killed_once(shared: tuple[Path, Work, Any], task: Any) -> Any:
    """Die at the first task of every kind of work, and do it when asked again."""
    folder, work, inner = shared
    try:
        (folder / work.__name__).touch(exist_ok=False)
    except FileExistsError:
        return work(inner, task)
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def killed_always(shared: int, task: int) -> int:  # noqa: ARG001
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_results_come_in_the_order_of_the_tasks(cluster: RayExecutor) -> None:
    assert list(cluster.map(square, 3, range(40))) == [3 * task**2 for task in range(40)]


def test_nothing_listens_but_on_loopback(cluster: RayExecutor) -> None:
    list(cluster.map(square, 3, range(4)))
    sockets = {link for process in descendants(os.getpid()) for link in open_files(process)}
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening.add(fields[1].partition(":")[0])
    assert listening
    assert listening <= LOOPBACK


def test_what_a_task_raises_is_raised_as_it_is(cluster: RayExecutor) -> None:
    for _ in range(20):  # others end at the same time, and this process goes on all the same
        with pytest.raises(SnapshotError) as refusal:
            list(cluster.map(refusing, "keys-3.parquet", range(3)))
        assert str(refusal.value) == "keys-3.parquet 0 is damaged; take it again."


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.usefixtures("small_shards")
def test_a_training_whose_workers_are_killed_has_the_bits_of_one_that_is_let_alone(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = RayExecutor.map
    marks = tmp_path / "marks"
    marks.mkdir()

    def dying(self: RayExecutor, work: Work, shared: Any, tasks: Iterable[Any]) -> Iterator[Any]:
        return done(self, killed_once, (marks, work, shared), tasks)

    alone = train(snapshot, QUERIES, tmp_path / "local", OPTIONS)
    monkeypatch.setattr(RayExecutor, "map", dying)
    killed = train(snapshot, QUERIES, tmp_path / "ray", OPTIONS, engine="ray")
    assert alone.manifest.files == killed.manifest.files
    assert {"_best_of_shard", "_nearest", "_assigned", "_sketches"} <= {
        mark.name for mark in marks.iterdir()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_work_that_kills_every_worker_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("amips_plugins.export.ray_executor._RETRIES", 1)
    import ray

    with pytest.raises(TrainingError, match=r"has lost work .* run the same command again"):
        list(RayExecutor(ray).map(killed_always, 0, [1]))


@pytest.mark.usefixtures("cluster")
@pytest.mark.usefixtures("small_shards")
def test_a_driver_that_is_killed_goes_on_where_it_stopped(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amips_plugins.export.run_folder._BETWEEN", 0.0)
    done, asked = RayExecutor.map, list[tuple[str, int]]()

    def stopping(self: RayExecutor, work: Work, shared: Any, tasks: Any) -> Iterator[Any]:
        tasks = list(tasks)
        asked.append((work.__name__, len(tasks)))
        for number, result in enumerate(done(self, work, shared, tasks)):
            if len(asked) == 1 and number == 3:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(RayExecutor, "map", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(snapshot, QUERIES, tmp_path / "run", OPTIONS, engine="ray")
    again = train(snapshot, QUERIES, tmp_path / "run", OPTIONS, engine="ray")
    assert asked[:2] == [("_best_of_shard", 5), ("_best_of_shard", 2)]
    straight = train(snapshot, QUERIES, tmp_path / "straight", OPTIONS)
    assert again.manifest.files == straight.manifest.files


def test_no_cluster_at_the_address_is_one_sentence(snapshot: Snapshot, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason=RAY)
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(InvalidInput, match=r"No Ray cluster answers at '127\.0\.0\.1:1' *"):
        train(snapshot, QUERIES, tmp_path / "run", OPTIONS, engine="ray:127.0.0.1:1")


@pytest.mark.parametrize("engine", ["dask", "ray:", "local:8", ""])
def test_an_engine_that_does_not_exist_is_refused(
    engine: str, snapshot: Snapshot, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="there are local, ray and ray:ADDRESS"):
        train(snapshot, QUERIES, tmp_path / "run", OPTIONS, engine=engine)
    assert not (tmp_path / "run" / "bundle").exists()


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"amips-plugins\[scale\]"), opened("ray", 2.0, 8):
        pass


def test_a_bound_that_is_none_is_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is no bound"):
        train(snapshot, QUERIES, tmp_path / "run", OPTIONS, memory=0.0)
