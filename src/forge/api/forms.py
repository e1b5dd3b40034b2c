"""The one file of a form (multipart/form-data, RFC 7578), as a stream: it is never held as a whole.

Names, types and paths that a form gives its file are not looked at: only its bytes count.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from litestar import Request
from litestar.exceptions import HTTPException, InternalServerException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from forge.api import edge
from forge.domain.limits import MAX_UPLOAD_BYTES
from forge.errors import Malformed, TooLarge

FIELD = "image"
"""What the field is called in the documentation; any other name will do."""

MAX_FORM = MAX_UPLOAD_BYTES + 64 * 1024
"""A picture and what a form may have around it: boundaries, headers, a preamble."""

SILENCE_SECONDS = 10.0
"""How long a client may send nothing."""

BODY_SECONDS = 60.0
"""How long the whole body may be waited for."""

_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")  # RFC 2046


async def file(request: Request[Any, Any, Any]) -> AsyncGenerator[bytes, None]:
    """The bytes of the file in a form, in pieces as they come; it ends when the form is complete.

    Raises:
        HTTPException: 415 when the body is not declared as a form, 408 when it comes too slowly.
        Malformed: it is not the form it is declared as, or breaks off.
        Invalid: it holds no file, or anything besides.
        TooLarge: the file, or the form around it.
    """
    parser = PushMultipartParser(_boundary(request), max_header_size=4096, max_header_count=8)
    begun, size = False, 0
    try:
        async for chunk in _timely(request):
            for found in parser.parse(chunk):
                if isinstance(found, MultipartSegment):
                    _check(found, begun)
                    begun = True
                elif found is not None:
                    size += len(found)
                    if size > MAX_UPLOAD_BYTES:
                        raise TooLarge(f"the picture has more than {MAX_UPLOAD_BYTES} bytes")
                    yield bytes(found)
        parser.close()
    except MultipartError as error:
        raise Malformed(f"the body is not a complete form: {str(error)[:200]}") from None
    if not begun:
        raise edge.invalid(FIELD, "is missing: send one picture")


def _boundary(request: Request[Any, Any, Any]) -> str:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != "multipart/form-data":
        raise HTTPException(
            status_code=415, detail=f"send the picture as multipart/form-data, in a field {FIELD}"
        )
    boundary: str = options.get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise Malformed("the Content-Type names no usable boundary")
    return boundary


def _check(part: MultipartSegment, begun: bool) -> None:
    name = (part.name or "")[:100]
    if not part.filename:
        if name == FIELD:
            raise edge.invalid(FIELD, "holds no file: send it with a file name")
        raise edge.invalid(name, "there is no such field; send one picture and nothing else")
    if begun:
        raise edge.invalid(name, "is one file too many: send one picture")


async def _timely(request: Request[Any, Any, Any]) -> AsyncIterator[bytes]:
    """The body as it comes; only the time in which the client is waited for counts."""
    stream, now = request.stream(), asyncio.get_running_loop().time
    left = BODY_SECONDS
    while True:
        began = now()
        try:
            async with asyncio.timeout(min(SILENCE_SECONDS, left)):
                chunk = await anext(stream, b"")
        except TimeoutError:
            # the rest would still come, slowly
            raise HTTPException(
                status_code=408, detail="the body came too slowly", headers={"connection": "close"}
            ) from None
        except RequestEntityTooLarge:
            raise TooLarge(f"the form is larger than a picture of {MAX_UPLOAD_BYTES} bytes") from None
        except InternalServerException:
            raise Malformed("the body broke off") from None
        left -= now() - began
        if not chunk:
            return
        yield chunk
