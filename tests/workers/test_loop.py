"""The worker loop on a real server: done, released, lost, stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
from nats.aio.client import Client

from factories import job_id
from forge.broker import request
from forge.embedded import EmbeddedNats
from forge.errors import LogUnavailable
from forge.topology import DISPATCH, GENERATION, order
from forge.workers import loop
from forge.workers.loop import Delivery, Outcome, consume
from processes import freeze, thaw
from waiting import wait_until

ACK_WAIT = 2.5
Handler = Callable[[Delivery], Awaitable[Outcome]]


@pytest.fixture(autouse=True)
async def hurried(nats_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stops stops soon. A lease lasts longer than any test, so that what comes again was given back."""
    monkeypatch.setattr(loop, "PULL_SECONDS", 0.3)
    await _lease(nats_client, 300.0)


@pytest.fixture
async def short_leases(nats_client: Client, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter as long, and renewed more often in proportion, since a machine may stall."""
    monkeypatch.setattr(loop, "HEARTBEAT_SECONDS", ACK_WAIT / 10)
    monkeypatch.setattr(loop, "LEASE_SECONDS", ACK_WAIT * 0.8)
    await _lease(nats_client, ACK_WAIT)


async def _lease(nc: Client, seconds: float) -> None:
    path = f"{DISPATCH}.{GENERATION}"
    config = msgspec.json.decode(await request(nc, f"CONSUMER.INFO.{path}"))["config"]
    config["ack_wait"] = int(seconds * 1e9)
    await request(nc, f"CONSUMER.CREATE.{path}", {"stream_name": DISPATCH, "config": config})


@asynccontextmanager
async def working(nc: Client, handler: Handler) -> AsyncIterator[asyncio.Event]:
    """A loop in the background, ended by its stop when the block is left."""
    stop = asyncio.Event()
    task = asyncio.create_task(consume(nc, DISPATCH, GENERATION, handler, stop))
    try:
        yield stop
        stop.set()
        await asyncio.wait_for(task, 30)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def give(nc: Client, count: int = 1, first: int = 1) -> None:
    for nth in range(first, first + count):
        await nc.request(order(job_id(nth)), f"{nth}".encode(), timeout=10)


async def left(nc: Client) -> int:
    info = msgspec.json.decode(await request(nc, f"STREAM.INFO.{DISPATCH}"))
    return int(info["state"]["messages"])


class Hands:
    """A handler that notes what it gets and does what it is told."""

    def __init__(self, *outcomes: Outcome | Exception) -> None:
        self.outcomes, self.seen, self.cancelled = list(outcomes), list[bytes](), 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, delivery: Delivery) -> Outcome:
        self.seen.append(delivery.data)
        outcome = self.outcomes.pop(0) if self.outcomes else Outcome.DONE
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def test_what_is_done_is_gone(nats_client: Client) -> None:
    hands = Hands()
    await give(nats_client, 3)
    async with working(nats_client, hands):
        await wait_until(lambda: _empty(nats_client))
    assert hands.seen == [b"1", b"2", b"3"]


async def _empty(nc: Client) -> bool:
    return await left(nc) == 0


async def test_what_is_released_comes_again_at_once(nats_client: Client) -> None:
    hands = Hands(Outcome.RELEASE, Outcome.RELEASE, Outcome.DONE)
    await give(nats_client)
    async with working(nats_client, hands):
        await wait_until(lambda: _empty(nats_client), what="each time long before the lease ends")
    assert hands.seen == [b"1"] * 3


@pytest.mark.parametrize("error", [LogUnavailable(), ZeroDivisionError("a bug")], ids=repr)
async def test_a_handler_that_breaks_gives_back_what_it_had(nats_client: Client, error: Exception) -> None:
    hands = Hands(error)
    await give(nats_client)
    async with working(nats_client, hands):
        await wait_until(lambda: _empty(nats_client))
    assert hands.seen == [b"1"] * 2


@pytest.mark.usefixtures("short_leases")
async def test_slow_work_is_not_given_to_another(nats_client: Client) -> None:
    hands, others = Hands(), Hands()
    hands.go_on.clear()
    await give(nats_client)
    async with working(nats_client, hands):
        await wait_until(lambda: hands.seen)
        async with working(nats_client, others):
            await asyncio.wait_for(_renewals(nats_client, ACK_WAIT * 1.3), 60)
            hands.go_on.set()
            await wait_until(lambda: _empty(nats_client))
    assert (hands.seen, others.seen) == ([b"1"], [])


async def _renewals(nc: Client, seconds: float) -> None:
    """As many renewals of the lease as fit into this time: they are what keeps it."""
    count, enough = 0, asyncio.Event()

    async def heard(_: object) -> None:
        nonlocal count
        count += 1
        if count >= seconds / loop.HEARTBEAT_SECONDS:
            enough.set()

    subscription = await nc.subscribe(f"$JS.ACK.{DISPATCH}.{GENERATION}.>", cb=heard)
    await enough.wait()
    await subscription.unsubscribe()


@pytest.mark.fault("H2")
@pytest.mark.usefixtures("short_leases")
async def test_a_lost_lease_stops_the_work_and_another_begins_it(
    nats_client: Client, nats_server: EmbeddedNats
) -> None:
    hands = Hands()
    hands.go_on.clear()
    await give(nats_client)
    async with working(nats_client, hands):
        await wait_until(lambda: hands.seen)
        assert nats_server.process is not None
        await freeze(nats_server.process.pid)
        try:
            await wait_until(lambda: hands.cancelled, what="the work was stopped")
        finally:
            thaw(nats_server.process.pid)
        hands.go_on.set()
        await wait_until(lambda: _empty(nats_client))
    assert (hands.seen, hands.cancelled) == ([b"1"] * 2, 1)


async def test_stopping_finishes_what_is_in_hand_and_takes_nothing_new(nats_client: Client) -> None:
    hands = Hands()
    hands.go_on.clear()
    await give(nats_client, 2)
    async with working(nats_client, hands) as stop:
        await wait_until(lambda: hands.seen)
        stop.set()
        hands.go_on.set()
    assert (hands.seen, hands.cancelled, await left(nats_client)) == ([b"1"], 0, 1)


async def test_an_idle_loop_stops_soon(nats_client: Client) -> None:
    async with asyncio.timeout(30), working(nats_client, Hands()):
        await wait_until(lambda: _pulling(nats_client))


async def _pulling(nc: Client) -> bool:
    info = await request(nc, f"CONSUMER.INFO.{DISPATCH}.{GENERATION}")
    return bool(msgspec.json.decode(info)["num_waiting"])


async def test_a_cancelled_loop_gives_back_at_once(nats_client: Client) -> None:
    hands, others = Hands(), Hands()
    hands.go_on.clear()
    await give(nats_client)
    task = asyncio.create_task(consume(nats_client, DISPATCH, GENERATION, hands, asyncio.Event()))
    await wait_until(lambda: hands.seen)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (task.cancelled(), hands.cancelled) == (True, 1)
    async with working(nats_client, others):
        await wait_until(lambda: _empty(nats_client), what="long before the lease ends")
    assert others.seen == [b"1"]


@pytest.mark.fault("B7")
async def test_five_hands_hold_three_at_most(nats_client: Client) -> None:
    """Even where the queue would hold more."""
    config = msgspec.json.decode(await request(nats_client, f"STREAM.INFO.{DISPATCH}"))["config"]
    await request(nats_client, f"STREAM.UPDATE.{DISPATCH}", config | {"max_msgs": 20})
    await give(nats_client, 20)
    holding, most, full = 0, 0, asyncio.Event()

    async def handler(delivery: Delivery) -> Outcome:
        nonlocal holding, most
        holding += 1
        most = max(most, holding)
        if holding == 3:
            full.set()
        await full.wait()
        await request(nats_client, "INFO")  # long enough for a fourth to come, if one could
        holding -= 1
        return Outcome.DONE

    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(consume(nats_client, DISPATCH, GENERATION, handler, stop))
        await wait_until(lambda: _empty(nats_client))
        stop.set()
    assert most == 3


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.fault("K5")
async def test_a_loop_outlives_its_server(nats_client: Client, nats_server: EmbeddedNats, how: str) -> None:
    hands = Hands()
    async with working(nats_client, hands):
        await give(nats_client)
        await wait_until(lambda: _empty(nats_client))
        getattr(nats_server, how)()
        nats_server.start()
        await wait_until(lambda: nats_client.is_connected)
        await wait_until(lambda: _given(nats_client, 2))
        await wait_until(lambda: b"2" in hands.seen)


async def _given(nc: Client, number: int) -> bool:
    try:
        await nc.request(order(job_id(number)), f"{number}".encode(), timeout=1.0)
    except Exception:
        return False
    return True
