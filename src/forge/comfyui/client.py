"""One ComfyUI server: submit exactly once as far as possible, wait, cancel, fetch.

HTTP is the truth, the socket only a hint. ComfyUI keeps everything in memory and de-duplicates nothing, so
this client looks before it repeats anything, and what ComfyUI no longer knows is lost, not done.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, BinaryIO
from uuid import UUID

from forge.comfyui import protocol
from forge.comfyui.http import CHUNK, Answer, Http, timed_out
from forge.comfyui.patience import Patience
from forge.comfyui.protocol import Health, Output, Progress, Sighting
from forge.comfyui.server import Server
from forge.comfyui.socket import Ear, Socket
from forge.comfyui.waiting import Wait
from forge.errors import (
    BackendUnreachable,
    BackendWedged,
    ComfyError,
    NeverSent,
    PictureRefused,
    PromptLost,
)
from forge.telemetry import CLIENT, part

_PATIENCE = Patience()


class Comfy:
    """The client of one ComfyUI server; use inside `async with`, which ends everything it started."""

    def __init__(self, url: str, patience: Patience = _PATIENCE) -> None:
        self.url = url.rstrip("/")
        self._patience = patience
        self._ears: dict[str, Ear] = {}
        self._http = Http(self.url, patience)
        self._server = Server(self._http)
        self._socket = Socket(self.url, patience, self._ears)
        self._listening: asyncio.Task[None] | None = None
        self._highest = -1.0
        self._lives = 0

    async def __aenter__(self) -> Comfy:
        await self._http.__aenter__()
        self._listening = asyncio.create_task(self._socket.run(), name=f"socket of {self.url}")
        return self

    async def __aexit__(self, *_: object) -> None:
        for ear in self._ears.values():
            ear.abandon(BackendUnreachable(f"{self.url}: the client was closed"))
        try:
            if self._listening is not None:
                self._listening.cancel()
                with suppress(asyncio.CancelledError):
                    await self._listening
        finally:
            await self._http.__aexit__()

    @part("forge.comfyui.submit", kind=CLIENT)
    async def submit(
        self,
        prompt_id: UUID,
        graph: dict[str, Any],
        *,
        outputs: Sequence[str],
        label: str = "",
        permitted: Callable[[], None] | None = None,
    ) -> None:
        """Queue the part of `graph` that the nodes `outputs` need, looking before anything is sent twice.

        `label` stays with the prompt while it is queued or runs, see `labelled`. `permitted` is called as the
        last thing before anything is sent, and may raise. Once begun, sending is finished even if this is
        cancelled: a request that was cut off might still be taken up, behind the back of whoever cancels it.

        Raises:
            PromptRejected: it will never run, and ComfyUI does not have it.
            NeverSent: no connection could be made, so ComfyUI does not have it.
            PromptLost: ComfyUI failed at it twice and does not have it.
            BackendUnreachable: no answer; whether ComfyUI has it is unknown.
            BackendWedged: it was accepted in part and cannot be cancelled.
        """
        protocol.check_graph(graph)
        needed = protocol.prune(graph, outputs)
        # Listening begins before the POST: messages can arrive before its answer.
        ear = self._ears[str(prompt_id)] = Ear(str(prompt_id))
        try:
            body = await self._body(ear, needed, outputs, label)
            doubt = await self._post(ear, body, permitted)
            if doubt is not None:
                await self._dispel(doubt, ear, body, permitted)
        except BaseException:
            self._ears.pop(ear.prompt_id, None)
            raise

    async def look(self, prompt_id: UUID) -> Sighting:
        """Where ComfyUI has the prompt now.

        Raises:
            BackendUnreachable: no answer, which says nothing about the prompt.
        """
        return await self._server.look(str(prompt_id))

    @part("forge.comfyui.wait", kind=CLIENT)
    async def wait(
        self,
        prompt_id: UUID,
        *,
        timeout: float,
        on_progress: Callable[[Progress], None] | None = None,
        on_running: Callable[[], None] | None = None,
    ) -> list[Output]:
        """Wait until the prompt is over and return the files of its wanted outputs; adopts anybody's prompt.

        `timeout` is in seconds from when ComfyUI starts running it; waiting behind others may take
        `Patience.queue_factor` times as long. The callbacks run in this task: `on_running` once,
        `on_progress` with the newest progress.

        Raises:
            PromptFailed: a node raised.
            PromptInterrupted: somebody stopped it, or it was cancelled while waiting.
            PromptLost: ComfyUI does not know it any more, or reports success without fresh files.
            PromptTimedOut: it is still there; cancel it.
            PictureRefused: it names files that forge does not ask for.
            BackendUnreachable: nothing answered for `Patience.unreachable` seconds.
            BackendWedged: the server was given up, see `abandon`.
        """
        ear = self._ears.setdefault(str(prompt_id), Ear(str(prompt_id)))
        ear.waited = True
        try:
            return await Wait(
                self._server,
                self._socket,
                self._patience,
                ear,
                timeout=timeout,
                on_progress=on_progress,
                on_running=on_running,
            ).outcome()
        finally:
            self._ears.pop(ear.prompt_id, None)

    async def cancel(self, prompt_id: UUID) -> None:
        """Stop the prompt and only it, until ComfyUI neither runs nor queues it; it may yet have succeeded.

        Raises:
            BackendWedged: it is still there after `Patience.cancel` seconds.
            BackendUnreachable: nothing answered for `Patience.unreachable` seconds.
        """
        ear = self._ears.get(str(prompt_id))
        if ear is not None:
            ear.cancelled = True
        await self._until_gone(str(prompt_id))
        if ear is not None:
            ear.look_again()
            self._drop(ear)

    async def fetch(self, output: Output, *, max_bytes: int) -> AsyncGenerator[bytes, None]:
        """The file's bytes, in chunks; all of them arrived when the iteration ends without an error.

        Raises:
            PromptLost: the file is gone.
            PictureRefused: it is larger than `max_bytes`, or ComfyUI refuses its name.
            BackendUnreachable: no answer, or it broke off.
        """
        named = {"filename": output.filename, "subfolder": output.subfolder, "type": output.type}
        async with self._http.opened("/view", named) as response:
            if response.status == 404:
                raise PromptLost(f"{output.filename} is gone")
            if 400 <= response.status < 500:
                raise PictureRefused(f"ComfyUI answered {response.status} for {output.filename}")
            if response.status != 200:
                raise BackendUnreachable(f"ComfyUI answered {response.status} for {output.filename}")
            announced, received = response.content_length, 0
            if announced is not None and announced > max_bytes:
                raise PictureRefused(f"{output.filename} has {announced} bytes, more than {max_bytes}")
            async for chunk in response.content.iter_chunked(CHUNK):
                received += len(chunk)
                if received > max_bytes:
                    raise PictureRefused(f"{output.filename} has more than {max_bytes} bytes")
                yield chunk
            if announced is not None and received != announced:
                raise BackendUnreachable(f"{output.filename}: {received} of {announced} bytes arrived")

    async def forget(self, prompt_id: UUID) -> None:
        """Drop the prompt from ComfyUI's history, best effort; its files stay."""
        ear = self._ears.get(str(prompt_id))
        if ear is not None:
            self._drop(ear)
        with suppress(BackendUnreachable):
            await self._server.forget(str(prompt_id))

    async def upload(self, name: str, data: bytes | BinaryIO, *, folder: str = "forge") -> str:
        """Store an input picture and return the name under which a LoadImage node finds it.

        An open file is sent without being read as a whole, and closed.

        Raises:
            PictureRefused: ComfyUI refuses it.
            BackendUnreachable: no answer; repeating is harmless.
        """
        return await self._server.upload(name, data, folder)

    async def health(self) -> Health:
        """One short probe; never raises."""
        return await self._server.health(self._patience.health_timeout)

    async def running(self) -> list[str]:
        """The ids of the prompts that ComfyUI says it is executing, anybody's.

        Raises:
            BackendUnreachable: no answer.
        """
        return await self._server.running()

    async def labelled(self) -> dict[str, str]:
        """Prompt id → label, of all that ComfyUI runs or queues and that were submitted with one by anybody.

        Raises:
            BackendUnreachable: no answer.
        """
        return await self._server.labelled()

    def abandon(self, reason: str) -> None:
        """End every open wait with `BackendWedged`: this server will not execute them."""
        for ear in self._ears.values():
            ear.abandon(BackendWedged(reason))

    async def _body(self, ear: Ear, graph: dict[str, Any], outputs: Sequence[str], label: str) -> bytes:
        await self._socket.first_try()
        ear.owner = self._socket.client_id
        return protocol.submission(ear.prompt_id, graph, outputs, ear.owner, label)

    async def _dispel(
        self, doubt: ComfyError, ear: Ear, body: bytes, permitted: Callable[[], None] | None
    ) -> None:
        """Make sure that a prompt whose POST was not answered properly is there, posting again where safe."""
        try:
            if await self._turned_up(ear.prompt_id):
                return
            if timed_out(doubt):
                raise doubt  # the first request may still be taken up: only another attempt id is safe
            second = await self._post(ear, body, permitted)
            if second is not None and not await self._turned_up(ear.prompt_id):
                raise second
        except NeverSent as error:  # not now, but the first time something was
            raise BackendUnreachable(error.detail) from error

    async def _post(self, ear: Ear, body: bytes, permitted: Callable[[], None] | None) -> ComfyError | None:
        """Post once. None when it is queued; the doubt, when only looking can tell whether it is."""
        known = self._highest, self._lives
        if permitted is not None:
            permitted()
        try:
            answer = await self._unbroken(self._http.ask("POST", "/prompt", data=body, fresh=True))
        except NeverSent:
            raise
        except BackendUnreachable as error:
            return error
        if answer.status in (400, 413):
            raise protocol.rejection(answer.status, answer.body)
        if answer.status == 500:
            return PromptLost("ComfyUI answered 500 twice and does not have the prompt")
        told = protocol.submitted(answer.body) if answer.status == 200 else None
        if told is None:
            return BackendUnreachable(f"{self.url} answered {answer.status} to a prompt")
        self._note_number(told.number, known, ear)
        if told.node_errors:
            await self._until_gone(ear.prompt_id)
            raise protocol.refused_outputs(told.node_errors)
        return None

    async def _unbroken(self, exchange: Coroutine[Any, Any, Answer]) -> Answer:
        """The answer; when cancelled, not before the exchange has ended too, or hung for long enough."""
        asking = asyncio.create_task(exchange)
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            await asyncio.wait({asking}, timeout=self._patience.lost_answer)
            raise
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _turned_up(self, prompt_id: str) -> bool:
        """Whether ComfyUI has a prompt whose POST was not answered properly; no, when it is absent twice."""
        give_up = time.monotonic() + self._patience.lost_answer
        absent = 0
        while absent < 2:
            try:
                if await self._server.look(prompt_id) is not Sighting.ABSENT:
                    return True
                absent += 1
            except BackendUnreachable as error:
                if isinstance(error, NeverSent) or time.monotonic() > give_up:
                    raise
            await asyncio.sleep(self._patience.settle)
        return False

    def _note_number(self, number: float, known: tuple[float, int], ear: Ear) -> None:
        """ComfyUI counts POSTs from 0: a number not above those known before this POST proves a restart."""
        highest, lives = known
        if number <= highest and lives == self._lives:
            self._lives += 1
            self._highest = number
            self._server.restarted()
            for other in self._ears.values():
                if other is not ear:
                    other.restarted = True
                    other.look_again()
        elif lives == self._lives:
            self._highest = max(self._highest, number)

    async def _until_gone(self, prompt_id: str) -> None:
        answered = began = time.monotonic()
        pause = 0.01
        while True:
            try:
                await self._server.stop(prompt_id)
                sighting = await self._server.look(prompt_id)
            except BackendUnreachable:
                if time.monotonic() - answered > self._patience.unreachable:
                    raise
            else:
                answered = time.monotonic()
                if sighting.over or sighting is Sighting.ABSENT:
                    return
                if answered - began > self._patience.cancel:
                    raise BackendWedged(
                        f"{prompt_id} is still {sighting.value} {answered - began:.0f} s after its cancel"
                    )
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.5)

    def _drop(self, ear: Ear) -> None:
        if not ear.waited:  # else its waiter does
            self._ears.pop(ear.prompt_id, None)
