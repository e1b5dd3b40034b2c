"""The asset volume: files named by their hash, in folders named by the hash's beginning.

::

    ROOT/.forge-store                      the marker: where it is missing, the volume is not mounted
    ROOT/assets/ab/cd/<sha256>.png         canonical pictures
    ROOT/thumbs/ab/cd/<sha256>.256.webp    made from them, and can be made again
    ROOT/uploads/ab/cd/<sha256>.png        pictures that users sent, drawn anew
    ROOT/tmp/<name>.<random>/              one folder per attempt or upload, locked while used, gone with it

A file appears under its name only when it is whole: written in `tmp`, synced, renamed, and then the folder
synced too, so that it is still there after a power cut. Storing twice is storing once.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, ParamSpec, TypeVar

import msgspec

from forge.canonical import FORMATS, Picture
from forge.errors import PictureRefused, StoreFailed, StoreMissing

MARKER = ".forge-store"

_MARKER_TEXT = b"forge keeps pictures here. Without this file it takes the volume for not mounted.\n"
_FOLDERS = ("assets", "thumbs", "uploads", "tmp")
_HASH = re.compile(r"[0-9a-f]{64}")
_WORKSPACE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_WRITE_BYTES = 1 << 20  # collected before a thread is asked to write

Kind = Literal["assets", "uploads"]
"""What a picture is kept as. The two never share a file, though they may share its content."""

P = ParamSpec("P")
T = TypeVar("T")


class StoredFile(msgspec.Struct, frozen=True):
    """One canonical picture on the volume: bytes without thumbnails, Unix seconds of the last `keep`."""

    content_hash: str
    format: str
    size_bytes: int
    modified_at: float


class Store:
    """The pictures under `root`. Whatever touches the volume raises StoreFailed when the volume refuses."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, *, create: bool = True, stale_seconds: float = 3600.0) -> None:
        """Make the folders and the marker, then sweep what dead processes left in `tmp`.

        Pass `create=False` when the log already knows of assets: an empty folder is then a lost mount.

        Raises:
            StoreMissing: no marker although there should be one.
            StoreFailed: the volume refuses.
        """
        with _volume(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if not self.marker_present():
                if not create:
                    self._demand_marker()
                self._found()
            (self.root / "uploads").mkdir(exist_ok=True)  # a volume of an older forge has none
        self.sweep(stale_seconds)

    def marker_present(self) -> bool:
        """Whether this is the volume, and not the empty folder it is mounted on."""
        return (self.root / MARKER).is_file()

    def path(self, content_hash: str, fmt: str, kind: Kind = "assets") -> Path:
        """Where a picture lies, or would lie."""
        if fmt not in FORMATS:
            raise ValueError(f"{fmt!r} is not a format forge keeps")
        return self._folder(kind, content_hash) / f"{content_hash}.{fmt}"

    def thumbnail_path(self, content_hash: str, width: int) -> Path:
        """Where a picture's WebP of `width` pixels lies, or would lie."""
        return self._folder("thumbs", content_hash) / f"{content_hash}.{int(width)}.webp"

    @contextlib.asynccontextmanager
    async def workspace(self, name: str) -> AsyncIterator[Path]:
        """A new folder on the volume, removed on the way out whatever happens.

        Two attempts of one name never share it. It is locked, so that no sweep takes it for a leftover.
        """
        if not _WORKSPACE.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a folder")
        # Not in a thread: what a thread made would stay if this is cancelled meanwhile.
        with _volume(self.root), contextlib.ExitStack() as on_failure:
            folder = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=self.root / "tmp"))
            on_failure.callback(shutil.rmtree, folder, ignore_errors=True)
            lock = _lock(folder)
            on_failure.pop_all()
        try:
            yield folder
        finally:
            try:
                await _in_thread(shutil.rmtree, folder, ignore_errors=True)
            finally:
                os.close(lock)

    async def receive(self, chunks: AsyncIterator[bytes], target: Path, *, max_bytes: int) -> int:
        """Write a stream to the new file `target` in bounded memory; returns its size in bytes.

        Raises:
            PictureRefused: more than `max_bytes`; the rest is not read and `target` is gone.
        """
        with _volume(target):
            file = target.open("xb", 0)
        size, waiting = 0, bytearray()
        try:
            with file:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > max_bytes:
                        raise PictureRefused(f"the picture is larger than {max_bytes} bytes")
                    waiting += chunk
                    if len(waiting) >= _WRITE_BYTES:
                        await _in_thread(_write, file, bytes(waiting))
                        waiting.clear()
                await _in_thread(_write, file, bytes(waiting))
        except BaseException:
            await _in_thread(target.unlink, missing_ok=True)
            raise
        return size

    async def keep(self, picture: Picture, kind: Kind = "assets") -> Path:
        """Move a developed picture and its thumbnails to their names; returns its path relative to `root`.

        Keeping the same content again renews the file, its time included, so that a removal which has already
        chosen it (`untouched_since`) lets it be.
        """
        return await _in_thread(self._keep, picture, kind)

    async def remove(
        self, content_hash: str, fmt: str, kind: Kind = "assets", *, untouched_since: float | None = None
    ) -> bool:
        """Remove a picture and its thumbnails; says whether the picture was there and went.

        With `untouched_since` (Unix seconds) a picture that was kept after that moment stays.

        Raises:
            StoreFailed: also when the marker is missing; nothing is then removed.
        """
        return await _in_thread(self._remove, content_hash, fmt, kind, untouched_since)

    async def renew(self, content_hash: str, fmt: str) -> bool:
        """Renew a picture as keeping it again would, so that a removal lets it be; False if it is gone."""
        return await _in_thread(self._renew, content_hash, fmt)

    def files(self, kind: Kind = "assets") -> Iterator[StoredFile]:
        """Every picture of a kind on the volume, in order of hash; blocking, one folder in memory at a time.

        Raises:
            StoreFailed: also when the marker is missing, since "nothing is there" would then be wrong.
        """
        with _volume(self.root):
            self._demand_marker()
            for first in _sorted(self.root / kind):
                for second in _sorted(first.path):
                    for entry in _sorted(second.path):
                        if found := _stored_file(entry):
                            yield found

    def sweep(self, stale_seconds: float) -> int:
        """Remove what in `tmp` is older than `stale_seconds` and belongs to nobody alive; says how many."""
        swept = 0
        with _volume(self.root):
            self._demand_marker()
            for entry in list(os.scandir(self.root / "tmp")):
                with contextlib.suppress(FileNotFoundError):  # its owner was faster
                    # Not mtime: what `remove` puts aside here keeps the one it had.
                    old = time.time() - entry.stat(follow_symlinks=False).st_ctime >= stale_seconds
                    swept += old and _sweep(entry)
        return swept

    def _found(self) -> None:
        # Empty folders are what a process left that was stopped right here; `lost+found` is a fresh volume's.
        # Another process may be founding it right now: each step allows for that.
        strangers = {entry.name for entry in self.root.iterdir()} - {*_FOLDERS, "lost+found"}
        if strangers or any(any((self.root / kind).glob("*")) for kind in _FOLDERS[:-1]):
            self._demand_marker()
        for folder in _FOLDERS:
            (self.root / folder).mkdir(exist_ok=True)
        # Last, and whole: with the marker there, everything else is.
        unfinished = self.root / "tmp" / f"{MARKER}.{secrets.token_hex(8)}"
        with unfinished.open("xb", 0) as file:
            _write(file, _MARKER_TEXT)
            os.fsync(file.fileno())
        unfinished.rename(self.root / MARKER)
        _sync(self.root)

    def _folder(self, kind: str, content_hash: str) -> Path:
        if not _HASH.fullmatch(content_hash):
            raise ValueError(f"{content_hash!r} is not a hash")
        return self.root / kind / content_hash[:2] / content_hash[2:4]

    def _demand_marker(self) -> None:
        if not self.marker_present():
            raise StoreMissing(f"{self.root} has no {MARKER}: is the volume mounted?")

    def _keep(self, picture: Picture, kind: Kind) -> Path:
        final = self.path(picture.content_hash, picture.format, kind)
        moves = [
            *((file, self.thumbnail_path(picture.content_hash, w)) for w, file in picture.thumbnails.items()),
            (picture.path, final),  # last: who sees the picture sees its thumbnails
        ]
        with _volume(final):
            self._demand_marker()
            # Only the picture's folders are synced: a thumbnail that a power cut takes can be made again.
            *_, changed = [_made(target.parent) for _, target in moves]
            for source, target in moves:
                _move(source, target)
            for folder in changed:
                _sync(folder)
        return final.relative_to(self.root)

    def _renew(self, content_hash: str, fmt: str) -> bool:
        final = self.path(content_hash, fmt)
        with _volume(final):
            self._demand_marker()
            try:
                os.utime(final)
            except FileNotFoundError:
                return False
        return True

    def _remove(self, content_hash: str, fmt: str, kind: Kind, untouched_since: float | None) -> bool:
        final = self.path(content_hash, fmt, kind)
        aside = self.root / "tmp" / f"removed.{secrets.token_hex(8)}"
        with _volume(final):
            self._demand_marker()
            try:
                # Taken away before it is judged: a `keep` from now on puts a new one in its place.
                final.rename(aside)
            except FileNotFoundError:
                there = False
            else:
                if untouched_since is not None and aside.stat().st_mtime > untouched_since:
                    aside.rename(final)
                    return False
                there = True
            if kind == "assets":
                for thumbnail in self._folder("thumbs", content_hash).glob(f"{content_hash}.*.webp"):
                    thumbnail.unlink(missing_ok=True)
            aside.unlink(missing_ok=True)
        return there


def _made(folder: Path) -> list[Path]:
    """Make the two levels of `folder`; returns the folders that changed by what will be put into it.

    Not `parents=True`: the kind's own folder belongs to a mounted volume and is never made on the way.
    """
    changed = [folder]
    for level in (folder.parent, folder):
        try:
            level.mkdir()
        except FileExistsError:
            continue
        changed.append(level.parent)
    return changed


def _move(source: Path, target: Path) -> None:
    try:
        os.utime(source)
        source.replace(target)
    except FileNotFoundError:
        os.utime(target)  # kept before: said twice, done once


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """An open descriptor that marks the folder as used, until it is closed or its process is no more.

    Raises:
        BlockingIOError: somebody uses it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(entry: os.DirEntry[str]) -> bool:
    if not entry.is_dir(follow_symlinks=False):
        os.unlink(entry.path)
        return True
    try:
        lock = _lock(Path(entry.path))
    except BlockingIOError:
        return False
    try:
        shutil.rmtree(entry.path, ignore_errors=True)
    finally:
        os.close(lock)
    return True


def _sorted(folder: Path | str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _stored_file(entry: os.DirEntry[str]) -> StoredFile | None:
    content_hash, _, fmt = entry.name.partition(".")
    if fmt not in FORMATS or not _HASH.fullmatch(content_hash):
        return None
    try:
        stat = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # removed since the folder was read
        return None
    return StoredFile(content_hash, fmt, stat.st_size, stat.st_mtime)


def _write(file: BinaryIO, data: bytes) -> None:
    with _volume(Path(file.name)):
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


@contextlib.contextmanager
def _volume(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"{path}: {error.strerror or error}") from error


async def _in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `call` in a thread and, when cancelled, wait for its end: it must not touch files others remove."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # seen, if there is one: the cancellation is what the caller hears
        raise
