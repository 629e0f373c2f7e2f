"""Stores that share a corpus, each with its own topics, and a router over all of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amips_plugins import Registry
from amips_plugins.bundle.contents import (
    CALIBRATION,
    GOLDEN_OUTPUTS,
    KEY_SAMPLE,
    MODEL,
    PARTITIONS,
    REFERENCE,
    BundleContents,
)
from amips_plugins.collection import Collection
from amips_plugins.models.given import GivenCells
from amips_plugins.partitions import Partitions
from amips_plugins.vectors import FloatArray, IntArray, Metric
from tests.handmade import _k_means, about, make_contents
from tests.integrations.corpus import DIM, calibration, documents, embed, unseen

NAMES = ("files", "text", "network", "rest")
_KEPT: tuple[Any, ...] = (CALIBRATION, GOLDEN_OUTPUTS, KEY_SAMPLE, MODEL, REFERENCE)


@functools.cache
def _cut() -> tuple[FloatArray, FloatArray, IntArray]:
    vectors = np.array([embed(text) for text, _ in documents()], dtype=np.float32)
    centroids = _k_means(vectors, len(NAMES))
    distances = -2 * vectors @ centroids.T + np.einsum("ij,ij->i", centroids, centroids)
    return vectors, centroids, distances.argmin(axis=1)


def rows_of(name: str) -> list[int]:
    found: list[int] = np.flatnonzero(_cut()[2] == NAMES.index(name)).tolist()
    return found


def texts_of(name: str) -> list[tuple[int, str, dict[str, object]]]:
    """Row, text and metadata of each document of a store."""
    known = documents()
    return [(row, *known[row]) for row in rows_of(name)]


def truth(question: str, k: int) -> list[tuple[str, object]]:
    """The store and the row of the best documents."""
    vectors, _, cells = _cut()
    best = np.argsort(-(vectors @ np.array(embed(question))), kind="stable")[:k]
    return [(NAMES[cells[row]], int(row)) for row in best]


def name_of(row: int) -> str:
    return NAMES[_cut()[2][row]]


def publish(several: Collection, folder: Path, field: str | None = None) -> Path:
    """Publish a router over the stores, or over a field's values, made by hand; its registry."""
    _, centroids, _ = _cut()
    partitions = Partitions(field, NAMES)
    batches = list(several.partitioned(partitions).scan(1_000))
    ids = [key for batch in batches for key in batch.ids]
    keys = np.concatenate([batch.vectors for batch in batches])
    cells = partitions.cells_of([value for batch in batches for value in batch.values or ()])
    made = make_contents(ids, keys, Metric.COSINE, centroids, calibration())
    values: dict[str, Any] = {name: made[name] for name in _KEPT}
    sizes = np.bincount(cells, minlength=len(NAMES))
    contents = BundleContents({**values, PARTITIONS: GivenCells(partitions, sizes)})
    contents.write(folder / "made", **about(several.info, len(keys), len(NAMES), 0.9))
    Registry(folder / "registry").publish(folder / "made")
    return folder / "registry"


def check_recall(answers: Sequence[Sequence[tuple[str, object]]], k: int) -> None:
    """What was found of the best, over questions that nothing has seen."""
    found = [
        len(set(answer) & set(truth(question, k))) / k
        for question, answer in zip(unseen(), answers, strict=False)
    ]
    assert np.mean(found) > 0.85


QUESTIONS = unseen()[:40]
assert len(embed(QUESTIONS[0])) == DIM
