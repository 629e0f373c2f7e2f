"""What a routed client adds to a call of its client: CPU of the calling thread, microseconds.

    python benchmarks/proxied.py [CHECKOUT ...] [--server] [--json proxied.json]

The client is a stub that reads the numbers of the query, as any client has to, and waits a
millisecond, as a call to a server does: after a wait the same Python runs with cold caches, several
times as slow as in a loop. With ``--server`` it is a client of the program ``qdrant`` that is on
PATH, over REST and over gRPC; then what a larger request takes the client counts, too. Every call
of a routed client is
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import numpy.typing as npt
from qdrant_client import QdrantClient, models

FloatArray = npt.NDArray[np.float32]  # of no checkout: it is not known yet which
_HERE = Path(__file__).resolve().parents[1]
_PROBES, _DIM, _K = 16, 384, 10
_NAMES = "overhead", "another"  # of a collection in cells, and of one that is no router's


class Added(msgspec.Struct, frozen=True, kw_only=True):
    """What a routed client of one checkout adds to a call, in one situation.

    Attributes
    ----------
    client
        A stub, or the client of a server over REST or gRPC.
    added, bare
        Microseconds on top of the bare client's call, and what that takes itself.
    """

    checkout: str
    client: str
    situation: str
    added: float
    bare: float


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


class Sending:
    """Asks a client for what a routed one has once asked it for, but for the query."""

    def __init__(self, client: QdrantClient, routed: Any, query: list[float]) -> None:
        self._own, self._asked = client.query_points, dict[str, Any]()

        def noted(*_: Any, **asked: Any) -> models.QueryResponse:
            self._asked = asked
            return self._own(**asked)

        client.query_points = noted  # type: ignore[method-assign]
        routed.query_points(_NAMES[0], query=query, limit=_K)
        del client.query_points

    def query_points(self, _: str, query: list[float], limit: int) -> models.QueryResponse:
        """Ask."""
        return self._own(**{**self._asked, "query": query, "limit": limit})


def measure(checkout: Path, calls: int, cells: int, *, served: bool) -> list[Added]:
    """Measure the checkout that modules come from in this process."""
    from benchmarks import overhead

    random = np.random.default_rng(0).standard_normal((calls, _DIM), dtype=np.float32)
    queries = random / np.linalg.norm(random, axis=1, keepdims=True)
    hook = overhead.hooks(queries, cells, _PROBES)["linear"]
    found: list[Added] = []
    for kind, client, collection in _clients(queries, cells, served=served):
        taken = _taken(client, collection, hook, queries)
        some = calls // 5  # the first calls are others than those to come
        for situation, pairs in taken.items():
            added, bare = np.median(np.array(pairs[some:]), axis=0)
            found.append(
                Added(
                    checkout=checkout.name,
                    client=kind,
                    situation=situation,
                    added=float(added),
                    bare=float(bare),
                )
            )
    return found


def _clients(
    queries: FloatArray, cells: int, *, served: bool
) -> Iterator[tuple[str, QdrantClient, Any]]:
    """Give clients, each with its collection of 100 keys in so many cells."""
    from amips_plugins.adapters.qdrant.collection import QdrantCollection
    from benchmarks import overhead

    if not served:
        stub = WaitingClient(":memory:")
        collection = overhead.real_collection(stub, queries[:100], cells)
        stub.answer = stub.query_points(_NAMES[0], queries[0].tolist(), limit=_K)
        yield "stub", stub, collection
        return
    from integration_tests.servers import QdrantProcess

    with QdrantProcess() as server:
        made = server.address.client()
        overhead.real_collection(made, queries[:100], cells)
        size = models.VectorParams(size=_DIM, distance=models.Distance.COSINE)
        made.create_collection(_NAMES[1], vectors_config=size)
        made.upload_collection(_NAMES[1], queries[:100], ids=range(100), wait=True)
        for kind in ("REST", "gRPC"):
            client = server.address.client(prefer_grpc=kind == "gRPC")
            yield kind, client, QdrantCollection(client, _NAMES[0])


def _taken(
    client: QdrantClient, collection: Any, hook: Any, queries: FloatArray
) -> dict[str, list[tuple[float, float]]]:
    """Return what a call adds, and the bare one takes, in every situation and for every query."""
    from amips_plugins import LearnedRouter, route

    def routed(**more: Any) -> Any:
        return route(client, LearnedRouter(collection, refresh=None, **more))

    off, on = routed(hook=hook), routed(hook=hook)
    off.amips_router.enabled = False
    situations = {
        "routed by a linear router": (on, _NAMES[0]),
        "its request, by the bare client": (Sending(client, on, queries[0].tolist()), _NAMES[0]),
        "no bundle": (routed(registry="nowhere"), _NAMES[0]),
        "switched off": (off, _NAMES[0]),
        "another collection": (off, _NAMES[1]),
    }
    taken: dict[str, list[tuple[float, float]]] = {situation: [] for situation in situations}
    for query in queries.tolist():
        for situation, (asked, name) in situations.items():
            bare = _cpu(client, name, query)
            taken[situation].append((_cpu(asked, name, query) - bare, bare))
    if on.amips_router.fallbacks:
        raise click.ClickException(f"Natively answered: {dict(on.amips_router.fallbacks)}.")
    return taken


def _cpu(client: Any, name: str, query: list[float]) -> float:
    started = time.thread_time_ns()
    client.query_points(name, query=query, limit=_K)
    return (time.thread_time_ns() - started) / 1e3


def _in_a_process(checkout: Path, calls: int, cells: int, served: bool) -> list[Added]:
    command = [sys.executable, __file__, "--measure", str(checkout)]
    command += ["--calls", str(calls), "--cells", str(cells), *(["--server"] if served else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout)  # noqa: S603
    if done.returncode:
        raise click.ClickException(f"{checkout} cannot be measured:\n{done.stderr}")
    return msgspec.json.decode(done.stdout, type=list[Added])


@click.command()
@click.argument("checkouts", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--calls", default=500, show_default=True, help="Calls measured in a round.")
@click.option("--rounds", default=5, show_default=True, help="Rounds, of which the best counts.")
@click.option("--cells", default=512, show_default=True, help="Cells, of which 16 are searched.")
@click.option("--server", "served", is_flag=True, help="Ask a server, over REST and gRPC.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the rows.")
@click.option("--measure", "measured", type=click.Path(path_type=Path), hidden=True)
def main(
    checkouts: tuple[Path, ...],
    calls: int,
    rounds: int,
    cells: int,
    served: bool,
    json_file: Path | None,
    measured: Path | None,
) -> None:
    """Say what a routed client adds to a call, in each of the CHECKOUTS."""
    if measured is not None:
        sys.path.insert(0, str(measured))
        click.echo(msgspec.json.encode(measure(measured, calls, cells, served=served)))
        return
    found: dict[tuple[str, str, str], Added] = {}
    for _ in range(rounds):
        for checkout in checkouts or (_HERE,):
            for one in _in_a_process(checkout.resolve(), calls, cells, served):
                key = (one.checkout, one.client, one.situation)
                found[key] = min(one, found.get(key, one), key=lambda some: some.added)
    click.echo("| checkout | client | situation | microseconds added | bare |")
    click.echo("| --- | --- | --- | --- | --- |")
    for one in found.values():
        click.echo(
            f"| {one.checkout} | {one.client} | {one.situation} | {one.added:.0f} "
            f"| {one.bare:.0f} |"
        )
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(list(found.values()))))


if __name__ == "__main__":
    main()
