from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks import overhead, proxied
from benchmarks.protocols import PROTOCOLS
from benchmarks.routing import REWRITERS, ROUTERS, main
from tests.support.training_data import clustered_keys, narrow_queries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
DIM = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries that look at few directions: learned routers have something to learn."""
    folder = tmp_path_factory.mktemp("data") / "narrow"
    folder.mkdir()
    queries = narrow_queries(900, DIM)
    np.save(folder / "keys.npy", clustered_keys(1_500, DIM))
    np.save(folder / "queries_train.npy", queries[:700])
    np.save(folder / "queries_test.npy", queries[700:])
    return folder


def bench(folder: Path, *options: str) -> Result:
    home = folder.parent
    paths = ["--cache", str(home / "cache"), "--out", str(home / "out")]
    small = ["--cells", "16", "--seeds", "1", "--lists", "12", *paths]
    result = CliRunner().invoke(main, [str(folder), *small, *options])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def measured(folder: Path) -> tuple[Result, list[dict[str, Any]]]:
    path = folder.parent / "rows.json"
    result = bench(folder, "--json", str(path))
    return result, json.loads(path.read_text())


@pytest.mark.nightly
def test_rows_say_what_was_asked_for(measured: tuple[Result, list[dict[str, Any]]]) -> None:
    _, rows = measured
    for row in rows:
        assert set(row) >= {
            *("cells", "layout", "router", "protocol", "k", "recall", "seed"),
            *("scanned", "model", "total"),
        }
    assert {(row["protocol"], row["layout"], row["router"]) for row in rows} == {
        (protocol, layout, router)
        for protocol in PROTOCOLS
        for layout in ("native", "query-aware")
        for router in (*ROUTERS, *REWRITERS)
        if layout == "native" or router not in ("centroids-kmeans", *REWRITERS)
    }


def test_totals_add_up_and_grow_with_the_recall(
    measured: tuple[Result, list[dict[str, Any]]],
) -> None:
    _, rows = measured
    for row in rows:
        assert row["model"] > 0
        if row["total"] is not None:
            assert row["total"] == pytest.approx(row["scanned"] + row["model"])
            assert row["scanned"] <= 1 + 1e-6
    for one, next_one in pairwise(rows):
        same = all(one[name] == next_one[name] for name in ("protocol", "layout", "router", "k"))
        if same and next_one["total"] is not None:
            assert one["total"] <= next_one["total"]


def test_what_is_learned_beats_centroids_where_there_is_something_to_learn(
    measured: tuple[Result, list[dict[str, Any]]],
) -> None:
    _, rows = measured

    def total(layout: str, router: str) -> float:
        (found,) = (
            row["total"]
            for row in rows
            if (row["protocol"], row["layout"], row["router"]) == ("unseen", layout, router)
            and (row["k"], row["recall"]) == (10, 0.9)
        )
        return float(found)

    assert total("query-aware", "linear") < total("native", "linear")
    assert total("native", "linear") < total("native", "centroids")


def test_tables_are_printed_and_pictures_drawn(
    folder: Path, measured: tuple[Result, list[dict[str, Any]]]
) -> None:
    result, _ = measured
    assert "FLATTERS" in result.output
    assert "| recall@10 0.90" in result.output
    for protocol in PROTOCOLS:
        for suffix in ("png", "svg"):
            assert (folder.parent / "out" / f"narrow-{protocol}-10.{suffix}").stat().st_size > 1_000


def test_a_second_run_measures_only_what_is_missing(
    folder: Path, measured: tuple[Result, list[dict[str, Any]]], tmp_path: Path
) -> None:
    _, rows = measured
    path = tmp_path / "rows.json"
    kept = [row for row in rows if (row["protocol"], row["router"]) != ("unseen", "centroids")]
    path.write_text(json.dumps(kept))
    bench(folder, "--json", str(path), "--protocols", "unseen")
    again = json.loads(path.read_text())
    assert again[: len(kept)] == kept
    assert {row["router"] for row in again[len(kept) :]} == {"centroids"}
    for new in again[len(kept) :]:
        old = next(row for row in rows if all(row[n] == new[n] for n in row if n != "seconds"))
        assert old["total"] == new["total"]


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    for options, message in (
        ([str(tmp_path / "none")], "name a folder"),
        ([str(tmp_path), "--cells", "many"], "pass whole numbers"),
        ([str(tmp_path), "--only", "magic"], "there is no 'magic'"),
    ):
        result = CliRunner().invoke(main, [*options, "--cache", str(tmp_path / "cache")])
        assert result.exit_code != 0
        assert message in result.output
        assert "Traceback" not in result.output


def test_a_file_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"rows": 1}')
    result = CliRunner().invoke(main, [str(folder), "--json", str(path)])
    assert "holds no rows of this benchmark" in result.output


@pytest.mark.parametrize("name", ["routing", "overhead", "proxied"])
def test_it_runs_as_a_file(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)  # noqa: S603 - our own file
    assert "Usage" in shown.stdout


def test_overhead_prints_a_row_for_every_hook(tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    options = ["--calls", "60", "--rounds", "2", "--cells", "16", "--dim", "8", "--probes", "3"]
    result = CliRunner().invoke(overhead.main, [*options, "--json", str(path)])
    assert result.exit_code == 0, result.output
    rows = [row for row in json.loads(path.read_text()) if "hook" in row]
    assert [row["hook"] for row in rows] == ["native", "linear", "supportnet", "keynet"]
    for row in rows:
        assert 0 < row["plan_p50"] <= row["plan_p99"]
        assert 0 < row["search_p50"] <= row["search_p99"]
        assert 0 < row["client_p50"] <= row["client_p99"]
        assert row["ratio"] > 1
    assert rows[0]["batch"] < min(row["batch"] for row in rows[1:])


@pytest.mark.slow
def test_a_routed_client_is_measured_in_every_situation(tmp_path: Path) -> None:
    path = tmp_path / "proxied.json"
    result = CliRunner().invoke(
        proxied.main, ["--calls", "20", "--rounds", "1", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert len({row["situation"] for row in rows}) == len(rows) == 5
    assert {row["checkout"] for row in rows} == {ROOT.name}


def test_overhead_takes_each_figure_from_its_best_round() -> None:
    names = overhead.Timing.__struct_fields__[1:]
    first = overhead.Timing(hook="linear", **dict.fromkeys(names, 2.0))
    second = msgspec.structs.replace(first, plan_p50=1.0, ratio=3.0)
    assert overhead.best([first, second]) == msgspec.structs.replace(first, plan_p50=1.0)
