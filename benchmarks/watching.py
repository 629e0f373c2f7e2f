"""What watching costs in time: microseconds that each observer adds to a search of one query.

    python benchmarks/watching.py

Best of many rounds, so that what else the machine does counts least.
"""

from __future__ import annotations

import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins import LearnedRouter, MemoryCollection
from amips_plugins.collection import SearchRequest
from amips_plugins.models.hooks import NativeHook
from amips_plugins.observe.metrics import RouterMetrics
from amips_plugins.observe.query_log import QueryLog
from amips_plugins.observe.tracing import SearchSpans
from amips_plugins.plan import QueryPlan
from amips_plugins.routing.effects import Effects, run
from amips_plugins.routing.execution import Outcome
from amips_plugins.routing.hits import Trace
from amips_plugins.routing.observers import Observation, Observers
from amips_plugins.routing.serving import Serving

_DIM = 384
_PROBES = 16
_ROUNDS = 30
_QUERIES = 2_000  # of the log's sample, which is full long before it is timed


def times_of(calls: dict[str, Callable[[], object]], number: int) -> dict[str, float]:
    """Return the microseconds of each call; they take turns, so that a busy moment hits all."""
    rounds = [
        {name: timeit.timeit(call, number=number) for name, call in calls.items()}
        for _ in range(_ROUNDS)
    ]
    return {name: min(times[name] for times in rounds) / number * 1e6 for name in calls}


@click.command()
@click.option("--calls", default=2_000, show_default=True, help="Calls of each kind in a round.")
def main(calls: int) -> None:
    """Time what watching adds to a search."""
    collection = MemoryCollection(np.eye(_DIM, dtype=np.float32))
    queries = np.ones((1, _DIM), dtype=np.float32)
    serving = Serving(collection, NativeHook())
    request = SearchRequest(queries, 10, None, (), None, None)
    cells = np.arange(_PROBES, dtype=np.int64)[None, :]
    answered = Outcome([[]], QueryPlan(cells=cells, shares=np.array([0.1], dtype=np.float32)))
    traces = [Trace("route", _PROBES, "benchmark")]
    told: list[Observation] = []

    def watch(*observers: Callable[[Observation], object]) -> Callable[[], None]:
        watching = Observers(observers)

        def search() -> Effects[None]:
            yield from ()
            watching.tell(serving, request, answered, traces, (1e-5, 1e-3))

        return lambda: run(watching.around(search()) if watching.surround else search())

    watch(told.append)()
    router = LearnedRouter(collection, hook=NativeHook())
    RouterMetrics(router, registry=CollectorRegistry())
    with tempfile.TemporaryDirectory() as folder, QueryLog(folder, max_queries=_QUERIES) as log:
        for _ in range(100 * _QUERIES):
            log(told[0])
        times = times_of(
            {
                "the observation itself": watch(lambda _: None),
                "QueryLog": watch(log),
                "RouterMetrics": watch(router._observers._observers[0]),
                "SearchSpans": watch(SearchSpans(TracerProvider())),
            },
            calls,
        )
    click.echo(f"Microseconds a search of one query, {_PROBES} cells, {_DIM} dimensions\n")
    (first, base), *others = times.items()
    click.echo(f"| {first} | {base:.1f} |")
    for name, taken in others:
        click.echo(f"| {name} | {taken - base:.1f} |")


if __name__ == "__main__":
    main()
