from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks import cold
from benchmarks.memory_group import CannotCap, MemoryGroup, _sum_of_reads


def test_what_cannot_be_capped_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> MemoryGroup:
        raise CannotCap("no control group can be made: Permission denied")

    monkeypatch.setattr(cold, "MemoryGroup", refused)
    found = CliRunner().invoke(cold.main, ["nowhere"])
    assert (found.exit_code, found.output) == (
        0,
        "Skipped: no control group can be made: Permission denied.\n",
    )


def test_reads_of_all_disks_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "io_serviced"
    file.write_text("254:0 Read 50\n254:0 Write 4\n7:1 Read 2\nTotal 56\n")
    assert _sum_of_reads(file) == 52


READ = """
import os, sys
sys.stdin.readline()
data = open(sys.argv[1], "rb").read()
kept = [bytearray(1 << 20) for _ in range(200)] if sys.argv[2] == "much" else []
print(len(data), flush=True)
"""


@pytest.mark.parametrize("wish", ["little", "much"])
def test_a_group_caps_and_counts(tmp_path: Path, wish: str) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(1 << 20))
    try:
        group = MemoryGroup()
    except CannotCap as exc:
        pytest.skip(str(exc))
    with group:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [sys.executable, "-c", READ, str(file), wish],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            group.take(process.pid)
            assert group.cap(50 << 20)
            cold._forget(file)
            before = group.reads()
            out, _ = process.communicate("go\n")
        read = group.reads()
        assert (process.returncode == 0) == (wish == "little")
        assert (out.strip() == str(1 << 20)) == (wish == "little")
        assert read.n_bytes - before.n_bytes >= 1 << 20
        assert read.count > before.count
        assert group.cap(None)


def test_a_cap_below_what_a_process_needs_is_refused_or_ends_it() -> None:
    """What ``cold.measure`` and ``cold.examine`` then write into the row."""
    try:
        group = MemoryGroup()
    except CannotCap as exc:
        pytest.skip(str(exc))
    with group:
        hold = "import sys; x = bytearray(b'x' * (100 << 20)); print(1, flush=True); input()"
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [sys.executable, "-c", f"input(); {hold}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            group.take(process.pid)
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == "1\n"
            assert group.used() > 100 << 20
            capped = group.cap(20 << 20)
            process.communicate("end\n")
        assert not capped or process.returncode != 0


def test_the_table_says_why_there_are_no_figures() -> None:
    row = cold.Row(data="d", keys=1, memory=5.0, method="graph, int8", note="does not fit")
    full = msgspec.structs.replace(
        row, note="", recall=0.95, kb=1234.5, reads=3.25, cpu_ms=1.0, mean_ms=2.0, store_ms=[5, 35]
    )
    lines = cold.table([row, full]).splitlines()[2:]
    assert lines == [
        "| 5 % | graph, int8 | does not fit | | | | | | | |",
        "| 5 % | graph, int8 | 0.950 | 1,234 | 3.25 | 1 | 2 | - | - | 5 / 35 |",
    ]
