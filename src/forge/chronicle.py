"""The log from any of its events on, whether the book was closed over it or not."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from forge.eventstore import EventStore
from forge.follower import Batch, follow
from forge.topology import ALL_EVENTS


async def records(
    store: EventStore, start: int = 1, filters: Sequence[str] = (ALL_EVENTS,), *, most: int = 1000
) -> AsyncGenerator[Batch, None]:
    """As :func:`forge.follower.follow`, with what is closed before it.

    Raises:
        LogUnreadable, LogDamaged: as there.
        LogUnavailable: what is closed cannot be read.
    """
    before = store.before
    if before is not None and start <= before.through:
        async for page in before.pages(start, filters):
            yield Batch(page, False)
        start = before.through + 1
    async with aclosing(follow(store.nc, start, filters, stream=store.stream, most=most)) as batches:
        async for batch in batches:
            yield batch
