"""docs/api.md is the list of what is public."""

from __future__ import annotations

import re
from pathlib import Path

import amips_plugins

ROOT = Path(__file__).parents[2]


def test_the_page_lists_every_public_name_and_no_other() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^\.\. auto(?:class|exception|function):: (\S+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(amips_plugins.__all__)
