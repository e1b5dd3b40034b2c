"""ComfyUI's socket: a hint that something happened, never the truth.

One connection for all prompts of a client, drained by a task that does nothing else: a reader that stalls
would hold up the messages of every client of that ComfyUI.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from uuid import uuid4

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from forge.comfyui.patience import Patience
from forge.comfyui.protocol import Progress, read_message
from forge.errors import ComfyError

log = logging.getLogger(__name__)

# progress_state grows with the graph, previews with their size; the package's default is 1 MiB.
MAX_MESSAGE = 64 << 20


class Ear:
    """What was heard about one prompt that somebody waits for or will; `woken` is set at every change."""

    def __init__(self, prompt_id: str) -> None:
        self.prompt_id = prompt_id
        self.owner = ""
        """The client id it was submitted under; empty when somebody else did."""
        self.woken = asyncio.Event()
        self.waited = False
        self.started = False
        self.over = False
        self.progress: Progress | None = None
        self.recheck = False
        """Something changed that only HTTP can tell about."""
        self.cancelled = False
        self.restarted = False
        """ComfyUI was started anew since, so it knows the prompt no longer."""
        self.abandoned: ComfyError | None = None
        """Why nobody should wait any longer."""

    def look_again(self) -> None:
        """Have the waiter ask by HTTP at once."""
        self.recheck = True
        self.woken.set()

    def abandon(self, error: ComfyError) -> None:
        """Have the waiter give up with this error."""
        self.abandoned = error
        self.woken.set()


class Socket:
    """The connection, re-made for ever with a fresh client id; `ears` is shared with the client."""

    def __init__(self, url: str, patience: Patience, ears: dict[str, Ear]) -> None:
        self._url = url.replace("http", "ws", 1) + "/ws?clientId="
        self._patience = patience
        self._ears = ears
        self._connection: ClientConnection | None = None
        self._tried = asyncio.Event()
        self._heard_at = 0.0
        self.connected = False
        self.trusted = True
        """False after it was found deaf, until it tells about a prompt again."""
        # Reusing an id while the server still holds the old connection leaves the new one deaf.
        self.client_id = uuid4().hex

    async def run(self) -> None:
        """Connect, drain, connect again; ends only by cancellation."""
        shortest, longest = self._patience.reconnect
        delay = shortest
        while True:
            try:
                await self._listen()
            except (OSError, WebSocketException) as error:  # a time-out is an OSError
                log.debug("socket of %s: %s", self._url, error)
            delay = shortest if self.connected else min(delay * 2, longest)
            self._down()
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))

    async def first_try(self) -> None:
        """Wait, bounded, until the first connection stands or failed: earlier prompts are not told about."""
        if not self._tried.is_set():
            try:
                async with asyncio.timeout(self._patience.first_socket):
                    await self._tried.wait()
            except TimeoutError:
                pass

    def hears(self, ear: Ear) -> bool:
        """Whether this connection can be expected to tell about the prompt."""
        return self.connected and self.trusted and ear.owner == self.client_id

    def suspect(self, ear: Ear) -> None:
        """HTTP saw the prompt move and the socket has not told: if it stays silent, replace it."""
        if self.hears(ear) and time.monotonic() - self._heard_at > self._patience.silence:
            loop = asyncio.get_running_loop()
            loop.call_later(self._patience.settle, self._replace, self._connection, self._heard_at)

    def _replace(self, connection: ClientConnection | None, heard_at: float) -> None:
        if connection is not None and connection is self._connection and heard_at == self._heard_at:
            log.warning("socket of %s is deaf, connecting again", self._url)
            self.trusted = False
            connection.transport.abort()

    async def _listen(self) -> None:
        self.client_id = uuid4().hex
        patience = self._patience
        async with connect(
            self._url + self.client_id,
            open_timeout=patience.connect,
            close_timeout=min(patience.connect, 1.0),
            ping_interval=patience.ping[0],
            ping_timeout=patience.ping[1],
            max_size=MAX_MESSAGE,
            compression=None,
            proxy=None,
        ) as connection:
            self._connection = connection
            async for message in connection:
                self._hear(message)

    def _hear(self, message: str | bytes) -> None:
        self._heard_at = time.monotonic()
        if not self.connected:  # the first message proves that the server has registered us
            self._up()
        heard = read_message(message) if isinstance(message, str) else None  # binary frames are previews
        if heard is None:
            return
        self.trusted = True
        ear = self._ears.get(heard.prompt_id)
        if ear is not None:
            ear.started = True
            ear.over = ear.over or heard.over
            ear.progress = heard.progress or ear.progress
            ear.woken.set()

    def _up(self) -> None:
        self.connected = True
        self._tried.set()
        self._look_again()

    def _down(self) -> None:
        self._tried.set()
        if self.connected:
            self.connected = False
            self._look_again()
        self._connection = None

    def _look_again(self) -> None:
        for ear in self._ears.values():
            ear.look_again()
