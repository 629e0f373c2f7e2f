"""LangChain's published tests of vector stores, where a store is known to fail some."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

_Suite = TypeVar("_Suite", bound=type)


def expect_failures(*names: str) -> Callable[[_Suite], _Suite]:
    """Mark tests, and their asynchronous twins, that the bare store fails too.

    They have to fail: routed and bare stores answer alike, and a store that is mended shows.
    """

    def mark(suite: _Suite) -> _Suite:
        for name in names:
            for each in (name, f"{name}_async"):
                setattr(suite, each, _expected(getattr(suite, each), each.endswith("_async")))
        return suite

    return mark


def _expected(inherited: Any, asynchronous: bool) -> Any:
    if asynchronous:

        @functools.wraps(inherited)
        async def test(self: Any, vectorstore: Any) -> None:
            await inherited(self, vectorstore)
    else:

        @functools.wraps(inherited)
        def test(self: Any, vectorstore: Any) -> None:
            inherited(self, vectorstore)

    return pytest.mark.xfail(reason="the bare store fails it too", strict=True)(test)
