"""Training queries: checking, splitting before anything else, and augmenting only then."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from amips_plugins.collection import CollectionKey
from amips_plugins.errors import InvalidInput, TrainingError
from amips_plugins.observe.sample import Sample, read_sample
from amips_plugins.vectors import FloatArray, Metric, as_queries

__all__ = [
    "QuerySplits",
    "augment",
    "guess_queries",
    "load_queries",
    "load_query_log",
    "split_queries",
]

_SHARES = (("train", 0.75), ("validate", 0.05), ("calibrate", 0.10), ("test", 0.10))
_FEWEST = 50


@dataclass(frozen=True)
class QuerySplits:
    """Distinct queries, no two splits share one.

    Attributes
    ----------
    train
        ``(n, dim)`` float32: what the models learn from.
    validate
        Stops the training and compares the candidates.
    calibrate
        Decides how many probes a recall target takes; untouched until then, which its guarantee
        needs.
    test
        Only ever reported on.
    source
        Whether they were logged or guessed from the keys.
    """

    train: FloatArray
    validate: FloatArray
    calibrate: FloatArray
    test: FloatArray
    source: Literal["log", "guess"]


def load_queries(path: str | Path, dim: int) -> FloatArray:
    """Read queries from a ``.npy`` file.

    Parameters
    ----------
    path
        A ``(n, dim)`` array of any float type.
    dim
        Dimension of the keys.

    Raises
    ------
    InvalidInput
        No such file, not an array, of another dimension, or with NaN.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as exc:
        raise InvalidInput(f"There is no file {path}; pass a .npy file of query vectors.") from exc
    except (ValueError, EOFError, OSError) as exc:
        raise InvalidInput(f"{path} is not a .npy array of query vectors ({exc}).") from exc
    if not isinstance(array, np.ndarray):
        array.close()
        raise InvalidInput(f"{path} is an archive; save the one array of query vectors as .npy.")
    if array.ndim != 2:
        raise InvalidInput(f"{path} has shape {array.shape}; pass query vectors of (n, {dim}).")
    return as_queries(array, dim)[0]


def load_query_log(
    path: str | Path, collection: CollectionKey, metric: Metric, dim: int
) -> FloatArray:
    """Read what query logs sampled, merged into one uniform sample of all they have seen.

    A file stands for the queries it has seen, however few it kept. So every file gives the same
    share of what it has seen: the share that the file which kept the least of them can give. The
    choice is the same at every reading.

    Parameters
    ----------
    path
        A file that a ``QueryLog`` wrote, or its folder.
    collection, metric, dim
        What is trained for.

    Returns
    -------
    numpy.ndarray
        ``(n, dim)`` float32, repeats included.

    Raises
    ------
    InvalidInput
        There is no log, a file is none, or it is of another collection, metric or dimension.
    MissingExtra
        pyarrow is not installed.
    """
    home = Path(path)
    files = sorted(home.glob("*.parquet")) if home.is_dir() else [home]
    if not files or not files[0].exists():
        raise InvalidInput(f"There is no query log {path}; pass the folder of a QueryLog.")
    samples = [_sample(file, collection, metric, dim) for file in files]
    samples = [sample for sample in samples if len(sample.queries)]
    if not samples:
        raise InvalidInput(f"The query log {path} holds no query yet; let it run for a while.")
    rate = min(len(sample.queries) / sample.header.seen for sample in samples)
    rng = np.random.default_rng(0)
    parts = []
    for sample in samples:
        kept = len(sample.queries)
        # Rounded up as often as the fraction says, so that small files keep their weight.
        wanted = min(kept, int(rate * sample.header.seen + rng.random() * (1.0 - 1e-9)))
        rows = np.sort(rng.permutation(kept)[:wanted])
        parts.append(sample.queries[rows])
    return as_queries(np.concatenate(parts), dim)[0]


def _sample(path: Path, collection: CollectionKey, metric: Metric, dim: int) -> Sample:
    """Read a file, and refuse what is of something else."""
    sample = read_sample(path)
    logged = sample.header
    for what, made_for, given in (
        ("collection", logged.collection, collection),
        ("metric", logged.metric, metric),
        ("dimension", logged.dim, dim),
    ):
        if made_for != given:
            raise InvalidInput(
                f"The query log {path} is of {what} {_spell(made_for)}, the snapshot of "
                f"{_spell(given)}; pass the log of the collection that is trained."
            )
    return sample


def _spell(value: CollectionKey | Metric | int) -> str:
    if isinstance(value, CollectionKey):
        return "/".join((value.database, value.name, value.field))
    return str(value)


def guess_queries(keys: FloatArray, count: int, seed: int, spread: float = 0.5) -> FloatArray:
    """Make up queries near the keys, for a collection that has no query log.

    A router trained on them is only as good as this guess; real queries usually lie elsewhere.

    Parameters
    ----------
    keys
        ``(n, dim)`` float32.
    count
        Number of queries.
    seed
        Same seed, same queries.
    spread
        Length of the random step away from a key, in lengths of the key.
    """
    warnings.warn(
        "No query log was given: training on perturbed keys. Such a router is only as good as "
        "that guess; collect real queries and train again.",
        stacklevel=2,
    )
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.integers(len(keys), size=count))
    chosen = np.asarray(keys[rows], dtype=np.float32)
    step = rng.standard_normal(chosen.shape, dtype=np.float32)
    step *= spread * np.linalg.norm(chosen, axis=1, keepdims=True) / np.sqrt(chosen.shape[1])
    return chosen + step


def split_queries(
    queries: FloatArray, seed: int, source: Literal["log", "guess"] = "log"
) -> QuerySplits:
    """Split by distinct query: a query's own bytes decide where it goes.

    Repeats of a query therefore share a split, and a query keeps its split when the log grows.

    Parameters
    ----------
    queries
        ``(n, dim)`` finite float32, repeats allowed.
    seed
        Another seed, another split.
    source
        Where the queries came from.

    Raises
    ------
    TrainingError
        There are too few distinct queries to fill every split.
    """
    distinct = np.unique(queries + np.float32(0.0), axis=0)  # -0.0 and 0.0 are the same query
    places = np.empty(len(distinct))
    for row, query in enumerate(distinct):
        digest = hashlib.blake2b(query.tobytes(), digest_size=8, salt=seed.to_bytes(8, "little"))
        # 53 bits are exact: all 64 could round up to 1, which is in no split.
        places[row] = (int.from_bytes(digest.digest(), "little") >> 11) / 2**53
    order = np.argsort(places)
    distinct, places = distinct[order], places[order]
    parts: dict[str, FloatArray] = {}
    low = 0.0
    for name, share in _SHARES:
        parts[name] = distinct[(places >= low) & (places < low + share)]
        low += share
    if len(distinct) < _FEWEST or min(len(part) for part in parts.values()) == 0:
        raise TrainingError(
            f"{len(distinct)} distinct queries are too few to train and to test on; collect at "
            f"least {_FEWEST}, better some thousands."
        )
    return QuerySplits(**parts, source=source)


def augment(queries: FloatArray, copies: int, std: float, seed: int) -> FloatArray:
    """Append noisy copies, rescaled to the length of their original (paper, section 4).

    Only ever used on the training split, after the split.

    Parameters
    ----------
    queries
        ``(n, dim)`` float32.
    copies
        Noisy copies of each.
    std
        Standard deviation of the noise in each coordinate of the unit query.
    seed
        Same seed, same noise.

    Returns
    -------
    numpy.ndarray
        ``((1 + copies) * n, dim)`` float32, the originals first.
    """
    if copies == 0:
        return queries
    rng = np.random.default_rng(seed)
    lengths = np.linalg.norm(queries, axis=1, keepdims=True)
    parts = [queries]
    for _ in range(copies):
        noise = rng.standard_normal(queries.shape, dtype=np.float32) * np.float32(std)
        noisy = queries + noise * lengths
        noisy *= lengths / np.maximum(np.linalg.norm(noisy, axis=1, keepdims=True), 1e-12)
        parts.append(noisy.astype(np.float32))
    return np.concatenate(parts)
