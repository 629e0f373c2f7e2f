"""Errors of Qdrant's client: what they mean, and what to do about them in plain words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from amips_plugins.collection import Failure
from amips_plugins.errors import AmipsError, CollectionError, DatabaseUnreachable, require

if TYPE_CHECKING:
    from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
else:
    _exceptions = require("qdrant_client.http.exceptions", "qdrant")
    ResponseHandlingException = _exceptions.ResponseHandlingException
    UnexpectedResponse = _exceptions.UnexpectedResponse
    ResourceExhaustedResponse = require(
        "qdrant_client.common.client_exceptions", "qdrant"
    ).ResourceExhaustedResponse
grpc = require("grpc", "qdrant")

__all__ = ["failure_of", "patiently", "said", "translated_errors"]

T = TypeVar("T")

_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds between tries of work that can wait
_LONGEST = 90.0  # seconds to wait where the server says how long
_UNDONE = (408, 502, 503, 504)
_WRONG = (400, 422)
_TIMED_OUT = ("timeout", "timed out", "deadline")
_TOO_MANY = ('"limit"', "max_query_limit", "larger than max")


def failure_of(exc: BaseException) -> Failure:
    """Say what an error of the client means, or of ours that was made of it."""
    if isinstance(exc, AmipsError) and exc.__cause__ is not None:
        return failure_of(exc.__cause__)
    if isinstance(exc, ResourceExhaustedResponse):
        return Failure.BUSY
    if isinstance(exc, ResponseHandlingException):  # a ValueError is JSON of another form
        return Failure.OTHER if isinstance(exc.source, ValueError) else Failure.OUTAGE
    if isinstance(exc, UnexpectedResponse):
        text = said(exc).lower()
        if exc.status_code == 429:
            return Failure.BUSY
        if exc.status_code in _UNDONE:
            return Failure.OUTAGE
        if exc.status_code == 500 and any(word in text for word in _TIMED_OUT):
            return Failure.OUTAGE
        if any(word in text for word in _TOO_MANY):
            return Failure.SIZE
        return Failure.REQUEST if exc.status_code in _WRONG else Failure.OTHER
    if isinstance(exc, grpc.RpcError):
        return _failure_of_grpc(exc)
    return Failure.OUTAGE if isinstance(exc, (TimeoutError, ConnectionError)) else Failure.OTHER


def _failure_of_grpc(exc: Any) -> Failure:
    code, text = _code(exc), said(exc).lower()
    codes = grpc.StatusCode
    if any(word in text for word in _TOO_MANY):
        return Failure.SIZE
    if code is codes.RESOURCE_EXHAUSTED:
        return Failure.BUSY
    if code in (codes.UNAVAILABLE, codes.DEADLINE_EXCEEDED):
        return Failure.OUTAGE
    if code is codes.INTERNAL and any(word in text for word in _TIMED_OUT):
        return Failure.OUTAGE
    return Failure.REQUEST if code is codes.INVALID_ARGUMENT else Failure.OTHER


def _code(exc: Any) -> Any:
    return exc.code() if callable(getattr(exc, "code", None)) else None


def said(exc: BaseException) -> str:
    """Return the part of an error that the server meant for people."""
    if isinstance(exc, UnexpectedResponse):
        try:
            status = json.loads(exc.content)["status"]
            return str(status["error"] if isinstance(status, dict) else status)
        except (ValueError, KeyError, TypeError):
            return exc.content.decode(errors="replace")[:500] or exc.reason_phrase
    details = getattr(exc, "details", None)
    return str(details() or exc) if callable(details) else str(exc)


def patiently(call: Callable[[], T]) -> T:
    """Do what may be done again, also where the server asks to come back later."""
    for pause in _PAUSES:
        try:
            return call()
        except Exception as exc:  # noqa: PERF203 - a call takes a thousand times as long
            wanted = float(getattr(exc, "retry_after_s", pause))
            if not _can_wait(exc) or wanted > _LONGEST:
                raise
            time.sleep(max(pause, wanted))
    return call()


def _can_wait(exc: BaseException) -> bool:
    if isinstance(exc, UnexpectedResponse):
        later = exc.status_code == 500 and _asks_for_later(exc)
        return later or exc.status_code in (408, 429, 503)
    codes = grpc.StatusCode
    if _code(exc) is codes.INTERNAL:
        return _asks_for_later(exc)
    return isinstance(exc, ResourceExhaustedResponse) or (
        _code(exc) in (codes.RESOURCE_EXHAUSTED, codes.ABORTED)
        and failure_of(exc) is not Failure.SIZE
    )


def _asks_for_later(exc: BaseException) -> bool:
    """Tell whether an internal error passes: an election, a replica too busy for a write."""
    return any(word in said(exc).lower() for word in ("leader", "please retry"))


@contextmanager
def translated_errors(server: str, to: Literal["read", "write to"] = "read") -> Iterator[None]:
    """Turn "nobody is there", "not a Qdrant" and "you may not" into errors that say what to do."""
    absent = "check the address and that it is running"
    stranger = (
        f"{server} answers, but not as this version of the client expects; check that the address "
        "is Qdrant's and that qdrant-client and the server are of about the same version."
    )
    try:
        yield
    except ResponseHandlingException as exc:
        if isinstance(exc.source, ValueError):  # JSON of another form
            raise DatabaseUnreachable(stranger) from exc
        raise DatabaseUnreachable(f"{server} does not answer ({exc.source}); {absent}.") from exc
    except json.JSONDecodeError as exc:
        raise DatabaseUnreachable(stranger) from exc
    except ResourceExhaustedResponse as exc:
        raise CollectionError(
            f"{server} has had its fill for now ({said(exc)}); try again in "
            f"{exc.retry_after_s} seconds, or raise the rate limit of strict mode."
        ) from exc
    except grpc.RpcError as exc:
        code, codes = _code(exc), grpc.StatusCode
        if code in (codes.PERMISSION_DENIED, codes.UNAUTHENTICATED):
            raise DatabaseUnreachable(_refused(server, exc, to)) from exc
        if code in (codes.UNAVAILABLE, codes.DEADLINE_EXCEEDED):
            raise DatabaseUnreachable(f"{server} does not answer; {absent}.") from exc
        if not isinstance(exc, grpc.Call):
            raise
        raise CollectionError(f"{server} refuses this: {said(exc)}") from exc
    except UnexpectedResponse as exc:
        if exc.status_code == 404:
            raise DatabaseUnreachable(stranger) from exc
        if exc.status_code in (401, 403):
            raise DatabaseUnreachable(_refused(server, exc, to)) from exc
        raise CollectionError(f"{server} refuses this: {said(exc)}") from exc


def _refused(server: str, exc: BaseException, to: str) -> str:
    return f"{server} refuses access ({said(exc)}); pass an API key that may {to} the collection."
