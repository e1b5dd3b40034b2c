"""Sending a stored file: validators, ranges, and headers that keep a picture a picture (RFC 9110)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.response import Stream

from forge.errors import StoreFailed

_CHUNK = 256 * 1024
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

# A picture opened as a page of its own runs nothing and reaches nothing.
_HEADERS = {
    "accept-ranges": "bytes",
    "cache-control": "private, max-age=31536000, immutable",
    "content-security-policy": "default-src 'none'; sandbox",
    "cross-origin-resource-policy": "same-origin",
    "vary": "authorization, x-forge-user",
    "x-content-type-options": "nosniff",
}


class Part(msgspec.Struct, frozen=True):
    """The bytes of a file from ``start`` up to, but without, ``end``."""

    start: int
    end: int


def part_of(wanted: str | None, size: int) -> Part | None:
    """The one part that a Range header asks for; None where the whole file is the answer.

    Several ranges, other units and nonsense may be ignored, and are.

    Raises:
        ValueError: the range lies outside the file.
    """
    found = _RANGE.fullmatch((wanted or "").strip())
    if found is None or found[1] == found[2] == "":
        return None
    if found[1] == "":
        start, end = max(0, size - int(found[2])), size
    else:
        start, end = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None
    if start >= size or start >= end:
        raise ValueError(f"bytes {wanted} of {size}")
    return Part(start, end)


def matches(header: str | None, etag: str) -> bool:
    """Whether If-None-Match names this tag, weakly compared."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return etag in tags or "*" in tags


async def send(
    request: Request[Any, Any, Any], path: Path, etag: str, media_type: str, *, size: int | None = None
) -> Response[Any]:
    """The file, a part of it, or word that the client has it already.

    ``etag`` stands for its bytes for ever. ``size`` is what it must have.

    Raises:
        StoreFailed: it is missing, or not what was stored.
        HTTPException: 416, with the size.
    """
    quoted = f'"{etag}"'
    headers = _HEADERS | {"etag": quoted}
    if matches(request.headers.get("if-none-match"), quoted):
        return Response(b"", status_code=304, headers=headers, media_type=media_type)
    there = await asyncio.to_thread(_size, path)
    if size is not None and there != size:
        raise StoreFailed("the stored file is damaged")
    wanted = request.headers.get("range")
    if request.headers.get("if-range") not in (None, quoted):
        wanted = None
    try:
        part = part_of(wanted, there)
    except ValueError:
        raise HTTPException(
            status_code=416,
            detail=f"the file has {there} bytes",
            headers={"content-range": f"bytes */{there}"},
        ) from None
    status, start, end = (200, 0, there) if part is None else (206, part.start, part.end)
    if part is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{there}"
    headers["content-length"] = str(end - start)
    return Stream(_read(path, start, end), status_code=status, headers=headers, media_type=media_type)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StoreFailed(f"the stored file cannot be read: {error.strerror}") from error


async def _read(path: Path, start: int, end: int) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(path.open, "rb", 0)
    try:
        await asyncio.to_thread(file.seek, start)
        while start < end:
            chunk = await asyncio.to_thread(file.read, min(_CHUNK, end - start))
            if not chunk:
                raise StoreFailed("the stored file became shorter")
            yield chunk
            start += len(chunk)
    finally:
        file.close()
