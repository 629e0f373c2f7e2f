"""The command line as a user types it, on a real Milvus Lite file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from amips_plugins.cli import main
from amips_plugins.vectors import FloatArray
from tests.support.bundles import write_bundle

COUNT, DIM = 600, 16


def clustered(seed: int, count: int) -> FloatArray:
    """Vectors around a few centres, the same for every seed."""
    centres = np.random.default_rng(0).standard_normal((12, DIM))
    rng = np.random.default_rng(seed)
    points = centres[rng.integers(12, size=count)] + 0.5 * rng.standard_normal((count, DIM))
    return points.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a collection ``docs`` in docs.db, and query files."""
    home = tmp_path_factory.mktemp("cli")
    np.save(home / "keys.npy", clustered(1, COUNT))
    np.save(home / "queries.npy", clustered(2, 800))
    np.save(home / "test.npy", clustered(3, 40))
    store = """
import numpy as np
from pymilvus import MilvusClient
keys = np.load("keys.npy")
client = MilvusClient("docs.db")
client.create_collection("docs", dimension=keys.shape[1], metric_type="COSINE")
client.insert("docs", [{"id": row, "vector": key.tolist()} for row, key in enumerate(keys)])
client.close()
"""  # in a process of its own: Milvus Lite lets one process at a time have the file
    subprocess.run([sys.executable, "-W", "ignore", "-c", store], cwd=home, check=True)  # noqa: S603
    return home


def amips(folder: Path, *arguments: str, fails: int = 0) -> tuple[str, str]:
    """Run the command in a process of its own, in the folder."""
    done = subprocess.run(  # noqa: S603 - the arguments are the tests' own
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "from amips_plugins.cli import main; main()",
            *arguments,
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == fails, done.stderr
    return done.stdout, done.stderr


URI = "milvus:///{}/docs.db?collection=docs"


@pytest.mark.slow
def test_the_main_job(folder: Path) -> None:
    uri = URI.format(str(folder).lstrip("/"))
    out, _ = amips(folder, "snapshot", uri, "-o", "snap")
    assert f"{COUNT} keys of dimension {DIM} (cosine)" in out
    out, err = amips(
        folder,
        "train",
        "snap",
        "--queries",
        "queries.npy",
        "--cells",
        "12",
        "--model",
        "linear",
        "-o",
        "run",
    )
    assert "match rate" in err
    assert "native" in out
    assert "linear" in out
    out, _ = amips(folder, "publish", "run", "--anyway")
    assert "Published" in out
    out, _ = amips(folder, "layout", uri, "--dry-run")
    assert "'docs', 600 keys:" in out
    assert "more to store" in out
    out, err = amips(folder, "layout", uri)
    assert "'docs__g2' has 600 keys in 12 cells" in out
    assert "From now on search collection=docs__g2" in out
    assert "Go on?" not in err
    laid_out = uri.replace("=docs", "=docs__g2")
    out, _ = amips(folder, "layout", "status", laid_out, "--json")
    status = json.loads(out)
    assert (status["name"], status["count"], status["overflow"]) == ("docs__g2", 600, 0)
    assert (status["storage"], status["older"]) == ("partitions", ["docs"])
    out, _ = amips(folder, "backfill", laid_out)
    assert out == "0 keys got their cells; 0 have none.\n"
    out, err = amips(folder, "evaluate", laid_out, "--queries", "test.npy", "--json")
    rows = json.loads(out)
    assert [row["search"] for row in rows][:2] == ["native", "learned, recall 0.80"]
    assert rows[0]["recall_at_k"] == 1.0
    assert all(row["recall_at_k"] >= 0.7 for row in rows)
    assert rows[1]["scanned"] < 1.0
    assert "Warning" not in err
    where = ["--queries", "test.npy", "--filter", "id >= 300"]
    out, _ = amips(folder, "evaluate", laid_out, *where)
    assert "native, id >= 300" in out
    assert "passing" in out.splitlines()[0]
    out, _ = amips(folder, "registry", "list", "milvus/docs/vector", "--json")
    listed = json.loads(out)
    assert listed["current"] == listed["versions"][0]
    out, _ = amips(folder, "layout", "rollback", laid_out)
    assert out == "From now on search collection=docs, without cells.\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["snapshot", "docs.db", "-o", "x"], "is not a collection URI"),
        (["snapshot", "milvus:///nowhere/x.db?collection=docs", "-o", "x"], "nowhere"),
        (["snapshot", URI + "2", "-o", "x"], "docs2"),
        (["snapshot", URI + "&field=title", "-o", "x"], "title"),
        (["snapshot", "qdrant://127.0.0.1:1?collection=docs", "-o", "x"], "127.0.0.1:1"),
        (["snapshot", "milvus://127.0.0.1:1?collection=docs", "-o", "x"], "127.0.0.1:1"),
        (["train", "nowhere", "-o", "x"], "no snapshot"),
        (["train", "s", "--queries", "q", "--queries-log", "l", "-o", "x"], "Pass one of"),
        (["publish", "nowhere"], "no bundle"),
        (["layout", URI, "--registry", "empty"], "amips publish"),
        (["evaluate", URI, "--queries", "nowhere.npy"], "nowhere.npy"),
        (["status", URI, "--queries", "nowhere.npy"], "nowhere.npy"),
        (["status", URI, "--running", "nowhere"], "no folder nowhere"),
        (["registry", "rollback", "milvus/other/vector"], "roll back"),
    ],
)
def test_bad_input_is_one_sentence(folder: Path, arguments: list[str], message: str) -> None:
    arguments = [a.format(str(folder).lstrip("/")) for a in arguments]
    out, err = amips(folder, *arguments, fails=1)
    assert out == ""
    assert err.startswith("Error: ")
    assert message in err
    assert "Traceback" not in err
    assert not (folder / "x").exists()


def test_debug_shows_the_traceback(folder: Path) -> None:
    _, err = amips(folder, "--debug", "publish", "nowhere", fails=1)
    assert "Traceback" in err


def test_help_loads_no_command(folder: Path) -> None:
    code = (
        "import sys; from amips_plugins.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted(m for m in ('torch', 'numpy', 'fsspec', 'onnxruntime') if m in sys.modules))"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder
    )
    assert done.stdout.rstrip().endswith("[]")
    assert "amips snapshot URI -o snap/" in done.stdout


def test_an_interrupted_command_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import amips_plugins.adapters.connect as connect

    def interrupt(*_: str, **__: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(connect, "connect", interrupt)
    with pytest.raises(SystemExit) as exit_:
        main(["snapshot", "milvus:///x.db?collection=docs", "-o", "x"])
    assert exit_.value.code == 130
    assert "same command again" in capsys.readouterr().err


def test_the_table_aligns() -> None:
    from amips_plugins.cli.output import share, table

    shown = table(["search", "ms"], [["native", "1.00"], ["learned", "10.00"]]).splitlines()
    assert shown == ["search      ms", "-------  -----", "native    1.00", "learned  10.00"]
    assert (share(None), share(0.1234)) == ("-", "12.3%")


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from amips_plugins.cli.progress import show_progress

    with show_progress("copy", 10, 4, "keys") as step:
        step.advance(6, "well")
    assert capsys.readouterr().err == "copy: 10 of 10 keys, 0 s (well)\n"


@pytest.mark.slow
def test_a_model_that_does_not_pay_is_published_only_on_request(tmp_path: Path) -> None:
    write_bundle(tmp_path / "run", choice="native", reason="Use the native search: it is cheaper.")
    _, err = amips(tmp_path, "publish", "run", fails=1)
    assert err.startswith("Error: Use the native search: it is cheaper. To publish linear")
    assert not (tmp_path / "registry").exists()
    out, _ = amips(tmp_path, "publish", "run", "--anyway")
    assert "Published" in out
