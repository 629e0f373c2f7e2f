"""Reading query vectors: a ``.npy`` file, or what a ``QueryLog`` sampled."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from amips_plugins.collection import CollectionKey
from amips_plugins.errors import InvalidInput
from amips_plugins.observe.sample import Sample, read_sample
from amips_plugins.vectors import FloatArray, Metric, as_queries

__all__ = ["load_queries", "load_query_log"]


def load_queries(path: str | Path, dim: int) -> FloatArray:
    """Read queries, ``(n, dim)``, from a ``.npy`` file, or raise ``InvalidInput``."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as exc:
        raise InvalidInput(f"There is no file {path}; pass a .npy file of query vectors.") from exc
    except OSError as exc:
        raise InvalidInput(f"{path} cannot be read as query vectors ({exc}).") from exc
    except (ValueError, EOFError) as exc:  # numpy would advise to load pickles
        raise InvalidInput(
            f"{path} is not a .npy array of query vectors; write it with numpy.save."
        ) from exc
    if not isinstance(array, np.ndarray):
        array.close()
        raise InvalidInput(f"{path} is an archive; save the one array of query vectors as .npy.")
    if array.ndim != 2:
        raise InvalidInput(f"{path} has shape {array.shape}; pass query vectors of (n, {dim}).")
    return as_queries(array, dim)[0]


def load_query_log(
    path: str | Path, collection: CollectionKey, metric: Metric, dim: int
) -> FloatArray:
    """Read what query logs sampled, merged into one uniform sample: ``(n, dim)``, repeats included.

    A file stands for the queries it has seen, however few it kept. So every file gives the same
    share of what it has seen: the share that the file which kept the least of them can give. The
    choice is the same at every reading. Raises ``InvalidInput`` where there is no log, or a file is
    none, or of another collection, metric or dimension.
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
                f"The query log {path} is of {what} {made_for}, the snapshot of {given}; pass the "
                f"log of the collection that is trained."
            )
    return sample
