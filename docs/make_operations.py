"""Writes the outputs into docs/operations.md: runs its commands, in order, on real databases.

    python docs/make_operations.py [--demo .demo] [--keep FOLDER]

Every line ``$ command`` of a ``console`` block is run by bash and every ``python`` block by Python;
what a block prints takes the place of what was printed before (a python block's output is the
``text`` block behind it). Milvus is a server of its own, in a container where there is an engine,
else a plain process; Qdrant Edge is a folder. The text and its vectors are those of ``make demo``,
which has to have run before. Some minutes, in which nobody should edit the page.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins.demo.corpus import Pair
from amips_plugins.demo.embed import load_embedder
from amips_plugins.files import replace_file
from amips_plugins.vectors import FloatArray
from integration_tests.containers import MilvusContainer, milvus_image, no_engine
from integration_tests.servers import MilvusProcess, MilvusServer, ServerError

PAGE = Path(__file__).with_name("operations.md")

_SHOWN = {"server": "localhost:19530", "shards": "/srv/shards"}  # what the page calls them
Run = Callable[[list[str]], str]
"""Runs a program with arguments; the last one is what the page shows."""

_LATER = 1_000  # keys that others write during the walk
_TEST = 1_000  # queries for measuring only
_FENCED = re.compile(r"^```(console|python|text)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


def fill_in(page: str, run: Run) -> Iterator[str]:
    """Yield the page with new outputs, piece by piece."""
    end = 0
    printed: str | None = None
    for block in _FENCED.finditer(page):
        kind, text = block.groups()
        if kind == "console":
            text = "".join(_transcript(text, run))
        elif kind == "python":
            printed = run([sys.executable, "-c", text])
        elif printed is not None:
            text, printed = printed, None
        yield page[end : block.start()] + f"```{kind}\n{text}```\n"
        end = block.end()
    yield page[end:]


def _transcript(block: str, run: Run) -> Iterator[str]:
    for command in re.findall(r"^\$ ((?:.*\\\n)*.*\n)", block, re.MULTILINE):
        yield f"$ {command}" + run(["bash", "-c", command])


class _Runner:
    """Runs commands in a folder, under the names that the page gives to what they meet."""

    def __init__(self, folder: Path, real: dict[str, str]) -> None:
        self._folder = folder
        self._names = [(shown, real[what]) for what, shown in _SHOWN.items()]
        self._exports = ""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path}
        self._environment.pop("AMIPS_REGISTRY", None)

    def __call__(self, command: list[str]) -> str:
        click.echo(f"$ {command[-1].strip()}", err=True)
        for shown, real in self._names:
            command[-1] = command[-1].replace(shown, real)
        if command[0] == "bash":
            if command[-1].startswith("export "):
                self._exports += command[-1]
                return ""
            command[-1] = self._exports + command[-1]
        started = time.monotonic()
        done = subprocess.run(  # noqa: S603 - the commands of a page of this repository
            command,
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        printed = done.stdout
        for shown, real in self._names:
            printed = printed.replace(real, shown)
        if done.returncode in (137, -9):
            printed += "Killed\n"  # the shell of a terminal says so
        click.echo(f"{printed}({time.monotonic() - started:.0f} s)\n", err=True)
        if "Traceback" in printed:
            raise click.ClickException("A command of the page failed; the page stays as it was.")
        return printed


def _corpus(demo: Path) -> tuple[list[Pair], FloatArray, FloatArray]:
    """Read what the demo has found and embedded."""
    path = demo / "pairs-12000.json"
    if not path.exists():
        raise click.ClickException(
            f"{demo} has no demo; run `make demo` first, or name its folder."
        )
    found = msgspec.json.decode(path.read_bytes(), type=list[Pair])
    embedder = load_embedder()
    keys = embedder.embed_to(demo / "vectors", [pair.key for pair in found])
    return found, keys, embedder.embed_to(demo / "vectors", [pair.query for pair in found])


def _fill_milvus(uri: str, found: list[Pair], keys: FloatArray) -> None:
    import pymilvus

    client: Any = pymilvus.MilvusClient(uri)
    schema = client.create_schema()
    schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=keys.shape[1])
    schema.add_field("title", pymilvus.DataType.VARCHAR, max_length=512)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="IVF_FLAT", metric_type="COSINE", params={"nlist": 64})
    client.create_collection("docs", schema=schema, index_params=index, num_shards=1)
    for low in range(0, len(keys), 1_000):
        places = range(low, min(low + 1_000, len(keys)))
        rows = [{"id": at, "vector": keys[at], "title": found[at].title} for at in places]
        client.insert("docs", rows)
    client.flush("docs")
    client.close()


def _fill_edge(folder: Path, keys: FloatArray) -> None:
    import qdrant_edge as edge

    folder.mkdir(parents=True)
    vectors = edge.EdgeVectorParams(size=keys.shape[1], distance=edge.Distance.Cosine)
    shard = edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors=vectors))
    for low in range(0, len(keys), 1_000):
        points = [
            edge.Point(low + at, key.tolist()) for at, key in enumerate(keys[low : low + 1_000])
        ]
        shard.update(edge.UpdateOperation.upsert_points(points))
    shard.close()


def _server() -> MilvusServer:
    try:
        if no_engine() is None:
            milvus_image()
            return MilvusContainer()
    except ServerError:
        pass  # no image: the same server runs as a plain process
    return MilvusProcess()


@click.command()
@click.option("--demo", type=click.Path(path_type=Path), default=".demo", show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Folder to work in, and to keep.")
def main(demo: Path, keep: Path | None) -> None:
    """Run the page's commands and write their outputs into it."""
    found, keys, queries = _corpus(demo)
    stored = len(keys) - _LATER
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        log = queries[_TEST:]
        np.save(folder / "queries.npy", log[: len(log) // 2])
        np.save(folder / "queries-later.npy", log)
        np.save(folder / "test.npy", queries[:_TEST])
        np.save(folder / "new.npy", keys[stored:])
        _fill_edge(folder / "shards" / "docs", keys[:stored])
        server = stack.enter_context(_server())
        click.echo(f"Milvus: {server.description}", err=True)
        _fill_milvus(server.uri, found, keys[:stored])
        address = server.uri.removeprefix("http://")
        runner = _Runner(folder, {"server": address, "shards": str((folder / "shards").resolve())})
        page = "".join(fill_in(PAGE.read_text(), runner))
    replace_file(PAGE, page.encode())


if __name__ == "__main__":
    main()
