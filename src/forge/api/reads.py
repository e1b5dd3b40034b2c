"""Which assets were fetched, by whom and how often: counted in memory, written down every few seconds.

A fetch costs no write. What one interval brought becomes one event, or several when it is long; a process
that is killed loses that interval. An event whose answer was lost is said again under the same id, so nothing
counts twice; while the log is away counts gather here, up to a bound.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from uuid import UUID, uuid4

import msgspec

from forge.broker import BrokerRefused
from forge.errors import Conflict, LogUnavailable
from forge.events.assets import AssetsAccessed, Reads
from forge.events.envelope import Meta, event_id
from forge.eventstore import Draft, EventStore
from forge.topology import access

log = logging.getLogger("forge.reads")

MOST_IN_EVENT = 500
MOST_KEPT = 20_000
"""Pairs of asset and user that may wait for the log; fetches of further ones are not counted."""

_WRITE_SECONDS = 2.0
_LAST_SECONDS = 4.0
_TRIES = 5


class _Count(msgspec.Struct):
    count: int
    first_at: datetime
    last_at: datetime


class ReadCounter:
    """Counts fetches; :meth:`flush` tells the log.

    ``source`` names this API from one start to the next, so that the log has one ledger for each API.
    """

    def __init__(self, store: EventStore, source: str) -> None:
        self.store, self.source = store, source
        self.uncounted = 0
        self._counts: dict[tuple[UUID, str], _Count] = {}
        self._unwritten: Draft | None = None
        self._process, self._number = uuid4(), 0
        self._seen: int | None = None

    def count(self, asset_id: UUID, user: str, now: datetime) -> None:
        """Take note of one fetch."""
        known = self._counts.get((asset_id, user))
        if known is not None:
            known.count += 1
            known.last_at = max(known.last_at, now)
        elif len(self._counts) < MOST_KEPT:
            self._counts[asset_id, user] = _Count(1, now, now)
        else:
            self.uncounted += 1

    @asynccontextmanager
    async def flushing(self, seconds: float) -> AsyncIterator[None]:
        """Flush at this pace, and once more at the end."""
        pace = asyncio.create_task(self._keep_flushing(seconds), name="count reads")
        try:
            yield
        finally:
            pace.cancel()
            await asyncio.gather(pace, return_exceptions=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    await self.flush()

    async def _keep_flushing(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self.flush()

    async def flush(self) -> None:
        """Write down what was counted; what the log does not take is kept and said again next time."""
        if self.uncounted:
            log.warning("fetches were not counted", extra={"fetches": self.uncounted})
            self.uncounted = 0
        try:
            while self._unwritten or self._counts:
                self._unwritten = self._unwritten or self._draft()
                await self._write(self._unwritten)
                self._unwritten = None
        except (LogUnavailable, BrokerRefused, Conflict) as error:
            log.warning("counted fetches wait for the log", extra={"reason": error.detail})

    def _draft(self) -> Draft:
        """The longest waiting counts as one event, whose id no other event of any process has."""
        self._number += 1
        taken = list(islice(self._counts, MOST_IN_EVENT))
        counts = [(key, self._counts.pop(key)) for key in taken]
        reads = [
            Reads(asset_id=asset_id, user_id=user, count=c.count, first_at=c.first_at, last_at=c.last_at)
            for (asset_id, user), c in counts
        ]
        command = f"access/{self._process}/{self._number}"
        meta = Meta(
            id=event_id(command, 0),
            at=datetime.now(UTC),
            actor=f"api:{self.source}",
            correlation=str(self._process),
            causation=command,
        )
        return Draft(AssetsAccessed(source=self.source, reads=reads), meta, access(self.source))

    async def _write(self, draft: Draft) -> None:
        """Another process under the same name only makes this one look again."""
        for _ in range(_TRIES):
            if self._seen is None:
                last = await self.store.last(access(self.source))
                self._seen = last.seq if last else 0
            expecting = msgspec.structs.replace(draft, expected=self._seen)
            try:
                [record] = await self.store.append([expecting], within=_WRITE_SECONDS)
            except Conflict:
                self._seen = None
            else:
                self._seen = record.seq
                return
        raise Conflict(f"another process counts as {self.source} and writes all the time")
