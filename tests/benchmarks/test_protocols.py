from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amips_plugins.export.dataset import TrainingTask
from amips_plugins.progress import no_progress
from amips_plugins.vectors import FloatArray, Metric, normalise
from benchmarks.data import Dataset
from benchmarks.protocols import PROTOCOLS, Protocol, as_l2, pose
from tests.support.training_data import clustered_keys, gaussian

N_TRAIN, N_TEST = 300, 40


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(
        "made up",
        normalise(clustered_keys(400, 24)),
        normalise(gaussian(N_TRAIN, 24, 5)),
        normalise(gaussian(N_TEST, 24, 6)),
        tmp_path,
    )


def posed(dataset: Dataset, protocol: Protocol, seed: int = 0) -> TrainingTask:
    return pose(dataset, protocol, seed, dataset.cache, no_progress)


def rows(queries: FloatArray) -> set[bytes]:
    return {query.tobytes() for query in queries}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_hits_are_exact(dataset: Dataset, protocol: Protocol) -> None:
    task = posed(dataset, protocol)
    for split in (task.train, task.validate, task.calibrate, task.test):
        products = split.unit @ dataset.keys.T
        best = np.sort(products, axis=1)[:, ::-1][:, :30]
        found = np.take_along_axis(products, split.hits, axis=1)
        np.testing.assert_allclose(found, best, atol=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_learned_from_is_split_by_query(dataset: Dataset, protocol: Protocol) -> None:
    task = posed(dataset, protocol)
    train, validate = rows(task.train.queries), rows(task.validate.queries)
    calibrate = rows(task.calibrate.queries)
    assert not train & validate
    assert not train & calibrate
    assert not validate & calibrate
    assert not (train | validate | calibrate) & rows(dataset.test)


def test_unseen_reports_on_the_test_queries_alone(dataset: Dataset) -> None:
    task = posed(dataset, "unseen")
    np.testing.assert_array_equal(task.test.queries, dataset.test)
    assert len(task.train.queries) == N_TRAIN - 2 * (N_TRAIN // 20)


def test_noise_split_tests_on_near_twins(dataset: Dataset) -> None:
    task = posed(dataset, "noise-split")
    assert len(task.test.queries) == N_TEST
    twins = (task.test.queries @ task.train.queries.T).max(axis=1) > 0.95
    assert twins.mean() > 0.7
    unseen = posed(dataset, "unseen")
    assert ((unseen.test.queries @ unseen.train.queries.T).max(axis=1) < 0.95).all()


def test_zipf_traffic_repeats_queries_of_the_log(dataset: Dataset) -> None:
    task = posed(dataset, "zipf")
    assert len(rows(task.test.queries)) < N_TEST
    seen = rows(task.train.queries)
    assert len(seen) == len(task.train.queries) < N_TRAIN  # distinct, of a log with repeats
    repeated = np.mean([query.tobytes() in seen for query in task.test.queries])
    assert repeated > 0.5


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_seed_decides_the_split(dataset: Dataset, protocol: Protocol) -> None:
    one, same, other = (posed(dataset, protocol, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.train.queries, same.train.queries)
    assert rows(one.validate.queries) != rows(other.validate.queries)


def test_an_l2_index_sees_the_same_problem(dataset: Dataset) -> None:
    task = posed(dataset, "unseen")
    lifted = as_l2(task)
    assert lifted.metric is Metric.L2
    distances = ((lifted.test.queries[:, None] - dataset.keys[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(distances.argmin(axis=1), task.test.hits[:, 0])
