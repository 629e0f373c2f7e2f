from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from amips_plugins.export.clustering import centroid_weights, native_cells
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.routers import native_candidate
from amips_plugins.export.targets import top_keys
from amips_plugins.progress import no_progress
from amips_plugins.vectors import FloatArray, Metric, normalise
from benchmarks.measuring import ivf_index, points, search_ivf, tuned_centroids
from tests.support.training_data import clustered_keys, gaussian

NLIST = 12
KEYS = normalise(clustered_keys(900, 16))
CELLS, ASSIGNMENT = native_cells(KEYS, Metric.COSINE, NLIST, 0)


def split(queries: FloatArray) -> Split:
    unit = normalise(queries)
    return Split(unit, unit, top_keys(unit, KEYS, 30, torch.device("cpu"))[0])


def near_keys(n: int, seed: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    return KEYS[rng.integers(len(KEYS), size=n)] + 0.3 * gaussian(n, 16, seed)


def test_every_nprobe_is_what_the_index_itself_gives() -> None:
    index = ivf_index(KEYS, centroid_weights(KEYS, ASSIGNMENT, CELLS, Metric.COSINE))
    asked = split(near_keys(70, 1))
    sent = normalise(asked.queries + 0.3 * gaussian(70, 16, 2))  # as if rewritten
    measured = search_ivf(index, sent, asked.hits, 30, 100.0)
    sizes = np.array([index.invlists.list_size(cell) for cell in range(NLIST)])
    assert sizes.sum() == len(KEYS)
    for nprobe in range(1, NLIST + 1):
        index.nprobe = nprobe
        _, fetched = index.search(sent, 30)
        # Rescored with the original query, as the product does it.
        scores = np.einsum("qd,qrd->qr", asked.queries, KEYS[fetched])
        scores[fetched < 0] = -np.inf
        order = np.argsort(-scores, axis=1)
        for k in (1, 10):
            best = np.take_along_axis(fetched, order[:, :k], axis=1)
            found = (asked.hits[:, :k, None] == best[:, None, :]).any(axis=2).mean()
            np.testing.assert_allclose(measured.recall[k][nprobe - 1], found)
        lists = index.quantizer.search(sent, nprobe)[1]
        scanned = sizes[lists].sum(axis=1).mean() / len(KEYS)
        np.testing.assert_allclose(measured.scanned[nprobe - 1], scanned)
    assert measured.model == 100.0 / len(KEYS)


def test_level_is_the_first_that_reaches_the_recall() -> None:
    index = ivf_index(KEYS, centroid_weights(KEYS, ASSIGNMENT, CELLS, Metric.COSINE))
    asked = split(near_keys(70, 1))
    measured = search_ivf(index, asked.queries, asked.hits, 10, 0.0)
    level = measured.level(10, 0.9)
    assert level is not None
    assert level > 0
    assert measured.recall[10][level] >= 0.9 > measured.recall[10][level - 1]
    assert measured.level(10, 1.1) is None


def test_tuned_centroids_cost_no_more_than_a_fixed_number_of_probes(tmp_path: Path) -> None:
    task = TrainingTask(
        keys=KEYS,
        lifted=KEYS,
        metric=Metric.COSINE,
        train=split(near_keys(200, 3)),
        validate=split(near_keys(400, 4)),
        calibrate=split(near_keys(50, 5)),
        test=split(near_keys(400, 6)),
        k=10,
        recall=0.9,
        seed=0,
        device=torch.device("cpu"),
        work=tmp_path,
        progress=no_progress,
    )
    native = native_candidate(task, CELLS, ASSIGNMENT)
    measure = tuned_centroids(native, task)
    for part in (task.validate, task.test):
        assert measure(part).cost(10, 0.9) < native.measure(part).cost(10, 0.9)
    assert points(measure(task.test)).model == NLIST / len(KEYS)
