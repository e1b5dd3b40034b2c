"""The asset volume: files named by their hash, in folders named by the hash's beginning.

::

    ROOT/.forge-store                      the marker: where it is missing, the volume is not mounted
    ROOT/assets/ab/cd/<sha256>.png         canonical pictures
    ROOT/thumbs/ab/cd/<sha256>.256.webp    made from them, and can be made again
    ROOT/uploads/ab/cd/<sha256>.png        pictures that users sent, drawn anew
    ROOT/tmp/<name>.<random>/              one folder per attempt or upload, locked while used, gone with it

A file appears under its name only when it is whole: written in `tmp`, synced, renamed, and then the folder
synced too, so that it is still there after a power cut. Storing twice is storing once.

Keeping and renewing share a lock on the marker, removing has it alone: so a removal that looks whether a file
was touched decides before the next touch or after it, and a process that dies leaves no lock behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal, ParamSpec, TypeVar

import msgspec

from forge.canonical import FORMATS, Picture
from forge.errors import PictureRefused, StoreMissing, refusal
from forge.telemetry import part

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
    """The pictures under `root`. Whatever touches the volume raises StoreFailed when the volume refuses, and
    DiskFull when it does so for want of room."""

    NO_FILE: ClassVar = "there is no file"

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
            for folder in _FOLDERS[
                1:
            ]:  # of which a volume of an older forge, or one given back, may have none
                (self.root / folder).mkdir(exist_ok=True)
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

    @part("forge.picture.keep")
    async def keep(self, picture: Picture, kind: Kind = "assets") -> Path:
        """Move a developed picture to its name; returns its path relative to `root`.

        Keeping the same content again renews the file, its time included, so that a removal which has already
        chosen it (`untouched_since`) lets it be.
        """
        return await _in_thread(self._keep, picture, kind)

    async def keep_thumbnails(self, content_hash: str, fmt: str, made: Mapping[int, Path]) -> bool:
        """Move thumbnails, by width, to their names; False, and they stay where they are, when the picture is
        gone."""
        return await _in_thread(self._keep_thumbnails, content_hash, fmt, made)

    async def renew(self, content_hash: str, fmt: str) -> bool:
        """Say that a stored picture is needed again, before the event that says why: as `keep` would.

        Returns False when it is not there; nobody removes it now if it is (`untouched_since`).

        Raises:
            StoreFailed: also when the marker is missing.
        """
        return await _in_thread(self._renew, content_hash, fmt)

    async def remove(
        self, content_hash: str, fmt: str, kind: Kind = "assets", *, untouched_since: float | None = None
    ) -> bool:
        """Remove a picture and its thumbnails; says whether the picture was there and went.

        With `untouched_since` (Unix seconds) a picture that was kept after that moment stays.

        Raises:
            StoreFailed: also when the marker is missing; nothing is then removed.
        """
        return await _in_thread(self._remove, content_hash, fmt, kind, untouched_since)

    def files(self, kind: Kind = "assets") -> Iterator[StoredFile]:
        """Every picture of a kind on the volume, in order of hash; blocking, one folder in memory at a time.

        Raises:
            StoreFailed: also when the marker is missing, since "nothing is there" would then be wrong.
        """
        with _volume(self.root):
            self._demand_marker()
            for first in _folders(self.root / kind):
                for second in _folders(first):
                    for entry in _sorted(second):
                        if found := _stored_file(entry):
                            yield found
            self._demand_marker()

    def sweep(self, stale_seconds: float, *, pretend: bool = False) -> int:
        """Remove what in `tmp` is older than `stale_seconds` and belongs to nobody alive; says how many."""
        swept = 0
        with _volume(self.root):
            self._demand_marker()
            for entry in list(os.scandir(self.root / "tmp")):
                with contextlib.suppress(FileNotFoundError):  # its owner was faster
                    # Not mtime: who writes a file may set that.
                    old = time.time() - entry.stat(follow_symlinks=False).st_ctime >= stale_seconds
                    swept += old and _sweep(entry, pretend)
        return swept

    def tidy(self, untouched_since: float, *, pretend: bool = False) -> int:
        """Remove thumbnails whose picture is gone, and folders with nothing in them; says how many.

        What was made after that moment (Unix seconds) stays: somebody may be about to use it.

        Raises:
            StoreFailed: also when the marker is missing.
        """
        gone = 0
        with _volume(self.root):
            for kind in ("thumbs", "assets"):
                for first in _folders(self.root / kind):
                    for second in _folders(first):
                        if kind == "thumbs":
                            gone += sum(self._tidied(t, untouched_since, pretend) for t in _sorted(second))
                        gone += self._emptied(second, untouched_since, pretend)
                    gone += self._emptied(first, untouched_since, pretend)
        return gone

    def misfit(self, content_hash: str, fmt: str, size_bytes: int) -> str:
        """What is wrong with a stored picture's file at a glance, empty if nothing; blocking.

        Raises:
            StoreFailed: the volume refuses, or it is not the volume.
        """
        path = self.path(content_hash, fmt)
        with _volume(path):
            try:
                there = path.lstat()
            except FileNotFoundError:
                self._demand_marker()  # gone with everything else?
                return self.NO_FILE
        if not stat.S_ISREG(there.st_mode):
            return "it is not a file"
        return "" if there.st_size == size_bytes else f"it has {there.st_size} bytes, not {size_bytes}"

    def fault(self, content_hash: str, fmt: str) -> str:
        """The same after reading all of it; blocking."""
        path = self.path(content_hash, fmt)
        with _volume(path):
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    return "" if digest == content_hash else "its bytes are not the ones stored"
            except FileNotFoundError:
                self._demand_marker()
                return self.NO_FILE

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

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Keepers share it, a removal has it alone; it is held for as long as a file takes, not longer."""
        self._demand_marker()
        descriptor = os.open(self.root / MARKER, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)

    def _renew(self, content_hash: str, fmt: str) -> bool:
        final = self.path(content_hash, fmt)
        with _volume(final), self._locked(fcntl.LOCK_SH):
            try:
                _touch(final)
            except FileNotFoundError:
                return False
        return True

    def _tidied(self, entry: os.DirEntry[str], untouched_since: float, pretend: bool) -> bool:
        content_hash = entry.name.partition(".")[0]
        if not _HASH.fullmatch(content_hash) or not entry.name.endswith(".webp"):
            return False
        with self._locked(fcntl.LOCK_EX), contextlib.suppress(FileNotFoundError):
            if entry.stat(follow_symlinks=False).st_mtime > untouched_since:
                return False
            kinds: tuple[Kind, ...] = ("assets", "uploads")
            if any(self.path(content_hash, fmt, kind).exists() for fmt in FORMATS for kind in kinds):
                return False
            if not pretend:
                os.unlink(entry.path)
            return True
        return False

    def _emptied(self, folder: Path, untouched_since: float, pretend: bool) -> bool:
        with self._locked(fcntl.LOCK_EX), contextlib.suppress(FileNotFoundError):
            if folder.stat().st_mtime > untouched_since or any(folder.iterdir()):
                return False
            if not pretend:
                folder.rmdir()
            return True
        return False

    def _keep(self, picture: Picture, kind: Kind) -> Path:
        final = self.path(picture.content_hash, picture.format, kind)
        with _volume(final), self._locked(fcntl.LOCK_SH):
            changed = _made(final.parent)
            _move(picture.path, final)
            for folder in changed:
                _sync(folder)
        return final.relative_to(self.root)

    def _keep_thumbnails(self, content_hash: str, fmt: str, made: Mapping[int, Path]) -> bool:
        final = self.path(content_hash, fmt)
        with _volume(final), self._locked(fcntl.LOCK_SH):  # a removal takes both or comes before
            if not final.exists():
                return False
            for width, source in made.items():
                target = self.thumbnail_path(content_hash, width)
                _made(target.parent)  # not synced: a thumbnail that a power cut takes can be made again
                _move(source, target)
        return True

    def _remove(self, content_hash: str, fmt: str, kind: Kind, untouched_since: float | None) -> bool:
        final = self.path(content_hash, fmt, kind)
        with _volume(final), self._locked(fcntl.LOCK_EX):
            there = True
            try:
                if untouched_since is not None and final.stat().st_mtime > untouched_since:
                    return False
                final.unlink()
            except FileNotFoundError:
                there = False
            if kind == "assets":
                # after the picture: thumbnails that a kill leaves are found by `tidy`, or by saying it again
                for thumbnail in self._folder("thumbs", content_hash).glob(f"{content_hash}.*.webp"):
                    thumbnail.unlink(missing_ok=True)
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


def _touch(path: Path) -> None:
    """Set the file's times to now. Left to the kernel they are those of its last tick, some milliseconds ago,
    and a removal that was decided since would take the file for older than it is."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _move(source: Path, target: Path) -> None:
    try:
        _touch(source)
        source.replace(target)
    except FileNotFoundError:
        _touch(target)  # kept before: said twice, done once


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


def _sweep(entry: os.DirEntry[str], pretend: bool) -> bool:
    if not entry.is_dir(follow_symlinks=False):
        if not pretend:
            os.unlink(entry.path)
        return True
    try:
        lock = _lock(Path(entry.path))
    except BlockingIOError:
        return False
    try:
        if not pretend:
            shutil.rmtree(entry.path, ignore_errors=True)
    finally:
        os.close(lock)
    return True


def _sorted(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        if folder.name in _FOLDERS:  # one of the volume's own
            raise
        return []  # it was empty, and is gone by now


def _folders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _sorted(folder) if entry.is_dir(follow_symlinks=False)]


def _stored_file(entry: os.DirEntry[str]) -> StoredFile | None:
    content_hash, _, fmt = entry.name.partition(".")
    if fmt not in FORMATS or not _HASH.fullmatch(content_hash):
        return None
    try:
        there = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # removed since the folder was read
        return None
    return StoredFile(content_hash, fmt, there.st_size, there.st_mtime)


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
        raise refusal(path, error) from error


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
