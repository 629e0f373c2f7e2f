from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins.bundle.contents import REFERENCE
from amips_plugins.bundle.loading import load_hook, load_reference
from amips_plugins.bundle.reference import REFERENCE_LIMIT, Reference
from amips_plugins.errors import BundleCorrupt
from amips_plugins.health.drift import compare, ks_p_value, outputs_of
from amips_plugins.models.hooks import NativeHook
from amips_plugins.vectors import FloatArray
from tests.support.bundles import DIM, N_CELLS, open_bundle, vectors, write_bundle


def normal(seed: int, count: int, width: int = 8, shift: float = 0.0) -> FloatArray:
    rows = np.random.default_rng(seed).standard_normal((count, width))
    rows[:, 0] += shift
    return rows.astype(np.float32)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 4), (5, 5), (6, 2)])
def test_p_values_by_counting_every_order(sizes: tuple[int, int]) -> None:
    n, m = sizes
    distances = []
    for ours in itertools.combinations(range(n + m), n):
        steps = np.isin(np.arange(n + m), ours)
        here, there = np.cumsum(steps) / n, np.cumsum(~steps) / m
        distances.append(round(float(np.abs(here - there).max()) * n * m))
    for distance in set(distances):
        share = np.mean([other >= distance for other in distances])
        assert ks_p_value(distance / (n * m), n, m) == pytest.approx(share)
    assert ks_p_value(0.0, n, m) == 1.0


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.floats(0.0, 3.0),
    st.integers(0, 2**32 - 1),
)
@pytest.mark.slow
def test_p_values_of_scipy(n: int, m: int, shift: float, seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    ours, theirs = rng.standard_normal(n), rng.standard_normal(m) + shift
    wanted = stats.ks_2samp(ours, theirs, method="exact")
    found = ks_p_value(float(wanted.statistic), n, m)
    assert found == pytest.approx(float(wanted.pvalue), rel=1e-6, abs=1e-12)


def test_a_tail_that_a_difference_from_one_would_lose() -> None:
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.ks_2samp(np.arange(300), np.arange(300) + 250.5, method="exact")
    assert 0.0 < wanted.pvalue < 1e-60
    assert ks_p_value(float(wanted.statistic), 300, 300) == pytest.approx(float(wanted.pvalue))


@pytest.mark.slow
def test_queries_of_the_same_distribution_are_no_drift() -> None:
    found = []
    for seed in range(300):
        reference = Reference.of(normal(2 * seed, 300))
        found.append(compare(reference, normal(2 * seed + 1, 200)).p_value)
    # Bonferroni errs towards 1, so there are at most as many small ones as chance allows.
    for level in (0.05, 0.2):
        assert np.mean(np.array(found) <= level) <= level + 3 * np.sqrt(level / 300)
    assert np.mean(np.array(found) <= 0.5) > 0.2  # or the test would have no power at all


@pytest.mark.parametrize(("shift", "is_drift"), [(0.0, False), (0.4, True)])
def test_one_output_that_moves_is_drift(shift: float, is_drift: bool) -> None:
    reference = Reference.of(normal(0, 512, 64))
    drift = compare(reference, normal(1, 500, 64, shift))
    assert (drift.found, drift.n) == (is_drift, 500)


def test_ties_are_no_drift() -> None:
    same = Reference.of(np.zeros((100, 3), dtype=np.float32))
    assert compare(same, np.zeros((50, 3), dtype=np.float32)).p_value == 1.0


def test_a_reference_survives_its_file() -> None:
    outputs = normal(0, 700)
    reference = Reference.of(outputs)
    again = Reference.from_bytes(reference.to_bytes())
    np.testing.assert_array_equal(again.outputs, np.sort(outputs[:512], axis=0))


def test_no_row_of_the_file_is_a_query_s() -> None:
    outputs = normal(0, 200)
    kept = Reference.of(outputs).outputs
    rows = {row.tobytes() for row in outputs}
    assert not rows & {row.tobytes() for row in kept}


def test_many_outputs_take_fewer_queries() -> None:
    wide = Reference.of(normal(0, 512, 20_000))
    assert len(wide.outputs) < 512
    assert len(wide.to_bytes()) <= REFERENCE_LIMIT


def archive(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type] # whatever numpy takes
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"nothing",
        archive(),
        archive(other=np.zeros((2, 2), dtype=np.float32)),
        archive(outputs=np.zeros(3, dtype=np.float32)),
        archive(outputs=np.zeros((0, 3), dtype=np.float32)),
        archive(outputs=np.array([[1.0], [0.0]], dtype=np.float32)),
        archive(outputs=np.array([[0.0], [np.nan]], dtype=np.float32)),
        archive(outputs=np.array([[0.0], [np.inf]], dtype=np.float32)),
    ],
)
def test_a_bad_reference_is_refused(data: bytes) -> None:
    with pytest.raises(BundleCorrupt, match="reference"):
        Reference.from_bytes(data)


@pytest.mark.parametrize("model", ["linear", "keynet"])
def test_a_bundle_s_reference_is_of_its_model(tmp_path: Path, model: str) -> None:
    bundle = open_bundle(write_bundle(tmp_path / model, model=model))
    reference = load_reference(bundle)
    assert reference is not None
    live = outputs_of(load_hook(bundle), vectors(seed=9, count=400))
    assert live is not None
    assert live.shape == (400, DIM if model == "keynet" else N_CELLS)
    assert not compare(reference, live).found
    away = outputs_of(load_hook(bundle), np.abs(vectors(seed=9, count=400)))
    assert away is not None
    assert compare(reference, away).found


def test_a_bundle_without_one_is_refused(tmp_path: Path) -> None:
    def change(files: dict[str, bytes]) -> None:
        del files[REFERENCE]

    with pytest.raises(BundleCorrupt, match=f"has no file '{REFERENCE}'"):
        load_reference(open_bundle(write_bundle(tmp_path / "old", change=change)))


def test_a_hook_without_a_model_says_nothing() -> None:
    assert outputs_of(NativeHook(), vectors()) is None


def test_a_reference_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    def change(files: dict[str, bytes]) -> None:
        files[REFERENCE] = Reference.of(normal(0, 10, N_CELLS + 1)).to_bytes()

    with pytest.raises(BundleCorrupt, match="fit"):
        load_reference(open_bundle(write_bundle(tmp_path / "odd", change=change)))
