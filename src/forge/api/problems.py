"""Errors as clients see them: RFC 9457 problem details, from one table of error types.

Whatever a route raises leaves here as ``application/problem+json`` with ``type``, ``title``, ``status``,
``detail`` and ``code``, ``errors`` where fields are wrong, ``limit`` where one is reached, and
``Retry-After`` where coming again helps.
"""

from __future__ import annotations

import logging
import math
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.datastructures import ResponseHeader
from litestar.exceptions import HTTPException, SerializationException, ValidationException
from litestar.openapi.datastructures import ResponseSpec

from forge import errors
from forge.broker import BrokerRefused
from forge.errors import FieldError, ForgeError, Invalid, Limit, LimitReached, Malformed

log = logging.getLogger("forge.api")

MEDIA_TYPE = "application/problem+json"


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong, in the form of RFC 9457; decide by ``code``, show ``detail``."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[FieldError] | None = None
    limit: Limit | None = None


class Kind(msgspec.Struct, frozen=True):
    """How one type of error is told: its status, its title, and after how many seconds to come again."""

    status: int
    title: str
    retry_after: int | None = None


_INTERNAL = Kind(500, "forge failed")
_BUSY = Kind(503, "Try again", 2)

KINDS: dict[type[ForgeError], Kind] = {
    errors.Refused: Kind(409, "Refused"),
    errors.Invalid: Kind(422, "Some fields are not acceptable"),
    errors.Malformed: Kind(400, "The request cannot be read"),
    errors.TooLarge: Kind(413, "The request is too large"),
    errors.TooSlow: Kind(408, "The request did not arrive in time"),
    errors.AddressTooLong: Kind(414, "The path and query are too long"),
    errors.HeadTooLarge: Kind(431, "The headers are too large"),
    errors.NotFound: Kind(404, "There is no such thing here"),
    errors.Unauthenticated: Kind(401, "A valid key is needed"),
    errors.Forbidden: Kind(403, "Not allowed"),
    errors.KeyReused: Kind(422, "The Idempotency-Key belongs to another request"),
    errors.JobAlreadyOver: Kind(409, "The job is over"),
    errors.JobNotFailed: Kind(409, "The job has not failed"),
    errors.UploadGone: Kind(409, "The uploaded picture is gone"),
    errors.CannotRegenerate: Kind(409, "The asset cannot be drawn again"),
    errors.LimitReached: Kind(429, "A limit is reached", 10),
    errors.QueueFull: Kind(503, "The queue is full", 30),
    errors.Unavailable: Kind(503, "A server forge needs does not answer", 2),
    errors.LogUnavailable: Kind(503, "The event log does not answer", 2),
    errors.DatabaseUnavailable: Kind(503, "The database does not answer", 2),
    errors.DiskFull: Kind(503, "The asset volume is full", 60),
    errors.Overloaded: Kind(503, "forge is short of memory", 10),
    errors.NoBackend: Kind(503, "No ComfyUI answers", 10),
    BrokerRefused: Kind(503, "The event log refuses to write", 10),
    errors.StoreFailed: Kind(503, "The asset volume does not answer", 10),
    errors.StoreMissing: Kind(503, "The asset volume is not there", 30),
    errors.StaleAttempt: _BUSY,
    errors.Conflict: _BUSY,
    errors.PictureRefused: Kind(422, "Not an acceptable picture"),
    errors.LogUnreadable: _INTERNAL,
    errors.LogDamaged: _INTERNAL,
    errors.ArchiveDamaged: _INTERNAL,
    errors.TopologyDiffers: _INTERNAL,
    errors.NotSetUp: _INTERNAL,
    errors.NotLetIn: _INTERNAL,
    errors.SettingInvalid: _INTERNAL,
    errors.WorkflowInvalid: _INTERNAL,
    errors.MigrationFailed: _INTERNAL,
    errors.ClosingRefused: _INTERNAL,
    errors.ReplayRefused: _INTERNAL,
    errors.RestoreRefused: _INTERNAL,
    errors.FileUnfit: _INTERNAL,
    errors.ServerFailed: _INTERNAL,
    errors.ComfyError: _INTERNAL,
}
"""Subclasses take the kind of the nearest class that is listed; what no client can cause is 500."""

_HTTP_CODES = {
    400: "malformed",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    415: "unsupported_media_type",
}


def kind_of(type_: type[ForgeError]) -> Kind | None:
    """How an error of this type is told; None when nothing but the root of the tree speaks for it."""
    return next((KINDS[cls] for cls in type_.__mro__ if cls in KINDS), None)


def problem_of(error: Exception) -> tuple[Problem, dict[str, str]]:
    """The problem that tells of an error, and the headers that go with it."""
    match error:
        case ForgeError():
            kind = kind_of(type(error)) or _INTERNAL
            detail = error.detail if kind.status < 500 or kind.retry_after else HTTPStatus(500).description
            named = error.errors if isinstance(error, Invalid) else None
            if isinstance(error, LimitReached):
                return _told(_until(kind, error), error.code, detail, limit=error.limit)
            return _told(kind, error.code, detail, named)
        case ValidationException():
            return problem_of(Invalid(_fields(error.extra)))
        case SerializationException() | RecursionError() | UnicodeError():
            return problem_of(Malformed("the request cannot be read"))
        case HTTPException():
            status = HTTPStatus(error.status_code)
            code = _HTTP_CODES.get(status, "http_error")
            problem, headers = _told(Kind(status, status.phrase), code, error.detail or status.description)
            return problem, headers | dict(error.headers or {})
        case _:
            return _told(_INTERNAL, "internal", HTTPStatus(500).description)


def answer(request: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    """Litestar's handler for every exception."""
    problem, headers = problem_of(error)
    if problem.status == 500:
        log.error("a request failed", exc_info=error, extra={"path": request.scope["path"]})
    request.scope["litestar_app"].state.metrics.refused(dict(request.scope), problem)
    return Response(
        problem,
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers=headers | {"cache-control": "no-store", "x-content-type-options": "nosniff"},
    )


_ANYWHERE = (400, 408, 414, 429, 431)
_BEHIND_THE_DOOR = (*_ANYWHERE, 401, 403, 422, 503)


def documented(*statuses: int) -> dict[int, ResponseSpec]:
    """The problems a route behind the door may answer with, for its OpenAPI operation."""
    return _specs(*_BEHIND_THE_DOOR, *statuses)


def documented_for_all() -> dict[int, ResponseSpec]:
    """Those of a route that everybody may ask."""
    return _specs(*_ANYWHERE)


def _specs(*statuses: int) -> dict[int, ResponseSpec]:
    return {
        status: ResponseSpec(
            Problem, media_type=MEDIA_TYPE, description=_DESCRIPTIONS[status], generate_examples=False
        )
        for status in sorted(set(statuses))
    }


_DESCRIPTIONS = {
    400: "The request cannot be read.",
    401: "No valid key.",
    403: "The key may not do that.",
    404: "There is no such thing, or it is somebody else's.",
    408: "The request did not arrive in time.",
    409: "The job's state does not allow it.",
    413: "The body is larger than 64 KiB, a batch than 2 MiB, or a picture than 10 MiB.",
    414: "The path and query are longer than 8 KiB.",
    415: "The body is not declared as what this takes: JSON, or a form for a picture.",
    416: "The range lies outside the file.",
    429: "A limit of the caller's is reached; `limit` says which, Retry-After when to come again.",
    422: "Some fields are not acceptable, or an Idempotency-Key came with another body.",
    431: "There are more than 100 headers, or more than 32 KiB of them.",
    503: "The system is full or a server is down; come again when Retry-After says.",
}

RETRY_AFTER = ResponseHeader(
    name="Retry-After", description="Seconds after which to come again.", documentation_only=True
)


_HOPELESS_SECONDS = 3600
"""Coming again does not help; whoever does so nevertheless should do it seldom."""


def _until(kind: Kind, error: LimitReached) -> Kind:
    """The kind with the seconds after which the limit gives something back, where that is known."""
    if error.never:
        return msgspec.structs.replace(kind, retry_after=_HOPELESS_SECONDS)
    limit = error.limit
    if limit.resets_at is None:
        return kind
    seconds = (limit.resets_at - datetime.now(UTC)).total_seconds()
    return msgspec.structs.replace(kind, retry_after=max(1, math.ceil(seconds)))


def _told(
    kind: Kind,
    code: str,
    detail: str,
    named: list[FieldError] | None = None,
    limit: Limit | None = None,
) -> tuple[Problem, dict[str, str]]:
    problem = Problem(
        type=f"/docs#{code}",
        title=kind.title,
        status=kind.status,
        detail=detail,
        code=code,
        errors=named,
        limit=limit,
    )
    headers = {} if kind.retry_after is None else {"retry-after": str(kind.retry_after)}
    if kind.status == 401:
        headers["www-authenticate"] = 'Bearer realm="forge"'
    return problem, headers


def _fields(extra: Any) -> list[FieldError]:
    """Litestar's list of what is wrong with parameters, or its text, as ours."""
    if not isinstance(extra, list):
        return [FieldError("", "not acceptable")]
    return [
        FieldError(str(entry.get("key", "")), str(entry.get("message", "")))
        for entry in extra
        if isinstance(entry, dict)
    ]
