"""Several ComfyUI servers, preferred first: which one a prompt goes to, and when to leave and return.

Healthy means that it answers and was not found wedged. Whether a prompt makes progress is judged by whoever
waits for it, who then puts the server in quarantine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from uuid import UUID

import msgspec

from forge.comfyui.client import Comfy
from forge.comfyui.patience import Patience
from forge.comfyui.protocol import Health
from forge.errors import BackendUnreachable, BackendWedged

log = logging.getLogger(__name__)

_PATIENCE = Patience()


class BackendStatus(msgspec.Struct, frozen=True):
    """One server as operators see it; `reason` says why it is or is not healthy, `since` when that began."""

    url: str
    healthy: bool
    preferred: bool
    reason: str
    since: datetime
    version: str | None = None
    queue_remaining: int | None = None


class Standing(msgspec.Struct, frozen=True):
    """What is known of one server: whether it is used, and how the latest probes went in a row."""

    healthy: bool = False
    reason: str = "not asked yet"
    failures: int = 0
    answers: int = 0


def after_probe(standing: Standing, health: Health, patience: Patience, *, first: bool = False) -> Standing:
    """The standing after one more probe: left after some failures in a row, used again after some answers."""
    if health.reachable:
        answers = standing.answers + 1
        healthy = standing.healthy or first or answers >= patience.answers_to_return
        return Standing(healthy, "" if healthy else "coming back", answers=answers)
    failures = standing.failures + 1
    healthy = standing.healthy and failures < patience.failures_to_leave
    return Standing(healthy, "" if healthy else f"unreachable ({health.detail})", failures=failures)


class Quarantine(msgspec.Struct, frozen=True):
    """A server found wedged: why, until when (monotonic seconds), and what it claimed to be executing."""

    reason: str
    until: float
    running: tuple[str, ...] | None = None


def after_evidence(
    quarantine: Quarantine, *, queue_remaining: int, running: tuple[str, ...], now: float
) -> Quarantine | None:
    """The quarantine after one more look; None when it is over.

    An empty queue means restarted or drained; executing another prompt than before means that it executes.
    """
    moved = quarantine.running is not None and running and running != quarantine.running
    if queue_remaining == 0 or moved or now > quarantine.until:
        return None
    return msgspec.structs.replace(quarantine, running=quarantine.running or running)


class Backend:
    """One server with its client and all that is known of it."""

    def __init__(self, url: str, patience: Patience) -> None:
        self.comfy = Comfy(url, patience)
        self.standing = Standing()
        self.quarantine: Quarantine | None = None
        self.disowned: set[UUID] = set()
        self.unforgotten: set[UUID] = set()
        """Prompts whose entries in its history go as soon as it is usable."""
        self.health = Health(False)
        self.since = datetime.now(UTC)
        """When it became usable, or stopped being so."""
        self._patience = patience

    @property
    def usable(self) -> bool:
        """Whether prompts may be sent to it."""
        return self.standing.healthy and self.quarantine is None and not self.disowned

    @property
    def reason(self) -> str:
        """Why it is not usable; empty when it is."""
        if self.disowned and self.standing.healthy:
            return f"it may still have {len(self.disowned)} abandoned prompts"
        return self.quarantine.reason if self.quarantine is not None else self.standing.reason

    async def probe(self, *, first: bool = False) -> None:
        """Ask how it is, and while it is in quarantine, whether it executes anything."""
        usable = self.usable
        self.health = await self.comfy.health()
        self.standing = after_probe(self.standing, self.health, self._patience, first=first)
        if self.quarantine is not None and self.health.reachable:
            await self._look_for_evidence(self.quarantine)
        if self.disowned and self.health.reachable:
            await self._get_rid()
        self._note(usable, first=first)
        if self.usable and self.unforgotten:
            await asyncio.gather(
                *(self.comfy.forget(self.unforgotten.pop()) for _ in tuple(self.unforgotten))
            )

    def disown(self, prompt_id: UUID) -> None:
        """Use it for nothing else until it is known to be rid of this prompt."""
        usable = self.usable
        self.disowned.add(prompt_id)
        self._note(usable)

    def refuse(self, reason: str) -> None:
        """Take it for unreachable at once: it did not take a connection."""
        usable = self.usable
        self.standing = Standing(
            reason=f"unreachable ({reason})", failures=max(1, self._patience.failures_to_leave)
        )
        self._note(usable)

    def isolate(self, reason: str) -> None:
        """Put it in quarantine and end every wait for its prompts."""
        usable = self.usable
        self.quarantine = Quarantine(reason, until=time.monotonic() + self._patience.quarantine)
        self._note(usable)
        self.comfy.abandon(reason)

    async def _get_rid(self) -> None:
        for prompt_id in tuple(self.disowned):
            try:
                await self.comfy.cancel(prompt_id)
            except BackendUnreachable:
                return
            except BackendWedged as wedged:
                self.isolate(wedged.detail)
            self.disowned.discard(prompt_id)
            self.unforgotten.add(prompt_id)

    async def _look_for_evidence(self, quarantine: Quarantine) -> None:
        try:
            running = tuple(await self.comfy.running())
        except BackendUnreachable:
            return
        if self.quarantine is quarantine:  # else it was found wedged once more meanwhile
            self.quarantine = after_evidence(
                quarantine,
                queue_remaining=self.health.queue_remaining or 0,
                running=running,
                now=time.monotonic(),
            )

    def _note(self, was_usable: bool, *, first: bool = False) -> None:
        if self.usable is not was_usable or first:
            self.since = datetime.now(UTC)
            level = logging.INFO if self.usable else logging.WARNING
            log.log(level, "ComfyUI %s: %s", self.comfy.url, self.reason or "usable")


class Backends:
    """All servers, preferred first; use inside `async with`, which probes each once and then watches them."""

    def __init__(self, urls: Sequence[str], patience: Patience = _PATIENCE) -> None:
        if not urls:
            raise ValueError("at least one ComfyUI server is needed")
        self._patience = patience
        self._backends = [Backend(url, patience) for url in urls]
        self._watches: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()
        self._change = asyncio.Event()

    async def __aenter__(self) -> Backends:
        async with AsyncExitStack() as stack:
            for backend in self._backends:
                await stack.enter_async_context(backend.comfy)
            await asyncio.gather(*(backend.probe(first=True) for backend in self._backends))
            self._watches = [asyncio.create_task(self._watch(backend)) for backend in self._backends]
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        for watch in self._watches:
            watch.cancel()
        async with self._stack:
            ends = await asyncio.gather(*self._watches, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    def choose(self) -> tuple[Comfy, str] | None:
        """The first usable server and why it is this one, or None."""
        preferred = self._backends[0]
        for backend in self._backends:
            if backend.usable:
                return backend.comfy, "preferred" if backend is preferred else _fallback(preferred)
        return None

    async def available(self) -> tuple[Comfy, str]:
        """As `choose`, waiting until there is one; unbounded, cancel it at will."""
        while (chosen := self.choose()) is None:
            await self._change.wait()
        return chosen

    def named(self, url: str) -> Comfy | None:
        """The server with this address, whatever its health: where an attempt was submitted."""
        backend = self._find(url)
        return backend.comfy if backend is not None else None

    def quarantine(self, url: str, reason: str, prompt_id: UUID | None = None) -> None:
        """Leave a server that answers but does not execute, until it proves that it does or was restarted.

        Every open wait for a prompt of that server ends with `BackendWedged`. The entry of `prompt_id`, which
        proved it, is dropped from history when the server is used again.
        """
        backend = self._find(url)
        if backend is not None:
            backend.isolate(reason)
            if prompt_id is not None:
                backend.unforgotten.add(prompt_id)

    def refused(self, url: str, reason: str) -> None:
        """Leave a server that does not even take a connection, until it answers again."""
        backend = self._find(url)
        if backend is not None:
            backend.refuse(reason)

    def disown(self, url: str, prompt_id: UUID) -> None:
        """Give up a prompt that cannot be cancelled now; the server is not used until it is rid of it."""
        backend = self._find(url)
        if backend is not None:
            backend.disown(prompt_id)

    def answering(self) -> list[Comfy]:
        """The servers that answer and are not in quarantine: those that can be asked what they hold."""
        return [b.comfy for b in self._backends if b.health.reachable and b.quarantine is None]

    def status(self) -> list[BackendStatus]:
        """Every server, preferred first."""
        return [
            BackendStatus(
                url=backend.comfy.url,
                healthy=backend.usable,
                preferred=backend is self._backends[0],
                reason=backend.reason,
                since=backend.since,
                version=backend.health.version,
                queue_remaining=backend.health.queue_remaining,
            )
            for backend in self._backends
        ]

    def _find(self, url: str) -> Backend | None:
        return next((backend for backend in self._backends if backend.comfy.url == url.rstrip("/")), None)

    async def _watch(self, backend: Backend) -> None:
        while True:
            steady = backend.usable and backend.standing.failures == 0
            await asyncio.sleep(self._patience.health_interval if steady else self._patience.health_retry)
            await backend.probe()
            # Whether it was usable before the probe says nothing of those who wait: it may have been left and
            # be back while the probe was under way.
            if backend.usable:
                change, self._change = self._change, asyncio.Event()
                change.set()


def _fallback(preferred: Backend) -> str:
    seconds = (datetime.now(UTC) - preferred.since).total_seconds()
    return f"fallback: {preferred.comfy.url} {preferred.reason}, since {seconds:.0f} s"
