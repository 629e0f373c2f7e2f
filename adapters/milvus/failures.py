"""What the errors of pymilvus mean."""

from __future__ import annotations

import asyncio
from typing import Any

from amips_plugins.collection import Failure

__all__ = ["failure_of", "failure_of_search"]

_RATE_LIMITED = 8  # ErrorCode.RATE_LIMIT
_DENIED = 9  # ErrorCode.FORCE_DENY: a quota is used up
_RATE_LIMITED_BEFORE_2_3 = 49  # common_pb2.RateLimit
_WRONG = (1100, 1101, 1102, "INVALID_ARGUMENT")  # a parameter is invalid, missing or too large
_LITE = 6  # IllegalArgument, in both of its systems; a server's own 6 is another
_OUTAGES = {"DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED"}
_NO_ANSWER = {"ConnectError", "ConnectionNotExistException", "MilvusUnavailableException"}
_GAVE_UP = ("Retry timeout", "Retry run out of", "server unavailable", "Fail connecting")
_TOO_MANY = (
    "should be in range [1, 16384]",
    "is invalid, it should be in range",
    "larger than max",
)


def failure_of(exc: BaseException) -> Failure:
    """Say what an error means, through ``MilvusClient`` or ``AsyncMilvusClient``."""
    if isinstance(exc, (TimeoutError, asyncio.TimeoutError, ConnectionError)):
        return Failure.OUTAGE
    code, message = _code(exc), str(exc)
    if any(words in message for words in _TOO_MANY):
        return Failure.SIZE
    if code in (_RATE_LIMITED, _DENIED, "RESOURCE_EXHAUSTED") or (
        getattr(exc, "compatible_code", None) == _RATE_LIMITED_BEFORE_2_3
    ):
        return Failure.BUSY
    names = {kind.__name__ for kind in type(exc).__mro__}
    if code in _OUTAGES or names & _NO_ANSWER:
        return Failure.OUTAGE
    if "MilvusException" in names and any(words in message for words in _GAVE_UP):
        return Failure.OUTAGE
    return Failure.OTHER


def failure_of_search(exc: BaseException) -> Failure:
    """Say the same of a search's error, which may be one of its own parameters."""
    found = failure_of(exc)
    code = _code(exc)
    lite = code == getattr(exc, "compatible_code", None) == _LITE and " at column " in str(exc)
    wrong = code in _WRONG or lite or type(exc).__name__ == "ParamError"
    return Failure.REQUEST if wrong and found is Failure.OTHER else found


def _code(exc: BaseException) -> Any:
    """Return Milvus' number, or the name of a gRPC status, by itself or inside of pymilvus' own."""
    code = getattr(exc, "code", None)
    code = code() if callable(code) else code
    return getattr(code, "name", code)
