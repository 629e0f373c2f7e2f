"""Work on the shards by Ray: a cluster of this machine alone, or one that is there."""

from __future__ import annotations

import importlib
import os
import socket
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from types import ModuleType
from typing import Any, TypeVar

import torch

from amips_plugins.errors import AmipsError, InvalidInput, TrainingError, require
from amips_plugins.export.executors import workers_within

__all__ = ["RayExecutor", "ray_executor"]

_S = TypeVar("_S")
_T = TypeVar("_T")
_R = TypeVar("_R")

_RETRIES = 8  # of a task whose worker or node is lost
_STARTS = 3  # on a machine that is too busy to start a cluster in Ray's half minute
_ANSWERS = 10.0  # seconds that a cluster has to take a connection
_STORE = 1 << 30  # bytes of this machine's object store; more goes to disk
_SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_PER_PROCESSOR = 2  # tasks that are under way or wait for those before


class RayExecutor:
    """Works in a Ray cluster, a task on a processor.

    Every node has to see the snapshot under the same path, and to have this package installed.
    """

    def __init__(self, ray: ModuleType) -> None:
        self._ray = ray
        self._task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_done_by_worker)

    def map(self, work: Callable[[_S, _T], _R], shared: _S, tasks: Iterable[_T]) -> Iterator[_R]:
        """Yield the results in the tasks' order; few of them wait for those before.

        Raises
        ------
        TrainingError
            The cluster is gone, or has lost a task time and again.
        """
        ray, rest = self._ray, iter(tasks)
        running: deque[Any] = deque()
        try:
            sent = ray.put(shared)
            most = _PER_PROCESSOR * max(1, int(ray.cluster_resources().get("CPU", 1)))
            running.extend(self._task.remote(work, sent, task) for task in islice(rest, most))
            while running:
                result = ray.get(running[0])
                running.popleft()
                running.extend(self._task.remote(work, sent, task) for task in islice(rest, 1))
                yield result
        except ray.exceptions.RayTaskError as exc:
            if isinstance(exc.cause, AmipsError):
                raise exc.cause from None
            raise
        except ray.exceptions.RayError as exc:
            first = (str(exc).splitlines() or [type(exc).__name__])[0]
            raise TrainingError(
                f"The Ray cluster has lost work that it could not do again ({first}); look at its "
                f"nodes and run the same command again: it goes on where it stopped."
            ) from exc
        # What runs beside an error is left to end: ray.cancel aborts the process that calls it
        # where a task is finished at that moment (Ray 2.60).


def _done_by_worker(work: Callable[[_S, _T], _R], shared: _S, task: _T) -> _R:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # What comes out of Ray's store cannot be written to, and nothing here wants to.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return work(shared, task)


@contextmanager
def ray_executor(address: str | None, memory: float, dim: int) -> Iterator[RayExecutor]:
    """Connect to a cluster, or start one of this machine's processors for as long as the block.

    Raises
    ------
    InvalidInput
        No cluster answers at the address.
    MissingExtra
        Ray is not installed.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray = require("ray", "scale")
    if ray.is_initialized():  # the caller's own, which stays
        yield RayExecutor(ray)
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    with _on_loopback(ray) if address is None else nullcontext():
        if address is None:
            _start(ray, workers_within(memory, dim, os.cpu_count() or 1), quiet)
        else:
            _connect(ray, address, quiet)
        try:
            yield RayExecutor(ray)
        finally:
            ray.shutdown()


@contextmanager
def _on_loopback(ray: ModuleType) -> Iterator[None]:
    """Let nothing of a cluster that is started now listen but on loopback.

    It is what Ray does by itself on systems where it knows no clusters of several machines: its
    processes read that from the environment, and this one has read it already.
    """
    constants: Any = importlib.import_module(f"{ray.__name__}._private.ray_constants")
    before = os.environ.get(_SEVERAL_MACHINES), constants.ENABLE_RAY_CLUSTER
    os.environ[_SEVERAL_MACHINES], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before[1]
        del os.environ[_SEVERAL_MACHINES]
        if before[0] is not None:
            os.environ[_SEVERAL_MACHINES] = before[0]


def _connect(ray: ModuleType, address: str, quiet: dict[str, Any]) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), _ANSWERS).close()
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, OverflowError) as exc:
        raise InvalidInput(
            f"No Ray cluster answers at {address!r}; start one (ray start --head), or train with "
            f"--engine ray, which starts its own, or local."
        ) from exc


def _start(ray: ModuleType, workers: int, quiet: dict[str, Any], attempts: int = _STARTS) -> None:
    try:
        ray.init(
            "local",
            num_cpus=workers,
            include_dashboard=False,
            object_store_memory=_STORE,
            **quiet,
        )
    except Exception as exc:  # Ray's own have no class of their own
        ray.shutdown()
        if attempts == 1:
            first = (str(exc).splitlines() or [type(exc).__name__])[0]
            raise TrainingError(
                f"Ray does not start on this machine ({first}); train with --engine local."
            ) from exc
        _start(ray, workers, quiet, attempts - 1)
