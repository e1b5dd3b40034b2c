"""Bugs that forge could have, each a change of a few words, put into a process by `failpoints.py`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

DELAY_SECONDS = 60


def no_fence() -> None:
    """Whoever has once had an attempt may conclude it, however long ago."""
    from forge.domain import jobs
    from forge.workers.loop import Delivery

    for name in ("_require_current", "_require_own"):
        setattr(jobs, name, lambda *_: None)
    Delivery.held = property(lambda _: True)  # type: ignore[assignment,method-assign]  # planted


def place_freed_with_the_order() -> None:
    """An order that is gone has freed its place, whoever still draws, as if its lease had freed it."""
    from forge.workers.dispatcher import Dispatcher

    def taken(self: Dispatcher) -> int:
        return len(self.orders)

    Dispatcher._taken = taken  # type: ignore[method-assign]  # planted
    Dispatcher._expected = lambda _: []  # type: ignore[method-assign]  # planted


def ack_before_store() -> None:
    """The conclusion is written, and the order settled, before the picture is at its place."""
    from forge.store import Store

    keep = Store.keep
    late: set[asyncio.Task[Any]] = set()

    async def promised(self: Store, picture: Any, kind: Any = "assets") -> Any:
        copy = self.root / "late" / picture.path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(picture.path.read_bytes())

        async def afterwards() -> None:
            await asyncio.sleep(2.0)  # the bug itself: the file comes later than the word of it
            picture.path = copy
            await keep(self, picture, kind)

        task = asyncio.create_task(afterwards())
        late.add(task)
        task.add_done_callback(late.discard)
        return self.path(picture.content_hash, picture.format, kind).relative_to(self.root)

    Store.keep = promised  # type: ignore[method-assign]  # planted


def delayed_nak() -> None:
    """A failed attempt is not an event: its order waits in the broker, and keeps its place."""
    from forge.workers.attempt import Attempt
    from forge.workers.loop import Outcome

    async def postponed(self: Attempt, error: Exception) -> Outcome:
        words = b"-NAK " + json.dumps({"delay": DELAY_SECONDS * 10**9}).encode()
        await self.studio.nc.request(self.delivery._reply, words, timeout=2)
        return Outcome.LEAVE

    Attempt._fail = postponed  # type: ignore[method-assign]  # planted


BUGS: dict[str, Callable[[], None]] = {
    "no fence": no_fence,
    "place freed with the order": place_freed_with_the_order,
    "ack before store": ack_before_store,
    "delayed nak": delayed_nak,
}
