"""What a module calls public is there, and in the order that ruff gives it."""

from __future__ import annotations

from types import ModuleType


def check_public_names(module: ModuleType) -> None:
    public = getattr(module, "__all__", [])
    # As ruff sorts them: constants, then classes, then functions.
    kinds = {True: 0, False: 1}
    assert len(set(public)) == len(public)
    assert [n for n in public if not hasattr(module, n)] == []
    assert public == sorted(public, key=lambda n: (kinds[n.isupper()], n[0].islower(), n))
