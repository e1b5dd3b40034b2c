"""The dispatcher on a real server: the best job next, three orders at most, none lost, none for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID

import msgspec
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from factories import request
from forge.admissions import Admissions
from forge.broker import connect
from forge.broker import request as ask
from forge.commands import Jobs, Loaded
from forge.domain.dispatch import Line
from forge.domain.jobs import Cancel, Complete, FailAttempt, Start
from forge.embedded import EmbeddedNats
from forge.eventstore import EventStore
from forge.telemetry import span
from forge.topology import DISPATCH, GENERATION
from forge.topology import order as order_subject
from forge.workers import dispatcher
from forge.workers.dispatcher import Dispatcher
from forge.workers.orders import Order, decode
from waiting import wait_until

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class House:
    """Users who submit, a queue of orders, and the hands of a worker that does what the test says."""

    def __init__(self, nc: Client) -> None:
        self.nc, self.events = nc, EventStore(nc)
        self.admissions = Admissions(self.events, Line(), queue_limit=1000, rate_per_hour=0)
        self.admissions.caught_up.set()
        self.jobs = Jobs(self.events)

    async def submit(self, user: str = "mei", priority: int = 5) -> UUID:
        [loaded] = await self.admissions.submit(user, [request(priority=priority)], actor=user)
        return loaded.job.id

    async def orders(self) -> set[UUID]:
        """The jobs whose order lies in the queue."""
        info = msgspec.json.decode(await ask(self.nc, f"STREAM.INFO.{DISPATCH}", {"subjects_filter": ">"}))
        return {UUID(subject.rpartition(".")[2]) for subject in info["state"].get("subjects") or {}}

    async def offered(self, jobs: set[UUID]) -> None:
        """Wait until exactly these orders lie in the queue."""
        await wait_until(lambda: self._are(jobs), what="the orders are the expected ones")

    async def _are(self, jobs: set[UUID]) -> bool:
        return await self.orders() == jobs

    async def take(self) -> tuple[Order, Msg]:
        """The next order; asks anew every second, since a question dies with the server it went to."""
        subscription = await self.nc.jetstream().pull_subscribe_bind(GENERATION, stream=DISPATCH)
        async with asyncio.timeout(60):
            while True:
                with suppress(TimeoutError, nats.errors.Error):
                    [message] = await subscription.fetch(1, timeout=1.0)
                    break
        await subscription.unsubscribe()
        return decode(message.data), message

    async def begin(self, order: Order) -> Loaded:
        loaded = await self.load(order)
        command = Start(order.attempt, "a", "http://comfy", order.reason)
        return await self.jobs.act(loaded, command, actor="worker", name=f"{order.attempt}/start/a")

    async def load(self, order: Order) -> Loaded:
        return await self.jobs.load(order.user_id, order.job_id, order.submitted_seq, order.admitted_seq)

    async def complete(self, order: Order, message: Msg) -> None:
        command = Complete(order.attempt, "a", (), datetime.now(UTC))
        await self.jobs.act(await self.load(order), command, actor="worker", name=f"{order.attempt}/complete")
        await message.ack_sync(timeout=10)

    async def fail(self, order: Order, message: Msg, since: timedelta = timedelta()) -> None:
        """An attempt that failed; its back-off began ``since`` ago."""
        now = datetime.now(UTC) - since
        command = FailAttempt(order.attempt, "prompt_failed", "no memory", False, now)
        await self.jobs.act(await self.load(order), command, actor="worker", name=f"{order.attempt}/fail")
        await message.ack_sync(timeout=10)

    async def run_one(self) -> UUID:
        """Take the next order, do it, and conclude it."""
        order, message = await self.take()
        await self.begin(order)
        await self.complete(order, message)
        return order.job_id

    async def cancel(self, job: UUID, user: str = "mei") -> None:
        state = self.admissions.line.jobs[job]
        loaded = await self.jobs.load(user, job, state.submitted_seq, state.admitted_seq)
        await self.jobs.act(loaded, Cancel(), actor=user, name="cancel")


@pytest.fixture
def house(nats_client: Client) -> House:
    return House(nats_client)


@asynccontextmanager
async def dispatching(nats_server: EmbeddedNats) -> AsyncIterator[Dispatcher]:
    """A dispatcher on its own connection; ends as a killed process would."""
    nc = await connect(nats_server.url, "dispatcher")
    made = Dispatcher(EventStore(nc))
    task = asyncio.create_task(made.run())
    try:
        yield made
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await nc.close()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(dispatcher, "_MISSING_SECONDS", 0.5)


@asynccontextmanager
async def counting(house: House) -> AsyncIterator[Callable[[], int]]:
    """The most orders that ever lay in the queue, looked at all the time."""
    most = 0

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, len(await house.orders()))

    task = asyncio.create_task(look())
    yield lambda: most
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# ------------------------------------------------------------------- giving


async def test_an_order_says_what_a_worker_needs(house: House, nats_server: EmbeddedNats) -> None:
    await house.submit("lin")
    job = await house.submit("mei", 2)
    async with dispatching(nats_server):
        order, _ = await house.take()
    assert (order.job_id, order.user_id, order.attempt) == (job, "mei", 1)
    assert (order.submitted_seq, order.admitted_seq) == (2, 2)
    assert order.reason.startswith("priority 2; waited 0 starts; mei's turn")


async def test_three_orders_at_most_best_first(house: House, nats_server: EmbeddedNats) -> None:
    late = [await house.submit(f"user {nth}", 9) for nth in range(3)]
    soon = [await house.submit(f"user {nth}", 1) for nth in range(3)]
    async with counting(house) as most, dispatching(nats_server):
        await house.offered(set(soon))
        done = [await house.run_one() for _ in range(6)]
        await house.offered(set())
        assert most() == 3
    assert (set(done[:3]), set(done[3:])) == (set(soon), set(late))


async def test_a_free_place_is_given_again_at_once(
    house: House, nats_server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by the ack itself: looking would come much later."""
    jobs = [await house.submit() for _ in range(5)]
    async with dispatching(nats_server):
        await house.offered(set(jobs[:3]))
        monkeypatch.setattr(dispatcher, "_LOOK_SECONDS", 60.0)
        for nth in (3, 4):
            done = await house.run_one()
            await house.offered({*jobs[: nth + 1]} - set(jobs[: nth - 2]))
            assert done == jobs[nth - 3]


async def test_who_comes_while_three_run_waits_and_the_best_goes_next(
    house: House, nats_server: EmbeddedNats
) -> None:
    running = [await house.submit(f"user {nth}") for nth in range(3)]
    async with dispatching(nats_server):
        await house.offered(set(running))
        await house.submit("lin", 9)
        best = await house.submit("wu", 1)
        done = await house.run_one()
        await house.offered({*running, best} - {done})


async def test_a_cancelled_job_is_not_offered(house: House, nats_server: EmbeddedNats) -> None:
    jobs = [await house.submit() for _ in range(5)]
    async with dispatching(nats_server) as at_work:
        await house.offered(set(jobs[:3]))
        await house.cancel(jobs[3])
        await wait_until(lambda: jobs[3] not in at_work.line.jobs)
        done = await house.run_one()
        await house.offered({*jobs[:3], jobs[4]} - {done})


# ----------------------------------------------------------------- back-off


@pytest.mark.fault("B5")
async def test_a_job_in_back_off_holds_no_place(house: House, nats_server: EmbeddedNats) -> None:
    """Three fail at once: the fourth runs at once."""
    failing = {await house.submit() for _ in range(3)}
    fourth = await house.submit()
    async with dispatching(nats_server):
        await house.offered(failing)
        for _ in failing:
            order, message = await house.take()
            await house.begin(order)
            await house.fail(order, message)
        assert await house.run_one() == fourth


async def test_a_job_comes_back_when_its_back_off_is_over(house: House, nats_server: EmbeddedNats) -> None:
    job = await house.submit()
    async with dispatching(nats_server):
        order, message = await house.take()
        await house.begin(order)
        began = datetime.now(UTC)
        await house.fail(order, message, since=timedelta(seconds=1.5))
        again, _ = await house.take()
    assert (again.job_id, again.attempt) == (job, 2)
    assert datetime.now(UTC) - began >= timedelta(seconds=0.4)


# ------------------------------------------------- several, none, once more


async def test_two_dispatchers_give_every_job_once(house: House, nats_server: EmbeddedNats) -> None:
    jobs = {await house.submit(f"user {nth % 4}") for nth in range(20)}
    async with counting(house) as most, dispatching(nats_server), dispatching(nats_server):
        done = [await house.run_one() for _ in range(20)]
        await house.offered(set())
        assert most() == 3
    assert (set(done), len(done)) == (jobs, 20)


async def test_a_dispatcher_that_starts_again_goes_on(house: House, nats_server: EmbeddedNats) -> None:
    jobs = {await house.submit(f"user {nth % 4}") for nth in range(12)}
    done: list[UUID] = []
    async with counting(house) as most:
        for _ in range(6):
            async with dispatching(nats_server):
                done.append(await house.run_one())
                order, message = await house.take()
                await house.begin(order)
            await house.complete(order, message)
            done.append(order.job_id)
        assert most() == 3
    assert (set(done), len(done)) == (jobs, 12)


@pytest.mark.fault("K5")
async def test_a_server_that_is_killed_loses_no_job(
    house: House, nats_server: EmbeddedNats, hurried: None
) -> None:
    jobs = {await house.submit() for _ in range(6)}
    done: set[UUID] = set()
    async with dispatching(nats_server):
        done.add(await house.run_one())
        nats_server.kill()
        nats_server.start()
        await wait_until(lambda: house.nc.is_connected)
        while done < jobs:
            order, message = await house.take()  # an ack that the crash took comes again
            if order.job_id in done:
                await message.ack_sync(timeout=10)
                continue
            await house.begin(order)
            await house.complete(order, message)
            done.add(order.job_id)
        await house.offered(set())


@pytest.mark.parametrize("begun", [False, True], ids=["given", "running"])
@pytest.mark.fault("B7")
async def test_an_order_that_was_lost_is_given_again(
    house: House, nats_server: EmbeddedNats, hurried: None, begun: bool
) -> None:
    job = await house.submit()
    async with dispatching(nats_server):
        order, message = await house.take()
        if begun:
            await house.begin(order)
        await message.ack_sync(timeout=10)  # nobody wrote an outcome
        again, message = await house.take()
        assert (again.job_id, again.attempt, again.reason) == (job, 1, "its order was lost")
        await (house.load if begun else house.begin)(again)
        await house.complete(again, message)
        await house.offered(set())


async def test_an_order_is_not_missed_before_the_log_had_time_to_tell(
    house: House, nats_server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(dispatcher, "_MISSING_SECONDS", 60.0)
    first, second = await house.submit(), await house.submit("lin")
    async with dispatching(nats_server) as at_work:
        order, message = await house.take()
        assert order.job_id == first
        await message.ack_sync(timeout=10)
        await wait_until(lambda: first in at_work._missed)
        await house.offered({second})


@pytest.mark.fault("B3")
async def test_a_stranger_in_the_queue_stops_nobody(house: House, nats_server: EmbeddedNats) -> None:
    await house.nc.request("forge.dispatch.main.stranger", b"hello", timeout=10)
    jobs = [await house.submit() for _ in range(4)]
    async with dispatching(nats_server):
        await wait_until(lambda: _messages(house, 3))
        info = msgspec.json.decode(await ask(house.nc, f"STREAM.INFO.{DISPATCH}", {"subjects_filter": ">"}))
        assert set(info["state"]["subjects"]) == {
            "forge.dispatch.main.stranger",
            *(order_subject(job) for job in jobs[:2]),
        }


async def _messages(house: House, count: int) -> bool:
    info = msgspec.json.decode(await ask(house.nc, f"STREAM.INFO.{DISPATCH}"))
    return bool(info["state"]["messages"] == count)


async def test_nothing_is_left_behind(house: House, nats_server: EmbeddedNats) -> None:
    async with AsyncExitStack() as stack:
        at_work = await stack.enter_async_context(dispatching(nats_server))
        await wait_until(lambda: at_work.places)
        nc = at_work.nc
    assert nc.is_closed

    async def nobody_follows() -> bool:
        names = msgspec.json.decode(await ask(house.nc, "CONSUMER.NAMES.FORGE_EVENTS"))["consumers"]
        return not any(name.startswith("follow-") for name in names)

    # the deletion is said, not asked: the server acts on it soon, and long before it would by itself
    await wait_until(nobody_follows, what="the follower's consumer is gone")


async def test_an_order_is_part_of_the_trace_of_who_asked(house: House, nats_server: EmbeddedNats) -> None:
    with span("request", TRACEPARENT):
        traced = await house.submit()
    plain = await house.submit()
    async with dispatching(nats_server) as dispatcher:
        orders = [await house.take() for _ in range(2)]
        assert {order.job_id: order.traceparent for order, _ in orders} == {traced: TRACEPARENT, plain: ""}
        for order, message in orders:
            await house.begin(order)
            await house.complete(order, message)
        await wait_until(lambda: not dispatcher.line.jobs, what="both are over")
        assert dispatcher._traces == {}, "and forgotten"
