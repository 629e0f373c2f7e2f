from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from amips_plugins.files import held, replace_file


def test_creates_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_reader_sees_a_whole_file(tmp_path: Path) -> None:
    path, done, seen = tmp_path / "file", threading.Event(), set[bytes]()
    contents = [bytes([number]) * 50_000 for number in range(40)]
    replace_file(path, contents[0])

    def read() -> None:
        while not done.wait(0.0005):
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for content in contents:
            replace_file(path, content)
    finally:
        done.set()
        reader.join()
    assert seen
    assert seen <= set(contents)


def test_a_lock_is_held_by_one_thread_at_a_time(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")

    def work() -> None:
        for _ in range(50):
            with held(tmp_path / "lock"):
                replace_file(count, str(int(count.read_text()) + 1).encode())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.read_text() == "200"
    assert (tmp_path / "lock").read_bytes() == b""


def test_a_lock_ends_with_its_block_and_with_its_process(tmp_path: Path) -> None:
    with pytest.raises(KeyError), held(tmp_path / "lock"):
        raise KeyError
    dying = "import os, sys; from pathlib import Path; from amips_plugins.files import held\n"
    dying += "with held(Path(sys.argv[1])): os._exit(3)"
    command = [sys.executable, "-c", dying, str(tmp_path / "lock")]
    assert subprocess.run(command, check=False).returncode == 3  # noqa: S603 - our own interpreter
    with held(tmp_path / "lock"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_the_lock_of_another_user_is_no_obstacle() -> None:
    other = "import os, sys; from pathlib import Path; from amips_plugins.files import held\n"
    other += "os.setuid(65534)\nwith held(Path(sys.argv[1])): print('held')"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        with held(Path(folder) / "lock", 0o644):
            pass
        command = [sys.executable, "-c", other, f"{folder}/lock"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert (done.returncode, done.stdout) == (0, "held\n"), done.stderr
