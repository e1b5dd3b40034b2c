"""Waiting for one prompt: the socket says when to look, HTTP says what is true."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from forge.comfyui import protocol
from forge.comfyui.patience import Patience
from forge.comfyui.protocol import Output, Progress, Sighting
from forge.comfyui.server import Server
from forge.comfyui.socket import Ear, Socket
from forge.errors import BackendUnreachable, PromptInterrupted, PromptLost, PromptTimedOut


class Wait:
    """One wait for one prompt; `timeout` in seconds from when ComfyUI starts running it."""

    def __init__(
        self,
        server: Server,
        socket: Socket,
        patience: Patience,
        ear: Ear,
        *,
        timeout: float,
        on_progress: Callable[[Progress], None] | None,
        on_running: Callable[[], None] | None,
    ) -> None:
        self._server = server
        self._socket = socket
        self._patience = patience
        self._ear = ear
        self._on_progress = on_progress
        self._on_running = on_running
        self._timeout = timeout
        now = time.monotonic()
        self._deadline = now + timeout * patience.queue_factor
        self._answered = now
        self._running = False
        self._told: Progress | None = None
        self._absent = 0
        self._quick = patience.poll_first
        self._poll_at = now + self._interval() if ear.owner else now

    async def outcome(self) -> list[Output]:
        """The prompt's files, once it is over. Errors as in `Comfy.wait`."""
        while True:
            await self._rest()
            if self._ear.abandoned is not None:
                raise self._ear.abandoned
            self._tell()
            if self._due():
                entry = await self._check()
                if entry is not None:
                    self._started()
                    return protocol.conclude(entry)

    async def _rest(self) -> None:
        pause = min(self._poll_at, self._deadline) - time.monotonic()
        if pause > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._ear.woken.wait()
        self._ear.woken.clear()

    def _tell(self) -> None:
        if self._ear.started:
            self._started()
        progress = self._ear.progress
        if progress is not None and progress != self._told:
            self._told = progress
            if self._on_progress is not None:
                self._on_progress(progress)

    def _started(self) -> None:
        if not self._running:
            self._running = True
            self._deadline = time.monotonic() + self._timeout
            if self._on_running is not None:
                self._on_running()

    def _due(self) -> bool:
        due = min(self._poll_at, self._deadline) <= time.monotonic()
        return self._ear.over or self._ear.recheck or due

    async def _check(self) -> dict[str, Any] | None:
        """Ask by HTTP; the history entry when the prompt is over."""
        self._ear.recheck = False
        try:
            if self._ear.over and (entry := await self._written()) is not None:
                return entry
            self._ear.over = False  # it said so, yet there is no history: somebody may have deleted it
            sighting = await self._server.look(self._ear.prompt_id)
            entry = await self._written() if sighting.over else None
        except BackendUnreachable as error:
            self._unanswered(error)
            return None
        self._answered = time.monotonic()
        self._judge(sighting)
        self._poll_at = time.monotonic() + (self._patience.settle if self._absent else self._interval())
        return entry

    async def _written(self) -> dict[str, Any] | None:
        """The history entry, which may come a moment after the news of the end."""
        give_up = time.monotonic() + self._patience.history
        pause = 0.005
        while (entry := await self._server.entry(self._ear.prompt_id)) is None and time.monotonic() < give_up:
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.25)
        return entry

    def _judge(self, sighting: Sighting) -> None:
        if sighting is Sighting.ABSENT:
            self._absent += 1
            if self._absent > 1 or self._ear.restarted:
                raise PromptInterrupted if self._ear.cancelled else PromptLost
            return
        self._absent = 0
        if sighting is not Sighting.PENDING:
            if not (self._ear.started if sighting is Sighting.RUNNING else self._ear.over):
                self._socket.suspect(self._ear)
            self._started()
        if not sighting.over and time.monotonic() >= self._deadline:
            stage = "running" if self._running else "waiting behind others"
            raise PromptTimedOut(f"still {stage} after its time")

    def _unanswered(self, error: BackendUnreachable) -> None:
        silent = time.monotonic() - self._answered
        if silent > self._patience.unreachable:
            raise BackendUnreachable(f"no answer for {silent:.0f} s: {error.detail}") from error
        self._poll_at = time.monotonic() + random.uniform(0.5, 1.0) * min(
            self._patience.poll_deaf[1], silent + 0.1
        )
        self._deadline = max(self._deadline, self._poll_at)

    def _interval(self) -> float:
        if self._socket.hears(self._ear):
            return random.uniform(*self._patience.poll)
        self._quick = min(self._quick * 2, self._patience.poll_deaf[1])
        return min(self._quick, random.uniform(*self._patience.poll_deaf))
