"""docs/architecture.md leads to files that are there, and shows the floors that are held."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", PAGE))
    assert len(named) > 15
    homes = [ROOT / "amips_plugins", ROOT]
    assert [one for one in sorted(named) if not any((home / one).is_file() for home in homes)] == [
        "adapters/NAME/failures.py",
        "cli/NAME.py",
    ]


def test_every_floor_is_on_the_page() -> None:
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    floors = re.findall(r"^    amips_plugins\..*$", (ROOT / "importlinter.ini").read_text(), re.M)
    rooms = {room for floor in floors for room in re.findall(r"amips_plugins\.(\w+)", floor)}
    assert rooms
    assert {room for room in rooms if not re.search(rf"\b{room}\b", shown)} == set()
