"""What every command does alike: JSON, questions, progress, interruptions, errors, completion."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from httpx import Headers
from qdrant_client.http.exceptions import UnexpectedResponse

from amips_plugins.adapters import connect as connecting
from amips_plugins.cli import main, progress
from tests.cli.test_main import clustered

edge = pytest.importorskip("qdrant_edge")

ROOT = Path(__file__).parents[2]

COUNT, DIM = 600, 16
TRAIN = ("--cells", "8", "--model", "linear", "--epochs", "3", "--layout", "native")
KEY = "qdrant-edge/docs/"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a collection at shards/docs and query files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMIPS_REGISTRY", raising=False)
    folder = tmp_path / "shards" / "docs"
    folder.mkdir(parents=True)
    vectors = edge.EdgeVectorParams(size=DIM, distance=edge.Distance.Cosine)
    shard = edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors=vectors))
    points = [edge.Point(row, key) for row, key in enumerate(clustered(1, COUNT).tolist())]
    shard.update(edge.UpdateOperation.upsert_points(points))
    shard.close()
    np.save("queries.npy", clustered(2, 500))
    np.save("test.npy", clustered(3, 20))
    return tmp_path


def uri(home: Path) -> str:
    return f"qdrant-edge://{home}/shards?collection=docs"


Amips = Callable[..., tuple[str, str]]


@pytest.fixture
def amips(capsys: pytest.CaptureFixture[str]) -> Amips:
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


def documented() -> dict[str, set[str]]:
    """The keys that docs/scripting.md names for each command."""
    page = (ROOT / "docs" / "scripting.md").read_text()
    rows = re.findall(r"^\| `amips ([^`]+)` \|[^|]*\| (.+) \|$", page, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", keys)) for name, keys in rows}


@pytest.mark.slow
def test_json_is_all_there_is_and_its_keys_are_documented(home: Path, amips: Amips) -> None:
    keys, where = documented(), uri(home)
    seen = set()

    def check(name: str, *arguments: str) -> Any:
        out, _ = amips(*name.split(), *arguments, "--json")
        found = json.loads(out)
        first = found[0] if isinstance(found, list) else found
        assert set(first) == keys[name], name
        seen.add(name)
        return found

    taken = check("snapshot", where, "-o", "snap")
    assert (taken["count"], taken["dim"], taken["moved"]) == (COUNT, DIM, False)
    first = check("train", "snap", "--queries", "queries.npy", "-o", "run", *TRAIN)["version"]
    dry = check("publish", "run", "--anyway", "--dry-run")
    assert (dry["version"], dry["current"]) == (first, None)
    assert not (home / "registry").exists()
    assert check("publish", "run", "--anyway")["current"] == first
    time.sleep(1.1)  # versions of the same second have no order
    second = check(
        "train", "snap", "--queries", "queries.npy", "-o", "run2", *TRAIN, "--seed", "1"
    )["version"]
    check("publish", "run2", "--anyway")
    check("export-cells", "run2", "-o", "cells")
    assert check("registry list", KEY)["versions"] == [first, second]
    assert check("registry rollback", KEY, "--dry-run")["current"] == second
    assert check("registry rollback", KEY)["current"] == first
    assert check("registry unpin", KEY, "--dry-run")["current"] == first
    assert check("registry unpin", KEY)["current"] == second
    assert check("registry pin", KEY, first, "--dry-run")["pinned"] is False
    assert check("registry pin", KEY, first)["pinned"] is True
    out, _ = amips("layout", where, "--dry-run", "--json")
    assert set(json.loads(out)) == keys["layout URI --dry-run"]
    built = check("layout", where)
    assert (built["count"], built["overflow"]) == (COUNT, 0)
    assert check("layout status", where) == built
    assert check("backfill", where, "--dry-run") == {"placed": 0, "overflow": 0}
    assert check("backfill", where)["placed"] == 0
    assert check("cell-file", "snap", "-o", "docs.cells")["keys"] == COUNT
    check("evaluate", where, "--queries", "test.npy")
    check("status", where)
    assert check("layout rollback", where)["layout"] is None
    dry = check("layout drop-old", where, "--dry-run")
    assert (len(dry["old"]), dry["dropped"]) == (1, [])
    assert check("layout drop-old", where, "--yes")["dropped"] == dry["old"]
    # The demo takes minutes; what it prints are evaluate's rows. For tune see tests/tune.
    assert keys["demo"] == keys["evaluate"]
    assert seen == set(keys) - {"demo", "layout URI --dry-run", "tune"}


@pytest.mark.slow
def test_a_removal_is_never_assumed(home: Path, amips: Amips) -> None:
    amips("snapshot", uri(home), "-o", "snap")
    amips("train", "snap", "--queries", "queries.npy", "-o", "run", *TRAIN)
    amips("publish", "run", "--anyway")
    amips("layout", uri(home))
    amips("layout", "rollback", uri(home))
    _, err = amips("layout", "drop-old", uri(home), fails=1)
    assert err.endswith("add --yes.\n")
    out, _ = amips("layout", "drop-old", uri(home), "--dry-run")
    assert "This drops" in out


def asked(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda *_: answer)


@pytest.mark.parametrize("command", ["rollback", "unpin", "pin v1"])
def test_what_serves_changes_only_with_consent(
    tmp_path: Path, amips: Amips, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from amips_plugins.bundle.registry import Registry
    from amips_plugins.collection import CollectionKey
    from tests.support.bundles import write_bundle

    monkeypatch.chdir(tmp_path)
    store = Registry("registry")
    for version in ("v1", "v2", "v3"):
        store.publish(write_bundle(tmp_path / version, version=version))
    key = CollectionKey(database="memory", name="docs", field="vector")
    store.roll_back(key)
    assert store.current(key) == "v2"
    verb, *more = command.split()
    asked(monkeypatch, "n")
    out, err = amips("registry", verb, "memory/docs/vector", *more)
    assert (out, store.current(key)) == ("", "v2")
    assert "v2 serves. This serves v" in err
    amips("registry", verb, "memory/docs/vector", *more, "--yes")
    assert store.current(key) == ("v3" if verb == "unpin" else "v1")


class Interrupting:
    """Stands for the plain lines: sends this process a real SIGINT at one report of many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.reports: list[tuple[str, int]] = []
        self.at = at
        lines, watch = progress._Lines, self

        class Lines(lines):  # type: ignore[misc, valid-type]
            def advance(self, amount: int = 1, note: str = "") -> None:
                super().advance(amount, note)
                watch.reports.append((self._title, amount))
                if len(watch.reports) == watch.at:
                    signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(progress, "_Lines", Lines)

    def done(self, title: str) -> int:
        return sum(amount for name, amount in self.reports if name == title)


@pytest.fixture
def no_xdist_handler() -> Any:
    """SIGINT is KeyboardInterrupt, as in a program of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("no_xdist_handler")
def test_every_long_command_goes_on_after_ctrl_c(
    home: Path, amips: Amips, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amips_plugins.export import promises

    where = uri(home)

    def twice(at: int, *arguments: str) -> tuple[Interrupting, str]:
        with monkeypatch.context() as patch:
            Interrupting(patch, at)
            _, err = amips(*arguments, fails=130)
            assert "Interrupted. What is done is kept. To go on" in err
            assert err.rstrip().splitlines()[-1].startswith(f"  amips {arguments[0]} ")
        with monkeypatch.context() as patch:
            again = Interrupting(patch, -1)
            out, _ = amips(*arguments)
            return again, out

    again, out = twice(3, "snapshot", where, "-o", "snap", "--batch-size", "100")
    assert again.done("snapshot") == COUNT - 300
    assert f"{COUNT} keys" in out
    again, out = twice(6, "train", "snap", "--queries", "queries.npy", "-o", "run", *TRAIN)
    # Three epochs of the router and of each fold that measures it; one of them was done.
    assert again.done("train linear") < 3 * (1 + promises._FOLDS)
    assert "is in run/bundle" in out
    amips("publish", "run", "--anyway")
    _, out = twice(1, "layout", where)
    assert f"{COUNT} keys in 8 cells" in out
    shard = edge.EdgeShard.load(str(home / "shards" / "docs"))
    points = [edge.Point(COUNT + row, key) for row, key in enumerate(clustered(4, 50).tolist())]
    shard.update(edge.UpdateOperation.upsert_points(points))
    shard.close()
    _, out = twice(1, "backfill", where)
    assert out.endswith(" 0 have none.\n")


@pytest.mark.usefixtures("no_xdist_handler")
def test_an_interrupted_measurement_does_not_claim_to_go_on(
    amips: Amips, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connecting, "connect", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    _, err = amips("evaluate", "qdrant:///x?collection=docs", "--queries", "q.npy", fails=130)
    assert "To start over" in err
    assert "kept" not in err


PROGRAM = [sys.executable, "-W", "ignore", "-c", "from amips_plugins.cli import main; main()"]


@pytest.mark.slow
def test_bars_on_a_terminal_lines_in_a_pipe_and_ctrl_c_between(home: Path) -> None:
    command = [*PROGRAM, "snapshot", uri(home), "-o", "snap", "--batch-size"]
    pid, terminal = pty.fork()
    if pid == 0:  # the child has the pty as its terminal, as a shell would give it
        os.environ["PYTHONPATH"] = str(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # also where the tests run in the background
        os.execv(sys.executable, [*command, "1"])  # noqa: S606
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    shown = b""
    interrupted = False
    with suppress(OSError):  # what Linux says when the other end is closed
        while part := os.read(terminal, 4096):
            shown += part
            if b"keys/s" in shown and not interrupted:
                interrupted = bool(os.write(terminal, b"\x03"))
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130, shown.decode()
    assert re.search(rb"snapshot: +\d+%\|.*\| \d+/600 \[\d\d:\d\d<.*keys/s\]", shown)
    assert b"To go on, the same command again" in shown
    done = subprocess.run(  # noqa: S603
        [*command, "50"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert re.fullmatch(r"snapshot: 600 of 600 keys, \d+ s\n", done.stderr)
    assert done.stdout.startswith("600 keys of dimension 16")


def test_plain_lines_have_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 20.0, 20.0, 40.0])  # at the start, at the report, in its line, at the end
    monkeypatch.setattr("amips_plugins.cli.progress.time.monotonic", lambda: next(now))
    with progress.show_progress("copy", 100_000, 0, "keys") as step:
        step.advance(50_000)
    assert capsys.readouterr().err.splitlines() == [
        "copy: 50,000 of 100,000 keys, 20 s, 2,500 keys/s, about 20 s left",
        "copy: 50,000 of 100,000 keys, 40 s, 1,250 keys/s, about 40 s left",
    ]


def test_a_fault_of_ours_is_a_sentence_too(amips: Amips, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(_: str) -> None:
        raise KeyError("cells")

    monkeypatch.setattr(connecting, "connect", break_down)
    _, err = amips("backfill", "qdrant:///x?collection=docs", fails=1)
    assert err == (
        "Error: This should not have happened: KeyError: 'cells'. Run it again with --debug, and "
        "report what it shows.\n"
    )
    with pytest.raises(KeyError):
        main(["backfill", "qdrant:///x?collection=docs", "--debug"])


def test_an_error_of_the_system_names_the_file(home: Path, amips: Amips) -> None:
    (home / "file").touch()
    _, err = amips("snapshot", uri(home), "-o", "file/snap", fails=1)
    assert err.startswith("Error: ")
    assert "file" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_where(amips: Amips, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(_: str) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(connecting, "connect", full)
    _, err = amips("backfill", "qdrant:///x?collection=docs", fails=1)
    assert "where the command writes; make room, and run it again." in err


def test_the_databases_own_words_are_not_cut(amips: Amips, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "x" * 300 + " needs an index on the payload key tenant"
    body = json.dumps({"status": {"error": reason}, "time": 0.0}).encode()

    def refuse(_: str) -> None:
        raise UnexpectedResponse(400, "Bad Request", body, Headers())

    monkeypatch.setattr(connecting, "connect", refuse)
    _, err = amips("backfill", "qdrant:///x?collection=docs", fails=1)
    assert err == f"Error: The database says: {reason} (--debug shows more.)\n"


def completed(shell: str, folder: Path, line: str) -> list[str]:
    """What a shell offers behind a line: the script that it was given, in the shell itself."""
    program = folder / "amips"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{PROGRAM[-1]}' \"$@\"\n")
    program.chmod(0o755)
    words = line.split(" ")
    script = {
        "bash": 'eval "$(amips completion bash)"\n'
        f"COMP_WORDS=({' '.join(words[:-1])} '{words[-1]}') COMP_CWORD={len(words) - 1}\n"
        f"_amips_completion amips '{words[-1]}'\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n",
        "zsh": "autoload -U compinit && compinit -u\n"
        "compadd() { print -l -- ${(P)@[-1]} }; _describe() { print -l -- ${(P)3} }\n"
        'eval "$(amips completion zsh)"\n'
        f"words=({' '.join(words[:-1])} '{words[-1]}') CURRENT={len(words)}\n_amips_completion\n",
        "fish": f"amips completion fish | source\ncomplete --do-complete '{line}'\n",
    }[shell]
    done = subprocess.run(  # noqa: S603
        [shutil.which(shell) or shell, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
        },
    )
    return [re.split(r"[\t:]", one)[0] for one in done.stdout.split("\n") if one]


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: apt-get install {shell}")
    assert completed(shell, tmp_path, "amips tr") == ["train"]
    assert "--storage" in completed(shell, tmp_path, "amips layout --st")
    assert completed(shell, tmp_path, "amips train snap --model key") == ["keynet"]


def test_completing_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from amips_plugins.cli import main\n"
        "try: main([])\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'numpy', 'fsspec', 'onnxruntime', 'pymilvus', 'qdrant_client')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    for line, position in {"amips ": 1, "amips registry pin --": 3, "amips train --": 2}.items():
        asked_for = {
            "_AMIPS_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(position),
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={**os.environ, **asked_for},
        )
        *offered, loaded = done.stdout.splitlines()
        assert offered
        assert loaded == "[]"
