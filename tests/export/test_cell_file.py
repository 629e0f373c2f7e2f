from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter, Registry, connect
from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.bundle.package import Bundle
from amips_plugins.cli import main
from amips_plugins.errors import BundleMismatch, InvalidInput
from amips_plugins.export.cell_file import write_snapshot
from amips_plugins.export.snapshot import Snapshot, take_snapshot
from amips_plugins.vectors import Metric
from tests.support.bundles import (
    COUNT,
    N_CELLS,
    laid_out,
    memory,
    open_bundle,
    vectors,
    write_bundle,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return open_bundle(write_bundle(tmp_path / "v1"))


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return take_snapshot(memory(), tmp_path / "snap")


def test_a_router_finds_in_the_file_what_it_finds_in_the_collection(
    tmp_path: Path, snapshot: Snapshot, bundle: Bundle
) -> None:
    write_snapshot(snapshot, bundle, tmp_path / "docs.cells", 8)
    source = laid_out(tmp_path / "v1")
    with connect(f"cells://{tmp_path}/docs.cells") as collection:
        assert collection.layout() == source.layout()
        assert (collection.count(), collection.overflow()) == (COUNT, 0)
        status = collection.layouts.status()
        assert (status.version, status.storage) == ("v1", "cell file")
        asked = vectors(9, 20)
        mine = LearnedRouter(collection, bundle=bundle, refresh=None)
        other = LearnedRouter(source, bundle=bundle, refresh=None)
        for query in asked:
            found, wanted = (one.search(query, k=3, explain=True) for one in (mine, other))
            assert found.trace.mode == wanted.trace.mode
            assert [hit.id for hit in found] == [hit.id for hit in wanted]
            np.testing.assert_allclose(
                [hit.score for hit in found], [hit.score for hit in wanted], rtol=1e-5
            )
        mine.upsert([1000], asked[:1])  # into the cell that the bundle gives it
        assert (collection.count(), collection.overflow()) == (COUNT + 1, 0)
        assert mine.search(asked[0], k=1)[0].id == 1000


def test_what_cannot_be_written(tmp_path: Path, snapshot: Snapshot, bundle: Bundle) -> None:
    out = tmp_path / "docs.cells"
    others = take_snapshot(
        MemoryCollection(vectors(77), None, Metric.COSINE, "docs"), tmp_path / "others"
    )
    with pytest.raises(BundleMismatch, match="other keys"):
        write_snapshot(others, bundle, out)
    named = take_snapshot(memory(name="else"), tmp_path / "else")
    with pytest.raises(BundleMismatch, match="collection"):
        write_snapshot(named, bundle, out)
    with pytest.raises(InvalidInput, match="2, 4 or 8 bits"):
        write_snapshot(snapshot, bundle, out, 3)
    keynet = open_bundle(write_bundle(tmp_path / "k", model="keynet", layout="", n_cells=0))
    with pytest.raises(InvalidInput, match="no cells"):
        write_snapshot(snapshot, keynet, out)
    spilt = open_bundle(write_bundle(tmp_path / "s", copies=5))
    with pytest.raises(InvalidInput, match="--spill 0"):
        write_snapshot(snapshot, spilt, out)
    ids = tmp_path / "snap" / "ids.jsonl"
    for odd, match in (("10", "id 10 comes more than once"), ('""', "not some of each")):
        ids.write_text(ids.read_text().rsplit("\n", 2)[0] + f"\n{odd}\n")
        with pytest.raises(InvalidInput, match=match):
            write_snapshot(Snapshot.open(tmp_path / "snap"), bundle, out)
    assert not out.exists()


def test_too_little_room_is_said_before(
    tmp_path: Path, snapshot: Snapshot, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(InvalidInput, match="make room"):
        write_snapshot(snapshot, bundle, tmp_path / "docs.cells")


Amips = Callable[..., tuple[str, str]]


@pytest.fixture
def amips(capsys: pytest.CaptureFixture[str]) -> Amips:
    def run(*arguments: str, fails: int = 0) -> tuple[str, str]:
        code: Any = 0
        try:
            main(list(arguments))
        except SystemExit as exc:
            code = exc.code
        out, err = capsys.readouterr()
        assert code == fails, err
        return out, err

    return run


@pytest.mark.usefixtures("snapshot")
def test_the_command(tmp_path: Path, amips: Amips, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMIPS_REGISTRY", raising=False)
    Registry("registry").publish(tmp_path / write_bundle(tmp_path / "v1"))
    file = tmp_path / "docs.cells"
    out, err = amips("cell-file", "snap", "-o", str(file), "--dry-run")
    assert out.startswith(f"{COUNT} keys would be in {N_CELLS} cells of ")
    assert "30 to 100 kB" in err
    assert not file.exists()
    found = json.loads(amips("cell-file", "snap", "-o", str(file), "--bits", "4", "--json")[0])
    assert (found["keys"], found["cells"], found["file"]) == (COUNT, N_CELLS, str(file))
    assert found["n_bytes"] == pytest.approx(file.stat().st_size, rel=0.2)
    status = json.loads(amips("layout", "status", f"cells://{file}", "--json")[0])
    assert (status["count"], status["storage"], status["version"]) == (COUNT, "cell file", "v1")
    # The registry's bundle serves it: a copy is searched by the bundles of what it is a copy of.
    router = LearnedRouter(connect(f"cells://{file}"))
    assert router.search(vectors(9, 1)[0], k=3).trace.version == "v1"
    connect(f"cells://{file}").upsert([COUNT], vectors(5, 1))
    assert json.loads(amips("backfill", f"cells://{file}", "--json")[0]) == {
        "placed": 1,
        "overflow": 0,
    }
    out, err = amips("layout", "rollback", f"cells://{file}", "--yes", fails=1)
    assert "nothing is kept" in err
