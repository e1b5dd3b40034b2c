"""Sending a stored file: validators, ranges, and headers that keep a picture a picture (RFC 9110)."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException
from litestar.response import Stream

from forge.errors import StoreFailed
from forge.store import Store

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


class Unfit(StoreFailed):
    """The stored file cannot be sent; ``found`` says what is wrong with it."""

    def __init__(self, found: str) -> None:
        self.found = found
        super().__init__(f"the stored file cannot be sent: {found}")


class _Open:
    """A file that is open from before the answer begins: its name may go, its bytes stay until the end.

    Closed by the last who holds it, since an answer without body (HEAD, a client that left) reads nothing.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        there = os.fstat(self.descriptor)
        self.size, self.state = there.st_size, (there.st_dev, there.st_ino, there.st_ctime_ns, there.st_size)

    def read(self, start: int, count: int) -> bytes:
        return os.pread(self.descriptor, count, start)

    def digest(self) -> str:
        sha256, start = hashlib.sha256(), 0
        while chunk := self.read(start, _CHUNK):
            sha256.update(chunk)
            start += len(chunk)
        return sha256.hexdigest()

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


async def send(
    request: Request[Any, Any, Any], path: Path, etag: str, media_type: str, *, digest: str | None = None
) -> Response[Any]:
    """The file, a part of it, or word that the client has it already.

    ``etag`` stands for its bytes for ever. ``digest`` is their SHA-256: compared before the first is sent,
    and again when the file has changed since.

    Raises:
        Unfit: it is missing, or not what was stored.
        HTTPException: 416, with the size.
    """
    quoted = f'"{etag}"'
    headers = _HEADERS | {"etag": quoted}
    if matches(request.headers.get("if-none-match"), quoted):
        return Response(b"", status_code=304, headers=headers, media_type=media_type)
    file = await asyncio.to_thread(_opened, path, digest)
    wanted = request.headers.get("range")
    if request.headers.get("if-range") not in (None, quoted):
        wanted = None
    try:
        part = part_of(wanted, file.size)
    except ValueError:
        raise HTTPException(
            status_code=416,
            detail=f"the file has {file.size} bytes",
            headers={"content-range": f"bytes */{file.size}"},
        ) from None
    status, start, end = (200, 0, file.size) if part is None else (206, part.start, part.end)
    if part is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{file.size}"
    headers["content-length"] = str(end - start)
    return Stream(_read(file, start, end), status_code=status, headers=headers, media_type=media_type)


_compared: OrderedDict[tuple[int, int, int, int], str] = OrderedDict()
_COMPARED_KEPT = 20_000


def _opened(path: Path, digest: str | None) -> _Open:
    try:
        file = _Open(path)
        if digest is not None and _compared.get(file.state) != digest:
            if file.digest() != digest:
                raise Unfit("its bytes are not the ones stored")
            _compared[file.state] = digest
            while len(_compared) > _COMPARED_KEPT:
                _compared.popitem(last=False)
    except FileNotFoundError:
        raise Unfit(Store.NO_FILE) from None
    except OSError as error:
        raise Unfit(error.strerror or repr(error)) from error
    return file


async def _read(file: _Open, start: int, end: int) -> AsyncIterator[bytes]:
    while start < end:
        chunk = await asyncio.to_thread(file.read, start, min(_CHUNK, end - start))
        if not chunk:
            raise StoreFailed("the stored file became shorter")
        yield chunk
        start += len(chunk)
