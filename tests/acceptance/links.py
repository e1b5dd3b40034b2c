"""The connections between forge and what it needs, through a proxy that a test can spoil."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Address:
    """A port on this machine, or a socket in the file system."""

    port: int = 0
    path: Path | None = None


class Link:
    """Forwards whatever comes to wherever the server is then.

    `delay` is in seconds each way. While it is a `hole`, nothing passes and nothing is refused; what was sent
    arrives when it heals, as with a cable that was pulled. `corrupt` so many more answers, of those that are
    `long` enough, get one wrong byte, at `spot` of their length.
    """

    def __init__(self, server: Callable[[], Address]) -> None:
        self._server = server
        self.delay = 0.0
        self.corrupt, self.long, self.spot = 0, 1000, 0.5
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._forwarding: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Server | None = None
        self.port = 0

    async def listen(self, path: Path | None = None) -> None:
        if path is not None:
            self._listening = await asyncio.start_unix_server(self._accepted, path)
            os.chmod(path, 0o777)
        else:
            self._listening = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
            self.port = self._listening.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self.heal()
        self.reset()
        if self._listening is not None:
            self._listening.close()
        for task in self._forwarding:  # one that came just now has no connection yet that would break
            task.cancel()
        if self._forwarding:
            await asyncio.wait(self._forwarding)

    # ------------------------------------------------------------------ faults

    def hole(self) -> None:
        self._open.clear()

    def heal(self) -> None:
        self.delay, self.corrupt = 0.0, 0
        self._open.set()

    def reset(self) -> None:
        """Every connection breaks."""
        for writer in list(self._writers):
            writer.transport.abort()

    # -------------------------------------------------------------- forwarding

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._forward(reader, writer))
        self._forwarding.add(task)
        task.add_done_callback(self._forwarding.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):  # a server that ends cancels its handlers
            await self._open.wait()
            there, where = None, self._server()
            if where.path is not None:
                far, there = await asyncio.open_unix_connection(where.path)
            else:
                far, there = await asyncio.open_connection("127.0.0.1", where.port)
            self._writers |= {writer, there}
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pump(reader, there, spoilt=False))
                    both.create_task(self._pump(far, writer, spoilt=True))
            except* OSError:
                pass
            finally:
                there.transport.abort()
                self._writers -= {writer, there}
        writer.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, spoilt: bool
    ) -> None:
        while data := await source.read(1 << 16):
            await self._open.wait()
            if self.delay:
                await asyncio.sleep(self.delay)  # the fault itself
            if spoilt and self.corrupt and len(data) > self.long:
                self.corrupt -= 1
                at = int(len(data) * self.spot)
                data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
            target.write(data)
            await target.drain()
        raise ConnectionResetError("one side is done")
