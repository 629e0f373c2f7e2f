"""An operator sets one logger, whatever module a message comes from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [
    path
    for folder in ("amips_plugins", "adapters", "export")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "getLogger(" in path.read_text()
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_logs_under_the_packages_name(path: Path) -> None:
    own = re.findall(r"^_?\w+ = logging\.getLogger\((.*)\)$", path.read_text(), re.MULTILINE)
    assert set(own) <= {'"amips_plugins"'}
    # All others are of clients, which are told to be silent: by the command line, and where a
    # server's refusal is an answer.
    others = len(re.findall(r"getLogger\(", path.read_text())) - len(own)
    silencing = {("cli", "__init__.py"), ("milvus", "tuning.py")}
    assert others == (path.parts[-2:] in silencing)
