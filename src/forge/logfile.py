"""A copy of the log in a file: JSON lines, compressed; it can be checked without any server.

::

    {"forge_log": 1, "entries": N}
    {"seq": 1, "subject": …, "headers": {…}, "data": Base64, "arrived": …}   and so on, each event in order
    {"entries": N, "chain": hex}                                      the end of :mod:`forge.domain.chain`
"""

from __future__ import annotations

import fcntl
import gzip
import os
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from forge.domain.chain import Entry, Link, link
from forge.domain.wholeness import gap
from forge.errors import FileUnfit

VERSION = 1
PAGE = 1000

Progress = Callable[[int, int], None]


class _Head(msgspec.Struct):
    forge_log: int
    entries: int


class _End(msgspec.Struct, forbid_unknown_fields=True):
    entries: int
    chain: str


_heads, _ends = msgspec.json.Decoder(_Head), msgspec.json.Decoder(_End)
_entries = msgspec.json.Decoder(Entry)


async def write(path: Path, pages: AsyncIterator[list[Entry]], count: int, progress: Progress) -> Link:
    """Write so many entries from the first on; the file appears when it is whole and on disk.

    Raises:
        FileUnfit: there is such a file, another export writes it, it cannot be written, or the entries do
            not follow each other.
    """
    with _appearing(path) as out:
        return await _written(out, pages, count, progress)


@contextmanager
def _appearing(path: Path) -> Iterator[gzip.GzipFile]:
    part = path.with_name(path.name + ".part")
    try:
        with part.open("ab") as raw:
            _alone(raw, part, path)
            try:
                if path.exists():
                    raise FileUnfit(f"{path} is there already")
                raw.truncate(0)  # of one that was killed
                with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6) as out:
                    yield out
                raw.flush()
                os.fsync(raw.fileno())
                part.rename(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        _sync(path.parent)
    except OSError as error:
        raise FileUnfit(f"{path} cannot be written: {error.strerror or error}") from error


def _alone(raw: IO[bytes], part: Path, path: Path) -> None:
    """Hold the part, so that no two exports write it at once."""
    try:
        fcntl.flock(raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(raw.fileno()), part.stat())
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:  # held, or no longer the part since it was opened here
        raise FileUnfit(f"another export is writing {path}")


def _sync(directory: Path) -> None:
    """A name is on disk when its directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def _written(
    out: gzip.GzipFile, pages: AsyncIterator[list[Entry]], count: int, progress: Progress
) -> Link:
    place = Link()
    out.write(_line(_Head(VERSION, count)))
    async for page in pages:
        for entry in page[: count - place.seq]:
            if wrong := gap(place.seq, [entry]):
                raise FileUnfit(wrong)
            place = link(place, entry)
            out.write(_line(entry))
        progress(place.seq, count)
        if place.seq >= count:
            break
    if place.seq < count:
        raise FileUnfit(f"there are only {place.seq} of {count} events")
    out.write(_line(_End(count, place.hash.hex())))
    return place


def _line(said: msgspec.Struct) -> bytes:
    return msgspec.json.encode(said) + b"\n"


def check(path: Path, at: int = 0, progress: Progress = lambda done, of: None) -> tuple[Link, Link]:
    """Read all of a file; the end of its chain, and its place at a sequence.

    Raises:
        FileUnfit: it is no such file, was cut off, or was changed; says where.
    """
    place = middle = Link()
    for page in read(path, progress=progress):
        for entry in page:
            place = link(place, entry)
            middle = place if entry.seq == at else middle
    return place, middle


def read(path: Path, after: int = 0, progress: Progress = lambda done, of: None) -> Iterator[list[Entry]]:
    """The entries behind a sequence, a page at a time; at the end the chain over all is compared.

    Raises:
        FileUnfit: as :func:`check`; what came before need not be right then.
    """
    place = Link()
    try:
        with gzip.open(path, "rb") as lines:
            head = _heads.decode(lines.readline())
            if head.forge_log != VERSION:
                raise FileUnfit(f"{path} is of version {head.forge_log}, this forge reads {VERSION}")
            page: list[Entry] = []
            for _ in range(head.entries):
                entry = _entries.decode(lines.readline())
                if wrong := gap(place.seq, [entry]):
                    raise FileUnfit(f"{path}: {wrong}")
                place = link(place, entry)
                if entry.seq > after:
                    page.append(entry)
                if len(page) == PAGE:
                    progress(place.seq, head.entries)
                    yield page
                    page = []
            if page:
                yield page
            progress(place.seq, head.entries)
            end = _ends.decode(lines.readline())
            if lines.read(1):
                raise FileUnfit(f"{path} was changed: something comes behind its end")
    except (OSError, EOFError, zlib.error, msgspec.MsgspecError) as error:
        where = f"behind event {place.seq}" if place.seq else "from its beginning"
        raise FileUnfit(f"{path} cannot be read {where}: {error}") from error
    if end != _End(place.seq, place.hash.hex()):
        raise FileUnfit(f"{path} was changed: its entries do not give the hash at its end")
