"""Every picture is decoded here before forge believes it: in a child process that can do nothing else.

A file comes in, `Picture` leaves: canonical bytes, hashes and a colour, on disk. The child
(`forge.darkroom`) is a plain subprocess, given open files instead of paths. A process pool would bring three
processes, import the whole command line into each of them and could not stop a picture that decodes for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from forge.canonical import THUMBNAIL_WIDTHS, Picture
from forge.errors import DiskFull, PictureRefused, ServerFailed, StoreFailed, refusal
from forge.telemetry import part
from forge.telemetry.numbers import counter

__all__ = ["Picture", "Workshop"]

log = logging.getLogger("forge.images")

_deaths = counter("forge_decoder_deaths", "Decoders that ended over a picture, or were ended.")

_SECONDS_PER_PICTURE = 60.0  # the largest picture takes about five


class _ChildDied(Exception):
    """The child ended, or was ended, before it answered."""


class Workshop:
    """Develops pictures in `processes` children, each bounded to `memory_bytes` of address space.

    A picture of more than `max_pixels` is refused on its header. Callers wait their turn. Enter it on the
    event loop's own thread and keep that thread: the children die with it.
    """

    def __init__(self, processes: int = 1, max_pixels: int = 64_000_000, memory_bytes: int = 1 << 30) -> None:
        self._children = [_Child(max_pixels, memory_bytes) for _ in range(processes)]
        self._idle: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(child.start() for child in self._children))
        except BaseException:
            await self.close()
            raise
        for child in self._children:
            self._idle.put_nowait(child)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the children, whatever they are doing."""
        await asyncio.gather(*(child.end() for child in self._children))

    @property
    def pids(self) -> list[int]:
        """The running children."""
        return [child.process.pid for child in self._children if child.process]

    @part("forge.picture.develop")
    async def develop(self, source: Path, folder: Path) -> Picture:
        """Write the canonical form of `source` into `folder`, fsynced.

        Raises:
            PictureRefused: not a PNG, JPEG or WebP forge accepts; nothing is left in `folder`.
            StoreFailed: a file could not be read or written; DiskFull: for want of room.
        """
        path = folder / secrets.token_hex(8)
        return Picture(path=path, **await self._order({}, source, [path]))

    async def redraw(self, source: Path, folder: Path, max_pixels: int) -> Picture:
        """Write the pixels of `source`, upright and nothing else of it, as a new PNG into `folder`, fsynced.

        A picture of more than `max_pixels` is refused on its header.

        Raises:
            PictureRefused, StoreFailed: as `develop`.
        """
        path = folder / secrets.token_hex(8)
        return Picture(path=path, **await self._order({"redraw": max_pixels}, source, [path]))

    async def thumbnails(
        self, source: Path, folder: Path, widths: Sequence[int] = THUMBNAIL_WIDTHS
    ) -> dict[int, Path]:
        """Write a WebP of `source` for each width into `folder`, fsynced: at most so wide and never enlarged.

        Raises:
            PictureRefused, StoreFailed: as `develop`.
        """
        name = secrets.token_hex(8)
        made = {width: folder / f"{name}.{width}.webp" for width in widths}
        await self._order({"thumbnails": list(made)}, source, list(made.values()))
        return made

    async def _order(self, order: dict[str, Any], source: Path, targets: Sequence[Path]) -> dict[str, Any]:
        child = await self._idle.get()
        try:
            answer = await _twice(child, msgspec.json.encode(order) + b"\n", source, targets)
            if "refused" in answer:
                raise PictureRefused(answer["refused"])
            if "failed" in answer:
                raise (DiskFull if answer.get("full") else StoreFailed)(answer["failed"])
        except BaseException:
            for target in targets:
                target.unlink(missing_ok=True)
            raise
        finally:
            self._idle.put_nowait(child)
        return answer


async def _twice(child: _Child, order: bytes, source: Path, targets: Sequence[Path]) -> dict[str, Any]:
    """A child can die through no fault of the picture it holds; twice is no coincidence."""
    for _ in range(2):
        try:
            return await child.answer(order, source, targets)
        except _ChildDied:
            _deaths.inc()
            log.warning("a decoder died", extra={"source": source.name})
    raise PictureRefused("the picture ended its decoder twice")


class _Child:
    """One decoder process and the socket to it; it is started again when it is needed and gone."""

    def __init__(self, max_pixels: int, memory_bytes: int) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._bounds = (str(memory_bytes), str(max_pixels))
        self._socket: socket.socket | None = None

    async def start(self) -> socket.socket:
        """The socket to a child that is ready."""
        if self._socket and self.process and self.process.poll() is None:
            return self._socket
        await self.end()
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        with theirs:
            # Not from another thread: the child asks to die with the thread that started it.
            self.process = subprocess.Popen(  # noqa: ASYNC220  (as said above)
                [sys.executable, "-I", "-m", "forge.darkroom", *self._bounds],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={},
                cwd="/",
            )
        ready = self._socket
        try:
            said = msgspec.json.decode(await self._line(ready))
        except BaseException as error:
            await self.end()
            if isinstance(error, _ChildDied):
                raise ServerFailed("the process that decodes pictures does not start") from error
            raise
        if not said["confined"]:
            log.warning("pictures are decoded with limits, but the file system is open: no Landlock here")
        return ready

    async def answer(self, order: bytes, source: Path, targets: Sequence[Path]) -> dict[str, Any]:
        """Hand over the order with its files and wait.

        Raises:
            _ChildDied: it ended without an answer, or took longer than a picture can take.
            StoreFailed: a file could not be opened.
        """
        channel = await self.start()
        try:
            with contextlib.ExitStack() as stack:
                # Not in a thread: descriptors opened there would be lost when the caller is cancelled.
                files = [stack.enter_context(source.open("rb", 0))]
                files += [stack.enter_context(target.open("wb", 0)) for target in targets]
                socket.send_fds(channel, [order], [file.fileno() for file in files])
            answer: dict[str, Any] = msgspec.json.decode(await self._line(channel))
            return answer
        except ConnectionError as error:
            await self.end()
            raise _ChildDied from error
        except OSError as error:
            raise refusal(error.filename, error) from error
        except BaseException:
            # Cancelled: what it would still say must not be taken for the next picture's answer.
            await self.end()
            raise

    async def end(self) -> None:
        process, self.process = self.process, None
        channel, self._socket = self._socket, None
        if channel:
            channel.close()
        if process:
            process.kill()
            await asyncio.to_thread(process.wait)

    async def _line(self, channel: socket.socket) -> bytes:
        loop, line = asyncio.get_running_loop(), b""
        try:
            async with asyncio.timeout(_SECONDS_PER_PICTURE):
                while not line.endswith(b"\n"):
                    part = await loop.sock_recv(channel, 4096)
                    if not part:
                        raise _ChildDied
                    line += part
        except (TimeoutError, ConnectionError) as error:
            raise _ChildDied from error
        return line
