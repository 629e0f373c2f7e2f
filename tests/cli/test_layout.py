"""``amips layout`` and ``amips backfill``, on a collection in memory."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from amips_plugins import MemoryCollection, Registry
from amips_plugins.adapters import connect
from amips_plugins.adapters.memory.layouts import MemoryLayouts
from amips_plugins.cell_layout import BuildPlan, LayoutSpec
from amips_plugins.cli import main
from amips_plugins.cli.output import duration, size
from amips_plugins.collection import CollectionInfo
from amips_plugins.collection.construction import Construction
from amips_plugins.collection.sizing import Kept
from tests.support.bundles import (
    COUNT,
    N_CELLS,
    memory,
    open_bundle,
    other_cells,
    vectors,
    write_bundle,
)

URI = "milvus://localhost:1?collection=docs"


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryCollection:
    """The collection behind URI; the registry in the working folder has bundle v1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMIPS_REGISTRY", raising=False)
    Registry("registry").publish(write_bundle(tmp_path / "v1"))
    made = memory()
    monkeypatch.setattr(connect, "connect", lambda _: made)
    return made


@pytest.fixture
def amips(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def run(*arguments: str, fails: int = 0) -> tuple[str, str]:
        try:
            main(list(arguments))
            code: Any = 0
        except SystemExit as exc:
            code = exc.code
        out, err = capsys.readouterr()
        assert code == fails, err
        return out, err

    return run


Amips = Callable[..., tuple[str, str]]


def terminal(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """A terminal, and somebody who types."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda *_: answer)


def test_a_script_is_not_asked(collection: MemoryCollection, amips: Amips) -> None:
    out, err = amips("layout", URI)
    layout = open_bundle(Path("v1")).manifest.layout
    assert out == f"'docs' has {COUNT} keys in {N_CELLS} cells (layout {layout}).\n"
    assert f"{COUNT} of {COUNT} keys" in err
    assert collection.layout() == layout


def test_to_do_it_again_is_no_error(collection: MemoryCollection, amips: Amips) -> None:
    first, _ = amips("layout", URI)
    again, err = amips("layout", URI)
    assert (again, err) == (first.replace(").", "), as before."), "")
    out, _ = amips("layout", URI, "--dry-run")
    assert "these cells are there already" in out
    assert collection.layouts.status().older == ()


def test_a_dry_run_says_what_fits_into_a_memory(
    collection: MemoryCollection, amips: Amips, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, err = amips("layout", URI, "--dry-run", "--memory", "1", fails=1)
    assert "leave out --memory" in err
    built = Construction((), kept=Kept("HNSW"))
    monkeypatch.setattr(collection, "describe", lambda: built)
    out, _ = amips("layout", URI, "--dry-run", "--memory", "1")
    assert "Its FLAT index and ids take" in out  # what the copy gets
    out, _ = amips("layout", URI, "--dry-run", "--memory", "1", "--index", "auto")
    assert "Its HNSW index and ids take" in out
    assert collection.layout() is None


def test_a_dry_run_changes_nothing(collection: MemoryCollection, amips: Amips) -> None:
    out, err = amips("layout", URI, "--dry-run")
    assert out.splitlines() == [
        f"'docs', {COUNT} keys:",
        f"  1. give {COUNT} keys one of {N_CELLS} cells",
        f"About {8 * COUNT} bytes more to store, less than a second.",
    ]
    assert err == ""
    out, _ = amips("layout", URI, "--dry-run", "--json")
    assert json.loads(out) == {
        "steps": [f"give {COUNT} keys one of {N_CELLS} cells"],
        "keys": COUNT,
        "n_bytes": 8 * COUNT,
        "seconds": 0.0,
        "notes": [],
    }
    assert collection.layout() is None
    assert not Path(".amips").exists()


@pytest.mark.parametrize(("answer", "built"), [("", True), ("y", True), ("n", False)])
def test_a_person_is_asked(
    collection: MemoryCollection,
    amips: Amips,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    built: bool,
) -> None:
    terminal(monkeypatch, answer)
    out, err = amips("layout", URI, "--json")
    assert f"1. give {COUNT} keys" in err
    assert (collection.layout() is not None) == built
    assert (json.loads(out)["layout"] == collection.layout()) if built else (out == "")


def test_a_person_may_say_yes_before(
    collection: MemoryCollection, amips: Amips, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal(monkeypatch, "n")
    _, err = amips("layout", "--yes", URI)
    assert "1. give" not in err
    assert collection.layout() is not None


def test_status_rollback_and_drop_old(collection: MemoryCollection, amips: Amips) -> None:
    out, _ = amips("layout", "status", URI)
    assert [line.split() for line in out.splitlines()] == [
        ["collection", "docs"],
        ["layout", "none"],
        ["bundle", "-"],
        ["storage", "-"],
        ["keys", str(COUNT)],
        ["overflow", "-"],
        ["unfinished", "-"],
        ["older", "-"],
    ]
    amips("layout", URI)
    first = collection.layout()
    Registry("registry").publish(write_bundle(Path("v2"), version="v2", change=other_cells))
    out, _ = amips("layout", URI)
    assert f"Kept to roll back to: {first}. To drop it: amips layout drop-old" in out
    collection.upsert([1000, 1001], vectors(8, 2))
    out, _ = amips("layout", "status", URI)
    shown = dict(line.split(None, 1) for line in out.splitlines())
    assert shown["bundle"] == "v2"
    assert shown["overflow"] == f"2 ({2 / (COUNT + 2):.1%})"
    assert shown["older"] == first
    out, _ = amips("layout", "status", URI, "--json")
    assert json.loads(out) == {
        "name": "docs",
        "layout": collection.layout(),
        "version": "v2",
        "storage": "memory",
        "count": COUNT + 2,
        "overflow": 2,
        "unfinished": [],
        "older": [first],
        "sizes": [],
        "notes": [],
    }
    out, _ = amips("layout", "rollback", URI)
    assert out == f"'docs' serves, in the cells {first}.\n"
    assert collection.layout() == first
    out, _ = amips("layout", "rollback", URI)
    assert out == "'docs' serves, without cells.\n"
    _, err = amips("layout", "rollback", URI, fails=1)
    assert err.startswith("Error: 'docs' has no earlier cells")


def test_old_cells_are_dropped_on_request(
    collection: MemoryCollection, amips: Amips, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = amips("layout", "drop-old", URI)
    assert out == "There is nothing to drop.\n"
    amips("layout", URI, "--drop-old")
    first = collection.layout()
    Registry("registry").publish(write_bundle(Path("v2"), version="v2", change=other_cells))
    amips("layout", URI)
    with monkeypatch.context() as patch:
        terminal(patch, "")
        out, err = amips("layout", "drop-old", URI)
        assert f"This drops: {first}." in err
        assert out == ""
    _, err = amips("layout", "drop-old", URI, fails=1)
    assert err.endswith(f"This drops: {first}. Nobody is there to ask whether it may: add --yes.\n")
    out, _ = amips("layout", "drop-old", URI, "--dry-run")
    assert out == f"'docs' serves. This drops: {first}.\n"
    assert collection.layouts.status().older == (first,)
    out, _ = amips("layout", "drop-old", URI, "--yes")
    assert out == f"Dropped: {first}.\n"
    second = collection.layout()
    out, _ = amips("layout", URI, "--bundle", "v1", "--drop-old")
    assert out.splitlines()[1] == f"Dropped: {second}."
    assert (collection.layout(), collection.layouts.status().older) == (first, ())


class Noting(MemoryCollection):
    specs: list[LayoutSpec]

    @property
    def info(self) -> CollectionInfo:
        return replace(super().info, family="docs")

    @property
    def layouts(self) -> MemoryLayouts:
        specs = self.specs

        class Layouts(MemoryLayouts):
            def plan(self, spec: LayoutSpec) -> BuildPlan:
                specs.append(spec)
                return super().plan(spec)

        return Layouts(self)


@pytest.mark.usefixtures("collection")
def test_options_reach_the_database(amips: Amips, monkeypatch: pytest.MonkeyPatch) -> None:
    noting = Noting(vectors(), name="docs__g4")
    noting.specs = []
    monkeypatch.setattr(connect, "connect", lambda _: noting)
    amips("layout", URI, "--dry-run")
    amips("layout", URI.replace(":1", ":2"), "--dry-run")
    amips(
        *("layout", "--storage", "field", "--index", "auto", "--alias", "live"),
        *("--work", "here", "--dry-run", "--registry", "registry", "--bundle", "v1", URI),
    )
    default, elsewhere, chosen = noting.specs
    assert (default.storage, default.index, default.alias) == (None, "flat", None)
    # One folder for all generations of a collection, another one for another server.
    assert default.work is not None
    assert default.work.parent == Path(".amips")
    assert default.work.name.startswith(f"memory-docs-{default.layout}-")
    assert elsewhere.work != default.work
    assert (chosen.storage, chosen.index, chosen.alias) == ("field", "auto", "live")
    assert (chosen.work, chosen.version) == (Path("here"), "v1")


def test_backfill(collection: MemoryCollection, amips: Amips) -> None:
    _, err = amips("backfill", URI, fails=1)
    assert err == "Error: 'docs' has no cells to give; lay it out first: amips layout.\n"
    amips("layout", URI)
    collection.upsert(range(1000, 1020), vectors(8, 20))
    # By the bundle that the cells come from, not by a newer one.
    Registry("registry").publish(write_bundle(Path("v2"), version="v2", change=other_cells))
    out, err = amips("backfill", URI)
    assert out == "20 keys got their cells; 0 have none.\n"
    assert "20 of 20 keys" in err
    out, _ = amips("backfill", URI, "--json")
    assert json.loads(out) == {"placed": 0, "overflow": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layout", URI, "--registry", "empty"], "amips publish"),
        (["layout", URI, "--bundle", "v9"], "There is no bundle at"),
        (["backfill", URI, "--registry", "empty"], "amips publish"),
    ],
)
def test_bad_input_is_one_sentence(
    collection: MemoryCollection, amips: Amips, arguments: list[str], message: str
) -> None:
    out, err = amips(*arguments, fails=1)
    assert out == ""
    assert err.startswith("Error: ")
    assert message in err
    assert err.count("\n") == 1
    assert collection.layout() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layout", "--yes"], "Missing argument 'URI'"),
        (["layout", URI, "--storage", "paper"], "'paper' is not one of 'partitions', 'field'"),
        (["layout", "status"], "Missing argument 'URI'"),
        (["layout", URI, "status"], "unexpected extra argument"),
    ],
)
def test_bad_usage(amips: Amips, arguments: list[str], message: str) -> None:
    _, err = amips(*arguments, fails=2)
    assert message in err


def test_help_shows_both_ways_to_call_it(amips: Amips) -> None:
    out, _ = amips("layout", "--help")
    assert "amips layout [OPTIONS] URI" in out
    for part in ("--dry-run", "--drop-old", "status", "rollback", ".amips/DATABASE-NAME"):
        assert part in out
    assert "  build" not in out


@pytest.mark.usefixtures("collection")
def test_an_interrupted_layout_says_how_to_go_on(
    amips: Amips, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MemoryLayouts, "build", interrupt)
    _, err = amips("layout", URI, fails=130)
    assert f"amips layout {shlex.quote(URI)}" in err


def test_figures_for_people() -> None:
    sizes: dict[float, str] = {0: "0 bytes", 999: "999 bytes", 1000: "1.0 kB", 2_500_000: "2.5 MB"}
    sizes |= {1e9: "1.0 GB", 3.2e12: "3.2 TB", 9e15: "9000.0 TB"}
    assert {value: size(value) for value in sizes} == sizes
    times = {0: "less than a second", 1: "1 seconds", 119: "119 seconds", 120: "2 minutes"}
    times |= {7199: "120 minutes", 7200: "2 hours"}
    assert {value: duration(value) for value in times} == times
