"""What a routed client adds to a call of its client: CPU of the calling thread, microseconds.

    python benchmarks/proxied.py [CHECKOUT ...] [--json proxied.json]

The client is a stub that reads the numbers of the query, as any client has to, and waits a
millisecond, as a call to a server does: after a wait the same Python runs with cold caches, several
times as slow as in a loop. Every call of a routed client is
measured beside one of the bare client, and of all calls the median counts. Checkouts of the project
(left out, this one) take turns in processes of their own, and the best round of each counts: what
others do on the machine only ever adds. A checkout brings its own ``benchmarks/overhead.py``, for
the model and the collection.
"""

from __future__ import annotations

import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from qdrant_client import QdrantClient, models

_HERE = Path(__file__).resolve().parents[1]
_CELLS, _PROBES, _DIM, _K = 512, 16, 384, 10


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """What a routed client of one checkout adds to a call, in one situation."""

    checkout: str
    situation: str
    added: float


class WaitingClient(QdrantClient):
    """Gives the answer that it was told, after a millisecond of waiting."""

    answer: models.QueryResponse | None = None

    def query_points(self, *args: Any, **more: Any) -> models.QueryResponse:
        """Read, wait, and answer."""
        if self.answer is None:
            return super().query_points(*args, **more)
        array("f", more["query"])
        time.sleep(1e-3)
        return self.answer


def measure(checkout: Path, calls: int) -> list[Added]:
    """Measure the checkout that modules come from in this process."""
    from amips_plugins import LearnedRouter, route
    from benchmarks import overhead

    random = np.random.default_rng(0).standard_normal((calls, _DIM), dtype=np.float32)
    queries = random / np.linalg.norm(random, axis=1, keepdims=True)
    client = WaitingClient(":memory:")
    collection = overhead.real_collection(client, queries[:100], _CELLS)
    client.answer = client.query_points("overhead", queries[0].tolist(), limit=_K)
    hook = overhead.hooks(queries, _CELLS, _PROBES)["linear"]

    def routed(**more: Any) -> Any:
        return route(client, LearnedRouter(collection, refresh=None, **more))

    off = routed(hook=hook)
    off.amips_router.enabled = False
    situations = {
        "routed by a linear router": (routed(hook=hook), "overhead"),
        "no bundle": (routed(registry="nowhere"), "overhead"),
        "switched off": (off, "overhead"),
        "another collection": (off, "another"),
    }
    taken: dict[str, list[float]] = {situation: [] for situation in situations}
    for query in queries.tolist():
        for situation, (asked, name) in situations.items():
            bare = _cpu(client, name, query)
            taken[situation].append(_cpu(asked, name, query) - bare)
    some = calls // 5  # the first calls are others than those to come
    return [
        Added(checkout=checkout.name, situation=name, added=float(np.median(values[some:])))
        for name, values in taken.items()
    ]


def _cpu(client: Any, name: str, query: list[float]) -> float:
    started = time.thread_time_ns()
    client.query_points(name, query=query, limit=_K)
    return (time.thread_time_ns() - started) / 1e3


def _in_a_process(checkout: Path, calls: int) -> list[Added]:
    command = [sys.executable, __file__, "--measure", str(checkout), "--calls", str(calls)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout)  # noqa: S603
    if done.returncode:
        raise click.ClickException(f"{checkout} cannot be measured:\n{done.stderr}")
    return msgspec.json.decode(done.stdout, type=list[Added])


@click.command()
@click.argument("checkouts", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--calls", default=500, show_default=True, help="Calls measured in a round.")
@click.option("--rounds", default=5, show_default=True, help="Rounds, of which the best counts.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--measure", "measured", type=click.Path(path_type=Path), hidden=True)
def main(
    checkouts: tuple[Path, ...],
    calls: int,
    rounds: int,
    json_file: Path | None,
    measured: Path | None,
) -> None:
    """Say what a routed client adds to a call, in each of the CHECKOUTS."""
    if measured is not None:
        sys.path.insert(0, str(measured))
        click.echo(msgspec.json.encode(measure(measured, calls)))
        return
    found: dict[tuple[str, str], Added] = {}
    for _ in range(rounds):
        for checkout in checkouts or (_HERE,):
            for one in _in_a_process(checkout.resolve(), calls):
                key = (one.checkout, one.situation)
                found[key] = min(one, found.get(key, one), key=lambda some: some.added)
    click.echo("| checkout | situation | microseconds added |\n| --- | --- | --- |")
    for one in found.values():
        click.echo(f"| {one.checkout} | {one.situation} | {one.added:.0f} |")
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(list(found.values()))))


if __name__ == "__main__":
    main()
