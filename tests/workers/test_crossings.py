"""Crossings of the disk in the log: one event for each, whoever looks and however often it starts anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import timedelta

import pytest
from nats.aio.client import Client

from forge.domain.disk import Disk, Lines
from forge.events.system import DiskCrossed
from forge.eventstore import EventStore
from forge.follower import follow
from forge.topology import DISK_CROSSED
from forge.workers.crossings import Crossings

LINES = Lines(0.8, 0.9)
LIMIT = 1_000_000


def used(percent: int, more: int = 0) -> Callable[[], Awaitable[Disk]]:
    """A volume that is measured as so full."""
    size = LIMIT * percent // 100 + more

    async def measure() -> Disk:
        await asyncio.sleep(0)
        return Disk(size, LIMIT, LIMIT - size)

    return measure


async def told(nc: Client) -> list[tuple[str, bool]]:
    """Every crossing in the log."""
    found: list[tuple[str, bool]] = []
    async with aclosing(follow(nc, 1, (DISK_CROSSED,))) as batches:
        async for batch in batches:
            events = [r.event for r in batch.records if isinstance(r.event, DiskCrossed)]
            found += [(event.level, event.above) for event in events]
            if batch.caught_up:
                break
    return found


async def test_each_crossing_is_one_event_over_restarts(nats_client: Client, events: EventStore) -> None:
    for percent in (50, 79, 81, 85, 79, 81, 92, 91, 89, 99, 99, 93, 91, 76, 10):
        await Crossings(events, LINES, 60).look(used(percent))  # started anew each time
    assert await told(nats_client) == [
        ("warn", True),
        ("clean", True),
        ("full", True),
        ("full", False),
        ("clean", False),
        ("warn", False),
    ]
    newest = await events.last(DISK_CROSSED)
    assert newest is not None
    assert newest.meta.actor == "scheduler"
    assert newest.event == DiskCrossed(
        level="warn", above=False, used_bytes=LIMIT * 76 // 100, limit_bytes=LIMIT
    )


async def test_schedulers_that_look_at_one_moment_say_it_once(
    nats_client: Client, events: EventStore
) -> None:
    schedulers = [Crossings(EventStore(nats_client), LINES, 60) for _ in range(8)]
    for percent in (99, 10) * 3:
        # each reads a slightly different use, as measuring does
        said = await asyncio.gather(*(s.look(used(percent, nth)) for nth, s in enumerate(schedulers)))
        assert sum(map(len, said)) == 3
    up = [("warn", True), ("clean", True), ("full", True)]
    down = [("full", False), ("clean", False), ("warn", False)]
    assert await told(nats_client) == (up + down) * 3


async def test_who_measured_before_another_wrote_does_not_take_it_back(
    nats_client: Client, events: EventStore
) -> None:
    slow, quick = Crossings(events, LINES, 60), Crossings(EventStore(nats_client), LINES, 60)
    await quick.look(used(85))

    async def overtaken() -> Disk:
        seen = await used(95)()
        await quick.look(used(10))  # the clean-up was faster
        return seen

    assert await slow.look(overtaken) == []
    assert await told(nats_client) == [("warn", True), ("warn", False)]


@pytest.mark.parametrize(("percent", "again"), [(85, []), (92, [("clean", True)]), (99, [("full", True)])])
async def test_while_a_clean_up_is_needed_it_is_asked_for_again(
    nats_client: Client, events: EventStore, percent: int, again: list[tuple[str, bool]]
) -> None:
    crossings = Crossings(events, LINES, 1)
    assert crossings.remind_after == timedelta(minutes=1), "never more often"
    assert Crossings(events, LINES, 60).remind_after == timedelta(minutes=10)
    await crossings.look(used(percent))
    first = await told(nats_client)
    await crossings.look(used(percent))
    assert await told(nats_client) == first
    crossings.remind_after = timedelta()
    await crossings.look(used(percent))
    assert await told(nats_client) == first + again
