"""docs/environment.md lists every environment variable that is read."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NAME = re.compile(r"\b_?AMIPS_[A-Z_]+\b")


def test_the_page_lists_every_variable_and_no_other() -> None:
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout  # noqa: S603
    read: set[str] = set()
    for name in found.decode().split("\0"):
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and path.suffix != ".md":
            read |= set(_NAME.findall(path.read_text(encoding="utf-8", errors="ignore")))
    page = (ROOT / "docs" / "environment.md").read_text()
    listed = re.findall(r"`(_?AMIPS_[A-Z_]+)`", page)
    assert sorted(listed) == sorted(read)
    assert listed[0] == "AMIPS_DISABLED"  # what an operator looks for in a hurry stands first
