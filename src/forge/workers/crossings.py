"""Says in the log when the use of the asset volume crosses a line: one event for each crossing.

The newest crossing tells which lines are crossed, and an append expects it to be still the newest. So of two
schedulers one writes and the other has nothing left to say, and a scheduler that has just started goes on
where the last one ended. From the clean-up line on, the newest is said again every ten scans, and never more
than once a minute: a clean-up that could not make enough room tries again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from forge.domain.disk import Disk, Lines, crossings, rank, rank_after, reminder
from forge.errors import Conflict
from forge.events.envelope import Meta, event_id
from forge.events.system import DiskCrossed
from forge.eventstore import Draft, EventStore
from forge.topology import DISK_CROSSED

log = logging.getLogger("forge.scheduler")

_REMIND_SCANS = 10
_REMIND_LEAST = timedelta(minutes=1)


class Crossings:
    """A duty of the scheduler. Emits :class:`DiskCrossed`."""

    def __init__(self, events: EventStore, lines: Lines, scan_seconds: float) -> None:
        self.events, self.lines = events, lines
        self.remind_after = max(_REMIND_LEAST, timedelta(seconds=_REMIND_SCANS * scan_seconds))

    async def look(self, measure: Callable[[], Awaitable[Disk]]) -> list[DiskCrossed]:
        """Write down what the use of the volume has crossed; what was written.

        Raises:
            LogUnavailable: no answer; the next look tries again.
            StoreFailed: what ``measure`` raises.
        """
        newest = await self.events.last(DISK_CROSSED)
        # only now: a reading older than the newest crossing would take it back
        disk, now = await measure(), datetime.now(UTC)
        fact = newest.event if newest is not None and isinstance(newest.event, DiskCrossed) else None
        before = rank_after(fact)
        found = crossings(disk, before, rank(disk, self.lines, before))
        if not found and newest is not None and now - newest.meta.at > self.remind_after:
            found = reminder(disk, before)
        return await self._written(found, newest.seq if newest is not None else 0, now) if found else []

    async def _written(self, found: list[DiskCrossed], seen: int, now: datetime) -> list[DiskCrossed]:
        command = f"disk/{seen}"
        drafts = [
            Draft(event, Meta(id=event_id(command, nth), at=now, actor="scheduler", correlation="disk"))
            for nth, event in enumerate(found)
        ]
        first = drafts[0]
        drafts[0] = Draft(first.event, first.meta, DISK_CROSSED, seen)
        try:
            await self.events.append(drafts)
        except Conflict:
            return []  # another scheduler has said it
        for event in found:
            log.warning(
                "the disk crossed a line",
                extra={
                    "level": event.level,
                    "above": event.above,
                    "used": event.used_bytes,
                    "limit": event.limit_bytes,
                },
            )
        return found
