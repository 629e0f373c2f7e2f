from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from amips_plugins.files import replace_file


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
