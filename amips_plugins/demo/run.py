"""The whole job on real text: store, snapshot, train, publish, lay out, search, measure, tune."""

from __future__ import annotations

import random
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from amips_plugins.bundle.manifest import Manifest
from amips_plugins.bundle.package import Bundle
from amips_plugins.bundle.registry import Registry
from amips_plugins.collection import Collection, collection_key
from amips_plugins.demo.corpus import Pair, pairs
from amips_plugins.demo.embed import Embedder, load_embedder
from amips_plugins.evaluation import Measurement, evaluate
from amips_plugins.export.snapshot import Snapshot, finished, take_snapshot
from amips_plugins.export.train import Run, TrainOptions, train
from amips_plugins.files import replace_file
from amips_plugins.layout import lay_out
from amips_plugins.progress import Progress
from amips_plugins.routing.router import LearnedRouter
from amips_plugins.tune.run import NothingToTune, TuneOptions, TuneResult, measure
from amips_plugins.vectors import FloatArray

__all__ = ["run"]

_NAME = "docs"
_N_CELLS = 64
_HELD_OUT = 1_000  # pairs whose questions no training sees
_TUNED = TuneOptions(seconds=60.0)
_ASKED = 600  # questions that tuning is given, which takes a minute or two
_QUESTIONS = (
    "split text into tokens",
    "solve a system of linear equations",
    "open a network connection with a timeout",
)

Say = Callable[[str], object]
Show = Callable[[list[Measurement], int], str]
ShowTuned = Callable[[TuneResult], str]


def run(
    database: str,
    folder: Path,
    limit: int,
    say: Say,
    show: Show,
    show_tuned: ShowTuned,
    progress: Progress,
) -> list[Measurement]:
    """Run the demo in a folder; what is there from an earlier run is used again.

    Returns the native search, plain k-means cells and learned ones, measured on the held-out
    questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    say("1. Text: docstrings of the installed Python packages, read with ast, never imported.")
    found = _corpus(folder / f"pairs-{limit}.json", limit, progress)
    held_out = min(_HELD_OUT, len(found) // 5)
    say(f"   {len(found):,} pairs; {held_out:,} questions are held out for measuring only.")

    say("2. Vectors: all-MiniLM-L6-v2, on this machine.")
    embedder = load_embedder()
    keys = embedder.embed_to(folder / "vectors", [pair.key for pair in found], progress)
    queries = embedder.embed_to(folder / "vectors", [pair.query for pair in found], progress)
    chosen = _DATABASES[database]
    train_queries, test_queries = queries[held_out:], queries[: min(held_out, chosen.measured)]
    say(f"3. Database: {chosen.what}.")
    collection = chosen.store(folder, found, keys, progress)
    registry = Registry(folder / f"registry-{database}")
    try:
        work = folder / database
        work.mkdir(exist_ok=True)
        say("4. Snapshot, train, publish, lay out, measure.")
        router, measured = _learn_and_measure(
            collection,
            chosen.generations,
            registry,
            work,
            train_queries,
            test_queries,
            say,
            progress,
        )
        say("\n5. Questions, answered by the learned router:\n")
        _answer(router, embedder, say)
        say(
            f"\n6. {len(test_queries):,} held-out questions. 'scanned' counts the model itself; "
            f"ms is the median of single queries{chosen.remark}:\n"
        )
        say(show(measured, 10))
        say(f"\n7. The same keys where nothing is trained: amips tune --dry-run{chosen.tuned}.\n")
        with chosen.to_tune(collection, folder, keys) as place:
            _tune(place, train_queries[:_ASKED], work / "tune", say, show_tuned, progress)
        return measured
    finally:
        collection.close()


def _tune(
    place: Collection,
    queries: FloatArray,
    work: Path,
    say: Say,
    show_tuned: ShowTuned,
    progress: Progress,
) -> None:
    try:
        say(show_tuned(measure(place, queries, _TUNED, work, progress).result))
    except NothingToTune as exc:  # of few keys the engine builds no graph
        say(str(exc))


def _learn_and_measure(
    collection: Collection,
    generations: Callable[[Collection], Iterator[Collection]],
    registry: Registry,
    work: Path,
    train_queries: FloatArray,
    test_queries: FloatArray,
    say: Say,
    progress: Progress,
) -> tuple[LearnedRouter, list[Measurement]]:
    """Do the main job with plain k-means cells and with learned ones; measure both."""
    snapshot = _snapshot(collection, work / "snapshot", progress)
    measured: list[Measurement] = []
    models: dict[str, Literal["native", "auto"]] = {"k-means cells": "native", "learned": "auto"}
    for name, model in models.items():
        say(f"   {name}:")
        options = TrainOptions(model=model, n_cells=_N_CELLS)
        trained = train(snapshot, train_queries, work / f"run-{model}", options, progress)
        bundle = _publish(collection, trained, registry)
        laid_out = next(
            (
                other
                for other in generations(collection)
                if other.layout() == bundle.manifest.layout
            ),
            None,
        ) or lay_out(collection, bundle, progress, work=work / f"layout-{model}")
        router = LearnedRouter(laid_out, registry=registry)
        # The baseline gets the probes that reach each recall on the held-out part of the log.
        probes = _probes_of_native(trained.manifest) if model == "native" else ()
        rows = evaluate(router, test_queries, probes=probes, progress=progress)
        measured += [
            msgspec.structs.replace(row, search=row.search.replace("learned", name))
            for row in rows[min(1, len(measured)) :]  # the native search is measured once
        ]
    say(f"   {trained.manifest.reason}")
    return router, measured


def _probes_of_native(manifest: Manifest) -> list[int]:
    return [
        round(figure.n_probes)
        for figure in manifest.figures
        if figure.candidate == "native"
        and figure.k == manifest.default_k
        and figure.recall in (0.80, 0.90, 0.95)
        and figure.n_probes is not None
    ]


def _answer(router: LearnedRouter, embedder: Embedder, say: Say) -> None:
    for question in _QUESTIONS:
        vector = embedder.embed([question])[0]
        hits = router.search(vector, k=3, fields=["title", "text"], explain=True)
        say(f"   {question}?  ({hits.trace.n_probes} of {_N_CELLS} cells searched)")
        for hit in hits:
            text = textwrap.shorten(str(hit.fields["text"]), 60, placeholder=" ...")
            say(f"     {hit.score:.3f}  {hit.fields['title']}: {text}")


def _corpus(path: Path, limit: int, progress: Progress) -> list[Pair]:
    if path.exists():
        return msgspec.json.decode(path.read_bytes(), type=list[Pair])
    found = pairs(limit, seed=0, progress=progress)
    random.Random(0).shuffle(found)  # noqa: S311 - they come file by file; any may be held out
    replace_file(path, msgspec.json.encode(found))
    return found


def _snapshot(collection: Collection, path: Path, progress: Progress) -> Snapshot:
    if finished(path):
        return Snapshot.open(path)
    return take_snapshot(collection, path, progress=progress)


def _publish(collection: Collection, trained: Run, registry: Registry) -> Bundle:
    """Publish the run's bundle, if it is not yet, and make it the one that serves."""
    key, version = collection_key(collection.info), trained.manifest.version
    if version not in registry.versions(key):
        registry.publish(trained.bundle)
    registry.pin(key, version)
    return registry.open(key)


def _milvus(folder: Path, found: list[Pair], keys: FloatArray, progress: Progress) -> Collection:
    from pymilvus import DataType, MilvusClient

    from amips_plugins.adapters.milvus.collection import MilvusCollection

    client = MilvusClient(str(folder / "docs.db"))
    complete = client.has_collection(_NAME) and len(found) == int(
        client.query(_NAME, filter="", output_fields=["count(*)"])[0]["count(*)"]
    )
    if not complete:
        client.drop_collection(_NAME)
        schema = client.create_schema()
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=keys.shape[1])
        schema.add_field("title", DataType.VARCHAR, max_length=512)
        schema.add_field("text", DataType.VARCHAR, max_length=8192)
        index = client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="COSINE")
        client.create_collection(_NAME, schema=schema, index_params=index)
        _store(found, keys, progress, lambda rows: client.insert(_NAME, rows))
        client.flush(_NAME)
    return MilvusCollection(client, _NAME)


def _qdrant(_: Path, found: list[Pair], keys: FloatArray, progress: Progress) -> Collection:
    from qdrant_client import QdrantClient, models

    from amips_plugins.adapters.qdrant.collection import QdrantCollection

    # On disk, local mode commits every point by itself: minutes for what takes seconds here.
    client = QdrantClient(":memory:")
    client.create_collection(
        _NAME,
        vectors_config=models.VectorParams(size=keys.shape[1], distance=models.Distance.COSINE),
    )

    def upsert(rows: list[dict[str, Any]]) -> None:
        points = [
            models.PointStruct(
                id=row["id"],
                vector=row["vector"],
                payload={"title": row["title"], "text": row["text"]},
            )
            for row in rows
        ]
        client.upsert(_NAME, points)

    _store(found, keys, progress, upsert)
    return QdrantCollection(client, _NAME)


def _store(
    found: list[Pair],
    keys: FloatArray,
    progress: Progress,
    write: Callable[[list[dict[str, Any]]], object],
) -> None:
    batch = 1_000
    with progress("store", len(found), 0, "keys") as step:
        for low in range(0, len(found), batch):
            rows = [
                {"id": row, "vector": keys[row].tolist(), "title": pair.title, "text": pair.key}
                for row, pair in enumerate(found[low : low + batch], start=low)
            ]
            write(rows)
            step.advance(len(rows))


def _milvus_generations(collection: Collection) -> Iterator[Collection]:
    from amips_plugins.adapters.milvus.collection import MilvusCollection

    if isinstance(collection, MilvusCollection):
        for name in sorted(collection.client.list_collections()):
            if re.fullmatch(rf"{_NAME}__g\d+", name):
                yield MilvusCollection(collection.client, name)


def _itself(collection: Collection) -> Iterator[Collection]:
    yield collection.current()


@contextmanager
def _as_it_is(collection: Collection, _: Path, __: FloatArray) -> Iterator[Collection]:
    yield collection


@contextmanager
def _in_edge(_: Collection, folder: Path, keys: FloatArray) -> Iterator[Collection]:
    import qdrant_edge as edge

    from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

    if not (folder / "edge" / _NAME).exists():
        building = folder / "edge-building"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        vectors = edge.EdgeVectorParams(size=keys.shape[1], distance=edge.Distance.Cosine)
        config = edge.EdgeConfig(vectors=vectors)
        edge.EdgeShard.create(str(building / _NAME), config).close()
        with QdrantEdgeCollection.connect(str(building), _NAME) as shard:
            shard.upsert(range(len(keys)), keys)
            shard.optimize()
        building.rename(folder / "edge")
    with QdrantEdgeCollection.connect(str(folder / "edge"), _NAME) as shard:
        yield shard


@dataclass(frozen=True)
class _Database:
    """How the demo stores keys, how many questions it affords, where cells are, what it tunes."""

    what: str
    measured: int
    remark: str
    store: Callable[[Path, list[Pair], FloatArray, Progress], Collection]
    generations: Callable[[Collection], Iterator[Collection]]
    to_tune: Callable[[Collection, Path, FloatArray], AbstractContextManager[Collection]]
    tuned: str


_DATABASES = {
    "milvus": _Database(
        "Milvus Lite, in docs.db",
        _HELD_OUT,
        "",
        _milvus,
        _milvus_generations,
        _as_it_is,
        " on the collection as it was stored",
    ),
    "qdrant": _Database(
        "Qdrant's embedded mode, in memory",
        60,  # it filters in a Python loop, a third of a second a query
        " (of the embedded mode, which filters in Python: a server is another matter)",
        _qdrant,
        _itself,
        _in_edge,
        ", in Qdrant Edge, the server's engine in this\n   process, since the embedded mode "
        "looks at every key whatever is set",
    ),
}
