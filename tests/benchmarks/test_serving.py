from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from amips_plugins.collection import Hit
from amips_plugins.errors import InvalidInput
from amips_plugins.vectors import FloatArray, normalise
from benchmarks import break_even
from benchmarks.data import Dataset
from benchmarks.enlarge import NOISE, enlarge
from benchmarks.serving import main
from benchmarks.serving_report import cost_table, draw, growth_table, payback_table
from benchmarks.serving_rows import Growth, Served, ServedStore, cheaper, growth
from benchmarks.traffic import Meter, drive, recall_of, smallest

ROOT = Path(__file__).resolve().parents[2]
QUERIES = np.arange(20, dtype=np.float32).reshape(10, 2)


def served(**changes: object) -> Served:
    row = Served(
        data="docs",
        keys=100_000,
        engine="milvus",
        method="IVF_FLAT",
        target=0.9,
        setting="nprobe 8",
        recall=0.91,
        scanned=None,
        p50=1.5,
        p99=3.0,
        rate_1=600.0,
        rate_4=900.0,
        rate_16=1000.0,
        rate_batch=4000.0,
        cpu=2.0,
        cpu_batch=0.5,
        cpu_client=0.4,
        build=20.0,
        build_cpu=30.0,
        memory=160.0,
    )
    return msgspec.structs.replace(row, **changes)


class TestEnlarge:
    @pytest.fixture
    def dataset(self, tmp_path: Path) -> Dataset:
        rng = np.random.default_rng(0)
        keys, queries = (normalise(rng.standard_normal((n, 24), dtype=np.float32)) for n in (50, 9))
        return Dataset("docs", keys, queries, queries, tmp_path)

    def test_repeats_are_noisy_and_of_unit_length(self, dataset: Dataset) -> None:
        keys = enlarge(dataset, 130).keys
        assert keys.shape == (130, 24)
        np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(keys[:50], dataset.keys, rtol=1e-5)
        cosines = (keys[50:] * dataset.keys[np.arange(50, 130) % 50]).sum(axis=1)
        assert cosines.mean() == pytest.approx(1 / math.hypot(1, NOISE), abs=0.01)
        assert len(np.unique(keys, axis=0)) == 130

    def test_fewer_keys_are_the_first_ones(self, dataset: Dataset) -> None:
        smaller = enlarge(dataset, 20)
        np.testing.assert_allclose(smaller.keys, dataset.keys[:20], rtol=1e-5)
        assert smaller.cache != dataset.cache  # the exact answers are others

    def test_another_run_finds_the_same_keys(self, dataset: Dataset) -> None:
        first = np.array(enlarge(dataset, 120).keys)
        np.testing.assert_array_equal(enlarge(dataset, 120).keys, first)


class TestSmallest:
    @pytest.mark.parametrize("wanted", [1, 2, 3, 7, 8, 9, 63, 64, 99, 100])
    def test_finds_the_first_that_reaches_the_target(self, wanted: int) -> None:
        tried: list[int] = []

        def reaches(setting: int) -> float:
            tried.append(setting)
            return 0.95 if setting >= wanted else 0.5

        assert smallest(reaches, 0.9, 1, 100) == wanted
        assert len(tried) == len(set(tried)) <= 15
        assert max(tried) <= min(100, 2 * wanted)  # large settings are dear

    def test_begins_where_it_may(self) -> None:
        assert smallest(lambda _: 1.0, 0.9, 10, 2_000) == 10

    def test_says_when_nothing_does(self) -> None:
        assert smallest(lambda _: 0.8, 0.9, 1, 37) is None


class TestDrive:
    def test_clients_ask_at_once_and_everything_is_counted(self) -> None:
        seen: list[bytes] = []
        most, now, lock = 0, 0, threading.Lock()

        def search(queries: FloatArray) -> list[list[Hit]]:
            nonlocal most, now
            with lock:
                now += 1
                most = max(most, now)
                seen.append(queries.tobytes())
            time.sleep(0.01)
            with lock:
                now -= 1
            return [[]]

        traffic = drive(search, QUERIES, clients=4, seconds=0.15)
        assert most == 4
        assert traffic.queries == len(seen) == len(traffic.latencies)
        assert len(set(seen)) == 10  # not one query again and again
        assert 10 <= traffic.quantile(0.5) <= traffic.quantile(0.99)
        assert traffic.rate == pytest.approx(traffic.queries / traffic.seconds)

    def test_batches_count_their_queries(self) -> None:
        traffic = drive(lambda queries: [[]] * len(queries), QUERIES, 1, 0.01, batch=5)
        assert traffic.queries == 5 * len(traffic.latencies)

    def test_a_failed_search_is_no_measurement(self) -> None:
        def search(_: FloatArray) -> list[list[Hit]]:
            raise OSError("gone")

        with pytest.raises(OSError, match="gone"):
            drive(search, QUERIES, 3, 0.01)

    def test_too_few_queries_for_a_batch(self) -> None:
        with pytest.raises(InvalidInput, match="too few for batches of 64"):
            drive(lambda _: [[]], QUERIES, 1, 0.01, batch=64)


def test_recall_counts_true_keys_among_the_first_k() -> None:
    hits = np.tile(np.arange(5), (10, 1))
    answer = [Hit(id=1, score=1.0), Hit(id=9, score=0.9), Hit(id=0, score=0.8)]
    assert recall_of(lambda queries: [answer] * len(queries), QUERIES, hits, 2) == 0.5


def test_the_meter_counts_this_process() -> None:
    meter = Meter(os.getpid())
    before, used = meter.cpu(), time.process_time()
    while time.process_time() - used < 0.3:
        pass
    assert meter.cpu() - before == pytest.approx(0.3, abs=0.15)
    assert meter.memory() > 10


class TestGrowth:
    def test_finds_the_line(self) -> None:
        rows = [served(keys=n, cpu=1.5 + 2.0 * n / 1e5) for n in (30_000, 100_000, 300_000)]
        found = growth(rows)
        assert found is not None
        assert (found.fixed, found.slope) == pytest.approx((1.5, 2.0))
        assert found.at(1_000_000) == pytest.approx(21.5)

    def test_cost_never_falls_with_the_keys(self) -> None:
        sizes = (30_000, 100_000, 300_000)
        falling = [served(keys=n, cpu=cpu) for n, cpu in zip(sizes, (2.0, 1.5, 1.0), strict=True)]
        assert growth(falling) == Growth(1.5, 0.0)

    def test_two_sizes_say_nothing(self) -> None:
        assert growth([served(), served(keys=200_000), served(keys=200_000)]) is None

    @pytest.mark.parametrize(
        ("one", "other", "where"),
        [
            (Growth(3.0, 1.0), Growth(1.0, 2.0), (2e5, math.inf)),
            (Growth(1.0, 2.0), Growth(3.0, 1.0), (0.0, 2e5)),
            (Growth(1.0, 1.0), Growth(2.0, 2.0), (0.0, math.inf)),
            (Growth(2.0, 2.0), Growth(1.0, 1.0), None),
            (Growth(1.0, 1.0), Growth(2.0, 1.0), (0.0, math.inf)),
            (Growth(2.0, 1.0), Growth(2.0, 1.0), None),
        ],
    )
    def test_where_one_is_cheaper(
        self, one: Growth, other: Growth, where: tuple[float, float] | None
    ) -> None:
        assert cheaper(one, other) == where


class TestReport:
    ROWS = tuple(
        served(keys=keys, engine=engine, method=method, target=target, cpu=cpu)
        for keys, factor in ((30_000, 0.3), (100_000, 1.0), (200_000, 2.0))
        for engine, method, target, cpu in (
            ("milvus", "IVF_FLAT", 0.9, 1.0 + 2.0 * factor),
            ("milvus", "cell field", 0.9, 1.5 + factor),
            ("milvus", "HNSW", 0.9, 0.9),
            ("edge", "full scan", 1.0, 9.0 * factor),
        )
    )

    def test_every_row_is_a_line(self) -> None:
        lines = cost_table(self.ROWS).splitlines()
        assert len(lines) == 2 + len(self.ROWS)
        assert len({line.count("|") for line in lines}) == 1
        assert "Qdrant Edge" in lines[2]

    def test_says_where_methods_meet(self) -> None:
        lines = {line.split("|")[3].strip(): line for line in growth_table(self.ROWS).splitlines()}
        assert "| from 50,000 keys" in lines["cell field"]
        assert "| never " in lines["cell field"]
        assert "never" not in lines["full scan"]  # of an engine without a rival

    def test_says_when_a_graph_pays(self) -> None:
        rows = [
            served(method="HNSW", cpu=1.0, build_cpu=70.0),
            served(cpu=3.0, build_cpu=30.0),
            served(method="cell field", cpu=2.0, build_cpu=20.0),
            served(method="partitions", cpu=0.5),
        ]
        lines = {line.split("|")[4].strip(): line for line in payback_table(rows).splitlines()}
        assert "| 20,000 " in lines["IVF_FLAT"]
        assert "| 20,000 " in lines["cell field"]  # with what its source took
        assert "| never " in lines["partitions"]
        assert "HNSW" not in lines

    def test_draws(self, tmp_path: Path) -> None:
        draw(self.ROWS, tmp_path / "figures" / "serving")
        for suffix in ("png", "svg"):
            assert (tmp_path / "figures" / f"serving.{suffix}").stat().st_size > 1_000
        draw([], tmp_path / "nothing")
        assert not (tmp_path / "nothing.png").exists()


class TestStore:
    def test_keeps_what_was_measured(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        ServedStore(path).add([served(), served(target=0.95)])
        store = ServedStore(path)
        assert store.rows == [served(), served(target=0.95)]
        assert store.has("docs", 100_000, "milvus", "IVF_FLAT")
        assert not store.has("docs", 300_000, "milvus", "IVF_FLAT")
        assert not store.has("docs", 100_000, "milvus", "HNSW")

    def test_refuses_something_else(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.json"
        path.write_text('{"rows": 1}')
        with pytest.raises(InvalidInput, match="holds no rows of this benchmark"):
            ServedStore(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["serving", "break_even"])
def test_it_runs_as_a_file(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)  # noqa: S603 - our own file
    assert "Usage" in shown.stdout


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    for options, message in (
        ([str(tmp_path / "none")], "name a folder"),
        ([str(tmp_path), "--keys", "many"], "pass whole numbers"),
        ([str(tmp_path), "--keys", "10"], "pass whole numbers"),
        ([str(tmp_path), "--only", "magic"], "there is no 'magic'"),
    ):
        result = CliRunner().invoke(main, [*options, "--cache", str(tmp_path / "cache")])
        assert result.exit_code != 0
        assert message in result.output
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("costs", "full", "share"),
    [([1.0, 2.0, 4.0], 3.0, 0.75), ([1.0, 2.0, 2.5], 3.0, 1.0), ([4.0, 5.0, 6.0], 3.0, 0.0)],
)
def test_cells_and_the_full_scan_meet(costs: list[float], full: float, share: float) -> None:
    assert break_even.crossing([0.25, 0.5, 1.0], costs, full) == share


@pytest.mark.slow
def test_break_even_of_a_real_engine() -> None:
    pytest.importorskip("qdrant_edge")
    small = ["edge", "--keys", "600", "--dim", "8", "--cells", "6"]
    result = CliRunner().invoke(break_even.main, small)
    assert result.exit_code == 0, result.output
    assert "| break-even share |" in result.output
