"""Prompts that nobody waits for any more: found at ComfyUI, held against the log, and taken out.

Usually whoever ends an attempt takes its prompt out. That can fail: a worker that is frozen exactly while it
posts wakes up when the attempt has long been given up, and a worker that gave up a server it could not reach
may be gone when that server returns. So every generation worker asks each ComfyUI now and then what it holds.
A prompt of forge's says which attempt it is for. It stays if the log says that the attempt is under way on
that very server, or if its order is still out, since the order's holder sees to it. Otherwise the server is
given nothing until it is rid of the prompt. Prompts of others, and of another forge, are not touched.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from uuid import UUID

import msgspec
from nats.aio.client import Client

from forge.broker import BrokerRefused, request
from forge.comfyui.backends import Backends
from forge.comfyui.client import Comfy
from forge.comfyui.protocol import Sighting
from forge.domain.ids import prompt_id
from forge.domain.jobs import held_at
from forge.errors import ForgeError
from forge.eventstore import EventStore
from forge.topology import DISPATCH, job_of_anybody
from forge.topology import order as order_subject
from forge.workers.orders import decode

log = logging.getLogger("forge.abandoned")

LOOK_SECONDS = 5.0

_NO_MESSAGE = 10037


class _Stored(msgspec.Struct):
    class Message(msgspec.Struct):
        data: str = ""

    message: Message


async def watch(nc: Client, store: EventStore, backends: Backends) -> None:
    """Look for ever, every few seconds; a server that does not answer is asked again the next time."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        for comfy in backends.answering():
            try:
                for prompt in await abandoned(nc, store, comfy):
                    log.warning("an abandoned prompt", extra={"prompt": str(prompt), "backend": comfy.url})
                    backends.disown(comfy.url, prompt)
            except ForgeError as error:
                log.info("not looked for abandoned prompts", extra={"reason": error.detail})


async def abandoned(nc: Client, store: EventStore, comfy: Comfy) -> list[UUID]:
    """The prompts that this server runs or queues for an attempt of this forge that nobody has in hand.

    Raises:
        BackendUnreachable, LogUnavailable: no answer.
    """
    found = []
    for name, label in (await comfy.labelled()).items():
        attempt = _attempt(name, label)
        if attempt is None or await _wanted(nc, store, comfy.url, *attempt):
            continue
        prompt = prompt_id(*attempt)
        # it may have ended as it should between the two looks
        if await comfy.look(prompt) in (Sighting.PENDING, Sighting.RUNNING):
            found.append(prompt)
    return found


def _attempt(name: str, label: str) -> tuple[UUID, int] | None:
    """The job and attempt that a label names, if the prompt is really theirs."""
    job, _, attempt = label.partition("/")
    try:
        found = UUID(job), int(attempt)
    except ValueError:
        return None
    return found if str(prompt_id(*found)) == name else None


async def _wanted(nc: Client, store: EventStore, url: str, job_id: UUID, attempt: int) -> bool:
    facts = (await store.load(job_of_anybody(job_id))).events
    if not facts:
        return True  # to another forge
    where = held_at((record.event for record in facts), attempt)
    return where == url or (where is None and await _ordered(nc, job_id) == attempt)


async def _ordered(nc: Client, job_id: UUID) -> int | None:
    """The attempt of a job whose order is out, if one is."""
    try:
        answer = await request(nc, f"STREAM.MSG.GET.{DISPATCH}", {"last_by_subj": order_subject(job_id)})
    except BrokerRefused as refused:
        if refused.err_code == _NO_MESSAGE:
            return None
        raise
    stored = msgspec.json.decode(answer, type=_Stored)
    return decode(base64.b64decode(stored.message.data)).attempt
