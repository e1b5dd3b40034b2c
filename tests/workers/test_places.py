"""The three places after very many deliveries that ended in every way."""

from __future__ import annotations

import random
from uuid import uuid4

import msgspec
import pytest
from nats.aio.client import Client

from forge.broker import request
from forge.topology import DISPATCH, GENERATION
from forge.topology import order as order_subject
from forge.workers.loop import Delivery, Outcome

TIMES = 500


@pytest.mark.fault("B7")
async def test_no_place_is_lost_however_deliveries_end(nats_client: Client) -> None:
    dice = random.Random(7)
    pull = await nats_client.jetstream().pull_subscribe_bind(GENERATION, stream=DISPATCH)
    for _ in range(TIMES):
        await _fill(nats_client)
        [message] = await pull.fetch(1, timeout=30)
        match dice.choice(("done", "released", "done late", "deleted", "renewed")):
            case "done":
                await Delivery(nats_client, message).settle(Outcome.DONE)
            case "released":
                await Delivery(nats_client, message).settle(Outcome.RELEASE)
            case "done late":
                await Delivery(nats_client, message).settle(Outcome.RELEASE)
                await Delivery(nats_client, message).settle(Outcome.DONE)
            case "deleted":
                seq = message.metadata.sequence.stream
                await request(nats_client, f"STREAM.MSG.DELETE.{DISPATCH}", {"seq": seq})
            case "renewed":
                await nats_client.request(message.reply, b"+WPI", timeout=10)
                await Delivery(nats_client, message).settle(Outcome.DONE)
    await request(nats_client, f"STREAM.PURGE.{DISPATCH}", {})
    assert await _fill(nats_client) == 3
    assert len(await pull.fetch(3, timeout=30)) == 3, "all three are delivered at once"


async def _fill(nc: Client) -> int:
    """Give orders until one is refused; how many were taken."""
    given = 0
    while True:
        answer = await nc.request(order_subject(uuid4()), b"{}", timeout=10)
        if msgspec.json.decode(answer.data).get("error"):
            return given
        given += 1
