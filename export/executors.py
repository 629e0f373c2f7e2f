"""Who does the work on the shards: the threads of this process, or a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Protocol, TypeVar

import torch

from amips_plugins.errors import InvalidInput

__all__ = ["LOCAL", "Executor", "LocalExecutor", "opened", "workers_within"]

_S = TypeVar("_S")
_T = TypeVar("_T")
_R = TypeVar("_R")

_GIB = 1 << 30
_FIXED = 192 << 20  # bytes that a worker needs beside the keys it has read
_PER_DIM = 16_384 * 4 * 5  # the same for every dimension of the keys


class Executor(Protocol):
    """Does the same work on many tasks.

    Work is a function of a module that gives the same result for the same arguments; it may be
    done again where a worker is lost.
    """

    def map(self, work: Callable[[_S, _T], _R], shared: _S, tasks: Iterable[_T]) -> Iterator[_R]:
        """Yield ``work(shared, task)`` for every task, in their order."""
        ...


class LocalExecutor:
    """Works in this process, a thread for a task.

    Parameters
    ----------
    memory
        GiB that the workers may take together: it decides how many there are, beside the
        processors. One always works.
    dim
        Dimension of the keys, which decides what a worker takes.
    """

    def __init__(self, memory: float = 2.0, dim: int = 1_024) -> None:
        self._memory, self._dim = memory, dim

    @property
    def workers(self) -> int:
        """How many tasks are worked on at once."""
        return workers_within(self._memory, self._dim, torch.get_num_threads())

    def map(self, work: Callable[[_S, _T], _R], shared: _S, tasks: Iterable[_T]) -> Iterator[_R]:
        """Yield the results in the tasks' order; few of them wait for those before."""
        workers = self.workers
        if workers == 1:
            for task in tasks:
                yield work(shared, task)
            return
        # One thread of torch for each of ours: torch counts them for every thread apart.
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            rest = iter(tasks)
            running: deque[Future[_R]] = deque(
                pool.submit(work, shared, task) for task in islice(rest, workers)
            )
            try:
                while running:
                    result = running.popleft().result()
                    running.extend(pool.submit(work, shared, task) for task in islice(rest, 1))
                    yield result
            finally:
                for future in running:
                    future.cancel()


def workers_within(memory: float, dim: int, most: int) -> int:
    """Return how many workers fit into so many GiB; one always does."""
    return max(1, min(most, int(memory * _GIB) // (_FIXED + dim * _PER_DIM)))


@contextmanager
def opened(engine: str, memory: float, dim: int) -> Iterator[Executor]:
    """Give the executor of this name: ``local``, ``ray``, or ``ray:ADDRESS``.

    Raises
    ------
    InvalidInput
        There is no such engine, or it cannot be reached.
    MissingExtra
        It needs a package that is not installed.
    """
    kind, colon, address = engine.partition(":")
    if engine == "local":
        yield LocalExecutor(memory, dim)
    elif kind == "ray" and (address or not colon):
        from amips_plugins.export.ray_executor import ray_executor

        with ray_executor(address or None, memory, dim) as executor:
            yield executor
    else:
        raise InvalidInput(f"There is no engine {engine!r}; there are local, ray and ray:ADDRESS.")


LOCAL = LocalExecutor()
"""Works here, in the memory that is the default."""
