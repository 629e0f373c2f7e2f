"""What a module calls public is there, and in the order that ruff gives it."""

from __future__ import annotations

import re
from types import ModuleType


def check_public_names(module: ModuleType) -> None:
    public = getattr(module, "__all__", [])
    # As ruff sorts them: constants, then classes, then functions, and numbers by what they are.
    kinds = {True: 0, False: 1}

    def place(name: str) -> tuple[int, bool, list[str]]:
        parts = re.split(r"(\d+)", name)
        return (
            kinds[name.isupper()],
            name[0].islower(),
            [p.zfill(9) if p.isdigit() else p for p in parts],
        )

    assert len(set(public)) == len(public)
    assert [n for n in public if not hasattr(module, n)] == []
    assert public == sorted(public, key=place)
