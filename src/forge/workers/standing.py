"""How the backends stand, told on core NATS by every generation worker: stale after some seconds."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec
import nats.errors
from nats.aio.client import Client

from forge.comfyui.backends import Backends, BackendStatus
from forge.topology import BACKENDS

TELL_SECONDS = 1.0


class Standing(msgspec.Struct, frozen=True):
    """What one worker knows of the backends, preferred first."""

    worker: str
    backends: list[BackendStatus]


async def tell(nc: Client, worker: str, backends: Backends) -> None:
    """Say it for ever, every second; what is published while NATS is away is lost, and said again."""
    while True:
        with suppress(nats.errors.Error):
            await nc.publish(BACKENDS, msgspec.json.encode(Standing(worker, backends.status())))
        await asyncio.sleep(TELL_SECONDS)
