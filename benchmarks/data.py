"""Data to measure on: a folder of arrays, the demo's corpus, or a BEIR set."""

from __future__ import annotations

import gzip
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amips_plugins.demo.corpus import fold, pairs
from amips_plugins.demo.embed import load_embedder
from amips_plugins.errors import InvalidInput, require
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, as_queries, normalise

__all__ = ["Dataset", "Source", "load"]

_BLOCK = 16_384
_SEED = 0  # of the split by pair; seeds of runs vary everything else
_QUICK = (20_000, 8_000, 1_000)  # keys, training queries, test queries
_TEST_SHARE = 0.1

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Dataset:
    """Unit vectors, compared by inner product.

    Attributes
    ----------
    name
        What the figures are filed under.
    keys
        ``(n, dim)`` float32 memory map.
    train
        ``(n_train, dim)`` float32 queries to learn from, to stop early by and to calibrate on.
    test
        ``(n_test, dim)`` float32 queries to report on.
    cache
        Folder for what is derived from these arrays.
    """

    name: str
    keys: FloatArray
    train: FloatArray
    test: FloatArray
    cache: Path


@dataclass(frozen=True)
class Source:
    """Where data comes from.

    Attributes
    ----------
    data
        A folder with ``keys.npy``, ``queries_train.npy`` and ``queries_test.npy``; ``pydocs``; or
        ``beir:NAME``.
    cache
        Folder for vectors and exact answers.
    quick
        Use a part of the data.
    limit
        Pairs of ``pydocs``, at most.
    beir_root
        Folder with local copies of BEIR sets; None asks the hub.
    """

    data: str
    cache: Path
    quick: bool = False
    limit: int = 50_000
    beir_root: Path | None = None


def load(source: Source, progress: Progress = no_progress) -> Dataset:
    """Load data.

    Raises
    ------
    InvalidInput
        There is no such data, or it cannot be used.
    MissingExtra
        A package that is needed to get it is not installed.
    """
    if source.data == "pydocs":
        name, arrays = "pydocs", _pydocs(source, progress)
    elif source.data.startswith("beir:"):
        name = source.data.removeprefix("beir:")
        arrays = _beir(name, source, progress)
    else:
        folder = Path(source.data)
        name, arrays = folder.resolve().name, _folder(folder)
    keys, train, test = arrays
    if source.quick:
        name += " (quick)"
        keys, train, test = keys[: _QUICK[0]], train[: _QUICK[1]], test[: _QUICK[2]]
    return _prepare(name, keys, train, test, source.cache, progress)


def _folder(folder: Path) -> tuple[Array, Array, Array]:
    return (
        _array(folder / "keys.npy"),
        _array(folder / "queries_train.npy"),
        _array(folder / "queries_test.npy"),
    )


def _array(path: Path) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as exc:
        raise InvalidInput(
            f"There is no {path}; name a folder that has keys.npy, queries_train.npy and "
            f"queries_test.npy, or pydocs, or beir:NAME."
        ) from exc
    except (ValueError, EOFError, OSError) as exc:
        raise InvalidInput(f"{path} is not a .npy array ({exc}).") from exc
    return array


def _pydocs(source: Source, progress: Progress) -> tuple[Array, Array, Array]:
    """Embed docstrings; first sentences are the queries, split at random by pair."""
    found = pairs(source.limit, seed=_SEED, progress=progress)
    embedder = load_embedder()
    folder = source.cache / "vectors"
    keys = embedder.embed_to(folder, [pair.key for pair in found], progress)
    queries = embedder.embed_to(folder, [pair.query for pair in found], progress)
    order = np.random.default_rng(_SEED).permutation(len(queries))
    held_out = int(len(queries) * _TEST_SHARE)
    return keys, queries[order[held_out:]], queries[order[:held_out]]


def _beir(name: str, source: Source, progress: Progress) -> tuple[Array, Array, Array]:
    """Embed a BEIR set: generated queries to learn from, its own judged queries to test on."""
    root = source.beir_root or _download(name, source.cache / "beir")
    home = root / name
    corpus = [
        f"{row.get('title', '')} {row['text']}".strip() for row in _lines(home / "corpus.jsonl")
    ]
    judged = _judged(home / "qrels" if (home / "qrels").is_dir() else root / f"{name}-qrels")
    asked = {str(row["_id"]): str(row["text"]) for row in _lines(home / "queries.jsonl")}
    test = _distinct([asked[query] for query in judged if query in asked], set())
    seen = {fold(text) for text in test}
    generated = root / f"{name}-generated-queries" / "train.jsonl"
    train = _distinct([str(row["query"]) for row in _lines(generated)], seen)
    if not test or not train:
        raise InvalidInput(
            f"{name} has {len(train)} training queries and {len(test)} test queries; both are "
            f"needed: look at {generated.parent} and at the qrels."
        )
    order = np.random.default_rng(_SEED).permutation(len(train))
    embedder = load_embedder()
    folder = source.cache / "vectors"
    keys, train_queries, test_queries = (
        embedder.embed_to(folder, texts, progress)
        for texts in (corpus, [train[row] for row in order], test)
    )
    return keys, train_queries, test_queries


def _download(name: str, root: Path) -> Path:
    """Fetch a set, its judgements and its generated queries, each from its own hub dataset."""
    hub = require("huggingface_hub", "demo")
    try:
        for repository in (name, f"{name}-qrels", f"{name}-generated-queries"):
            hub.snapshot_download(
                f"BeIR/{repository}",
                repo_type="dataset",
                local_dir=root / repository,
                allow_patterns=["*.jsonl", "*.jsonl.gz", "*.tsv"],
            )
    except (OSError, ValueError) as exc:  # the hub's own errors are among these
        raise InvalidInput(
            f"The dataset BeIR/{repository} cannot be fetched ({type(exc).__name__}); check the "
            f"name and the connection, or pass --beir-root with a folder that holds it."
        ) from exc
    return root


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a ``.jsonl`` file, or the same with ``.gz`` at its end."""
    packed = path.with_name(f"{path.name}.gz")
    if not path.exists() and not packed.exists():
        raise InvalidInput(f"There is no {path} (or {path.name}.gz), which a BEIR set has.")
    with gzip.open(packed, "rb") if packed.exists() else path.open("rb") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _judged(folder: Path) -> list[str]:
    """Return the ids of the queries that ``test.tsv`` judges, in its order."""
    path = folder / "test.tsv"
    if not path.exists():
        raise InvalidInput(f"There is no {path}, which names the test queries of a BEIR set.")
    rows = path.read_text(encoding="utf-8").splitlines()[1:]  # below a heading
    return list(dict.fromkeys(row.split("\t")[0] for row in rows if row.strip()))


def _distinct(texts: list[str], seen: set[str]) -> list[str]:
    """Leave out repeats, and texts that say the same as one already seen."""
    kept: dict[str, str] = {}
    for text in texts:
        kept.setdefault(fold(text), text)
    return [text for folded, text in kept.items() if folded and folded not in seen]


def _prepare(
    name: str, keys: Array, train: Array, test: Array, cache: Path, progress: Progress
) -> Dataset:
    if keys.ndim != 2 or len(keys) == 0:
        raise InvalidInput(f"The keys of {name} have shape {keys.shape}; they must be (n, dim).")
    learn, report = (normalise(as_queries(array, keys.shape[1])[0]) for array in (train, test))
    reported = {row.tobytes() for row in report}
    fresh = np.array([row.tobytes() not in reported for row in learn])
    if not fresh.all():
        warnings.warn(
            f"{(~fresh).sum()} training queries of {name} are test queries too and are left out.",
            stacklevel=3,
        )
        learn = learn[fresh]
    digest = hashlib.blake2b(digest_size=6)
    for array in (keys, learn, report):
        digest.update(str((array.shape, array.dtype)).encode())
        for low in range(0, len(array), _BLOCK):
            digest.update(array[low : low + _BLOCK].tobytes())
    folder = cache / f"{name.replace(' ', '-')}-{digest.hexdigest()}"
    folder.mkdir(parents=True, exist_ok=True)
    unit_keys = _unit_keys(keys, folder / "keys.npy", progress)
    return Dataset(name, unit_keys, learn, report, folder)


def _unit_keys(keys: Array, path: Path, progress: Progress) -> FloatArray:
    if not path.exists():
        temporary = path.with_name("keys.tmp.npy")
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=keys.shape)
        with progress("prepare keys", len(keys), 0, "keys") as step:
            for low in range(0, len(keys), _BLOCK):
                block = as_queries(keys[low : low + _BLOCK], keys.shape[1])[0]
                out[low : low + _BLOCK] = normalise(block)
                step.advance(len(block))
        out.flush()
        del out
        temporary.replace(path)
    mapped: FloatArray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped
