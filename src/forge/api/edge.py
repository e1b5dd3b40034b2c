"""Where what clients send becomes plain, bounded values, or an error that names the field."""

from __future__ import annotations

import re
import unicodedata
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.exceptions import HTTPException, InternalServerException

from forge.errors import FieldError, Invalid, Malformed

MAX_BODY = 64 * 1024
MAX_BATCH_BODY = 2 * 1024 * 1024
MAX_ID = 128
MAX_KEY = 255
MAX_SEQ = 2**63 - 1

T = TypeVar("T")

_PLAIN = re.compile(r"[ -~]*")
_AT = re.compile(r" - at `\$?\.?(.*)`$")
_UNKNOWN = re.compile(r"Object (?:contains unknown|missing required) field `(.*?)`")


async def body(request: Request[Any, Any, Any], decoder: msgspec.json.Decoder[T]) -> T:
    """The JSON body of a request.

    Raises:
        Malformed: it is not JSON, or nested too deeply.
        Invalid: it is JSON of another shape; names the field.
        HTTPException: 415 when it is not declared as JSON. Browsers may send other types across sites
            without asking, so this keeps foreign pages from acting in a user's name.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != "application/json" and not (
        declared.startswith("application/") and declared.endswith("+json")
    ):
        raise HTTPException(status_code=415, detail="send the body as Content-Type: application/json")
    try:
        return decoder.decode(await whole(request))
    except msgspec.ValidationError as error:
        raise Invalid([_field_error(str(error))]) from None
    except (msgspec.DecodeError, UnicodeError, ValueError) as error:
        raise Malformed(f"the body is not JSON: {str(error)[:200]}") from None
    except RecursionError:
        raise Malformed("the body is nested too deeply") from None


async def whole(request: Request[Any, Any, Any]) -> bytes:
    """The body's bytes.

    Raises:
        Malformed: the client hung up before its end.
        HTTPException: 413, it is larger than the route takes.
    """
    try:
        return await request.body()
    except InternalServerException:  # Litestar's word for it
        raise Malformed("the request broke off") from None


def _field_error(message: str) -> FieldError:
    """msgspec says ``Expected `int`, got `str` - at `$.jobs[3].priority```."""
    at = _AT.search(message)
    field, message = (at[1], message[: at.start()]) if at else ("", message)
    unknown = _UNKNOWN.search(message)
    if unknown:
        field = f"{field}.{unknown[1]}" if field else unknown[1]
    return FieldError(field[:200], message)


def name(field: str, text: str | None, longest: int = MAX_ID) -> str | None:
    """An opaque id: 1 to ``longest`` characters, nothing invisible but the plain space.

    Raises:
        Invalid: names the field.
    """
    if text is None:
        return None
    if not 1 <= len(text) <= longest:
        raise invalid(field, f"must have 1 to {longest} characters")
    if not _PLAIN.fullmatch(text) and any(unicodedata.category(char)[0] == "C" for char in text):
        raise invalid(field, "must not hold control or unassigned characters")
    return text


def header(request_headers: Any, field: str, longest: int = MAX_ID) -> str | None:
    """A header that holds an opaque id, in UTF-8.

    Raises:
        Invalid: names the header.
    """
    raw: str | None = request_headers.get(field)
    if raw is None:
        return None
    if raw.isascii():
        return name(field, raw, longest)
    try:
        return name(field, raw.encode("latin-1").decode(), longest)
    except UnicodeError:
        raise invalid(field, "must be UTF-8") from None


def moment(field: str, text: str | None) -> datetime | None:
    """A time as RFC 3339 writes it; UTC where it says nothing else.

    Raises:
        Invalid: names the field.
    """
    if text is None:
        return None
    try:
        # an offset's plus sign that was not escaped arrives as a space
        at = datetime.fromisoformat(text.replace(" ", "+"))
        return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except (ValueError, OverflowError):
        raise invalid(field, "must be a time like 2026-01-31T12:00:00Z") from None


def invalid(field: str, message: str) -> Invalid:
    return Invalid([FieldError(field, message)])
