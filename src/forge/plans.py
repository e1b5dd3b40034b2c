"""What may go from the library, found before anything does.

Nothing may while something is doubtful: the clock, the tables, the volume.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from itertools import islice
from uuid import UUID

import msgspec

from forge import chronicle
from forge.database import Connection, Pool, answering
from forge.domain import retention as rules
from forge.domain.ids import asset_id
from forge.domain.retention import (
    DAMAGED,
    EVICTED,
    EXPIRED,
    LOST,
    OLD,
    ORPHANED,
    TEMPORARY,
    Claim,
)
from forge.errors import NothingDeletedNow
from forge.events.assets import AssetDamaged, AssetGivenUp, AssetLost, AssetReady
from forge.eventstore import EventStore
from forge.projections import retention as table
from forge.projections.retention import Row
from forge.resources import Volume
from forge.settings import Settings
from forge.store import Store, StoredFile
from forge.topology import ALL_FAULTS, references

log = logging.getLogger("forge.retention")

MOST = 10_000
"""Claims in one plan; whoever wants more asks again."""

PAGE = 1000

_PATIENCE_SECONDS = 10.0

Clock = Callable[[], datetime]


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What should go: for these reasons, of this type, made before this moment, of this owner; None: any."""

    reasons: tuple[str, ...]
    asset_type: str | None = None
    before: datetime | None = None
    owner: str | None = None


class Tally(msgspec.Struct, kw_only=True):
    """How much: distinct contents (or files), and their bytes."""

    assets: int = 0
    bytes: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What would go; ``of`` so many assets. ``faults`` are rows whose file is not what it should be."""

    wish: Wish
    at: datetime
    of: int
    claims: dict[tuple[UUID, UUID], tuple[str, Claim]]
    orphans: list[StoredFile]
    temporary: int = 0
    faults: list[AssetLost | AssetDamaged] = []

    @property
    def assets(self) -> int:
        """What counts against the brake: pictures, whatever the number of their owners."""
        return len({asset for asset, _ in self.claims}) + len(self.orphans)

    @property
    def held(self) -> bool:
        return rules.held(self.assets, self.of)

    def by_reason(self) -> dict[str, Tally]:
        found = tallied((reason, claim) for reason, claim in self.claims.values())
        if self.orphans:
            size = sum(file.size_bytes for file in self.orphans)
            found[ORPHANED] = Tally(assets=len(self.orphans), bytes=size)
        if self.temporary:
            found[TEMPORARY] = Tally(assets=self.temporary)
        return found

    def by_type(self) -> dict[str, Tally]:
        return tallied((claim.asset_type, claim) for _, claim in self.claims.values())

    @property
    def bytes(self) -> int:
        return sum(tally.bytes for tally in self.by_reason().values())


def utc() -> datetime:
    return datetime.now(UTC)


class Planner:
    """Over one log, one database and one volume."""

    def __init__(
        self, events: EventStore, pool: Pool, store: Store, settings: Settings, clock: Clock = utc
    ) -> None:
        self.events, self.pool, self.store, self.settings, self.clock = events, pool, store, settings, clock
        self._reported: set[str] = set()
        self._reports_seq = 0

    # ----------------------------------------------------------- what is certain

    async def now(self) -> datetime:
        """The time by which lives are judged: the earliest of three clocks that agree.

        Raises:
            NothingDeletedNow: they do not agree, or the log has events from the future.
            LogUnavailable, DatabaseUnavailable: no answer.
        """
        state = await self.events.state()
        async with answering(), self.pool.acquire() as connection:
            database = await table.clock(connection)
        own = self.clock()
        if wrong := rules.doubt(own, (state.now, database), state.last_at):
            raise NothingDeletedNow(f"nothing is deleted: {wrong}")
        return min(own, state.now, database)

    async def projected(self, patience: float = _PATIENCE_SECONDS) -> None:
        """Wait until the tables tell of everything that is in the log now.

        Raises:
            NothingDeletedNow: they do not in time.
        """
        head = (await self.events.state()).head
        deadline = time.monotonic() + patience
        while True:
            async with answering(), self.pool.acquire() as connection:
                seq = await table.checkpoint(connection)
            if seq >= head:
                return
            if time.monotonic() > deadline:
                raise NothingDeletedNow(f"nothing is deleted: the tables are at {seq} of {head} events")
            await asyncio.sleep(0.05)

    # ------------------------------------------------------------------ planning

    async def plan(self, wish: Wish, at: datetime | None = None) -> Plan:
        """What would go, judged as of ``at`` (default: now).

        Raises:
            NothingDeletedNow: it cannot be known for certain.
            StoreFailed, LogUnavailable, DatabaseUnavailable: no answer.
        """
        now = await self.now()
        at = now if at is None else min(at, now)
        await self.projected()
        claims: dict[tuple[UUID, UUID], tuple[str, Claim]] = {}
        faults: list[AssetLost | AssetDamaged] = []
        async with answering(), self.pool.acquire() as connection:
            of, of_bytes = await table.total(connection)
            if EXPIRED in wish.reasons:
                extends = timedelta(seconds=self.settings.asset_use_extends_seconds)
                due = await table.due(connection, at, extends, wish.owner, wish.asset_type, wish.before, MOST)
                _add(claims, EXPIRED, due)
            if OLD in wish.reasons:
                before = min(at, wish.before or at)
                _add(claims, OLD, await table.old(connection, wish.owner, wish.asset_type, before, MOST))
            if EVICTED in wish.reasons:
                need = await self._too_many_bytes(of_bytes)
                await self._evictions(connection, claims, wish, at, need)
        if {LOST, DAMAGED} & set(wish.reasons):
            faults = await self._faults(wish)
            for kind, reason in ((AssetLost, LOST), (AssetDamaged, DAMAGED)):
                mine = [fault.asset_id for fault in faults if isinstance(fault, kind)]
                if reason in wish.reasons and mine:
                    async with answering(), self.pool.acquire() as connection:
                        _add(claims, reason, await table.claims_of(connection, mine, MOST))
        orphans, temporary = await self._leftovers(wish, at, of)
        return Plan(
            wish=wish,
            at=at,
            of=of,
            claims=claims,
            orphans=orphans,
            temporary=temporary,
            faults=faults,
        )

    async def _too_many_bytes(self, assets_bytes: int) -> int:
        """What is to go from the volume as it is; files without a row are going already."""
        volume = Volume(self.settings.assets_dir, self.settings.disk_limit_bytes)
        disk = await asyncio.to_thread(volume.measure, True)
        going = max(0, (await asyncio.to_thread(volume.kinds)).get("assets", 0) - assets_bytes)
        return rules.too_many_bytes(disk.used - going, disk.limit, self.settings.target_ratio)

    async def _evictions(
        self,
        connection: Connection,
        claims: dict[tuple[UUID, UUID], tuple[str, Claim]],
        wish: Wish,
        at: datetime,
        need: int,
    ) -> None:
        """Add what goes to make room, the least worth first."""
        if need <= 0 or wish.owner is not None:
            return
        kept = await table.least_used(connection, at, wish.asset_type, wish.before, MOST)
        place = {asset.id: nth for nth, asset in enumerate(rules.least_worth(kept, need, at))}
        found = await table.claims_of(connection, list(place), MOST)
        _add(claims, EVICTED, sorted(found, key=lambda claim: place[claim.asset_id]))

    async def _faults(self, wish: Wish) -> list[AssetLost | AssetDamaged]:
        """Rows whose file is missing, has another size, or was reported as damaged and still is."""
        reported = await self._reports()
        found: list[AssetLost | AssetDamaged] = []
        after = ""
        while rows := await self.rows(after):
            after = rows[-1].content_hash
            wrong = await asyncio.to_thread(self._looked_at, rows, reported)
            if not wrong:
                continue
            # a row whose file went by the rules is gone by now
            async with answering(), self.pool.acquire() as connection:
                still = await table.known(connection, [row.content_hash for row, _ in wrong])
            found += [
                fault_of(row, what)
                for row, what in wrong
                if row.content_hash in still and wish.asset_type in (None, row.asset_type)
            ]
        return found

    async def rows(self, after: str) -> list[Row]:
        """The next page of stored contents behind a hash."""
        async with answering(), self.pool.acquire() as connection:
            return await table.rows(connection, after, PAGE)

    def _looked_at(self, rows: Sequence[Row], reported: set[str]) -> list[tuple[Row, str]]:
        wrong = []
        for row in rows:
            what = self.store.misfit(row.content_hash, row.format, row.file_size_bytes)
            if not what and row.content_hash in reported:
                what = self.store.fault(row.content_hash, row.format)
            if what:
                wrong.append((row, what))
        return wrong

    async def _reports(self) -> set[str]:
        """Contents that somebody found damaged, ever; whether they still are is to be looked at."""
        start = self._reports_seq + 1
        async with aclosing(chronicle.records(self.events, start, (ALL_FAULTS,))) as batches:
            async for batch in batches:
                for record in batch.records:
                    if isinstance(record.event, AssetDamaged):
                        self._reported.add(record.event.content_hash)
                    self._reports_seq = record.seq
                if batch.caught_up:
                    break
        return self._reported

    async def _leftovers(self, wish: Wish, at: datetime, of: int) -> tuple[list[StoredFile], int]:
        """Files without a row, and how much there is of what is nobody's; neither has an owner or a type."""
        if wish.owner is not None or wish.asset_type is not None:
            return [], 0
        cutoff = self.cutoff(wish, at)
        orphans, temporary = [], 0
        if ORPHANED in wish.reasons and of:  # an empty table deletes nothing
            orphans = await self._orphans(cutoff, at)
        if TEMPORARY in wish.reasons:
            temporary = await asyncio.to_thread(self.swept, cutoff, pretend=True)
        return orphans, temporary

    def cutoff(self, wish: Wish, at: datetime) -> float:
        """Files that were touched since, in seconds of the epoch, stay."""
        grace = timedelta(seconds=self.settings.orphan_grace_seconds)
        return min(at - grace, wish.before or at).timestamp()

    def swept(self, cutoff: float, *, pretend: bool = False) -> int:
        """Remove what is nobody's and untouched since; how much there was."""
        stale = max(0.0, time.time() - cutoff)
        return self.store.sweep(stale, pretend=pretend) + self.store.tidy(cutoff, pretend=pretend)

    async def _orphans(self, cutoff: float, at: datetime) -> list[StoredFile]:
        suspects: list[StoredFile] = []
        files = self.store.files()
        while chunk := await asyncio.to_thread(lambda: list(islice(files, PAGE))):
            old = [file for file in chunk if file.modified_at <= cutoff]
            suspects += await self._unknown(old)
        if not suspects:
            return []
        await self.projected()  # whatever was written about them until now
        suspects = await self._unknown(suspects)
        if len(suspects) > rules.BRAKE_FILES:
            return suspects  # an operator looks first; each is asked about again before it goes
        return [file for file in suspects if not await self.spoken_for(file, at)]

    async def _unknown(self, files: Sequence[StoredFile]) -> list[StoredFile]:
        async with answering(), self.pool.acquire() as connection:
            known = await table.known(connection, [file.content_hash for file in files])
        return [file for file in files if file.content_hash not in known]

    async def spoken_for(self, file: StoredFile, at: datetime) -> bool:
        """Whether the log itself knows of somebody who refers to it, or did until a moment ago.

        The first means that the tables lack a row. The second is the cleanup role's, after its grace.
        """
        facts = (await self.events.load(references(asset_id(file.content_hash)))).events
        ready = {r.event.job_id for r in facts if isinstance(r.event, AssetReady)}
        gone = {r.event.job_id: r.meta.at for r in facts if isinstance(r.event, AssetGivenUp)}
        if ready - gone.keys():
            log.error("the tables lack an asset: rebuild them", extra={"hash": file.content_hash})
            return True
        grace = timedelta(seconds=self.settings.orphan_grace_seconds)
        return any(at - since < grace for since in gone.values())


def _add(claims: dict[tuple[UUID, UUID], tuple[str, Claim]], reason: str, found: Sequence[Claim]) -> None:
    for claim in found:
        claims.setdefault((claim.asset_id, claim.job_id), (reason, claim))


def fault_of(row: Row, found: str) -> AssetLost | AssetDamaged:
    """What to report of a row whose file is not what it should be."""
    kind = AssetLost if found == Store.NO_FILE else AssetDamaged
    return kind(
        asset_id=row.id,
        asset_type=row.asset_type,
        content_hash=row.content_hash,
        format=row.format,
        file_size_bytes=row.file_size_bytes,
        found=found,
        stored_seq=row.seq,
    )


def tallied(claims: Iterable[tuple[str, Claim]]) -> dict[str, Tally]:
    """How much each name stands for, every asset counted once."""
    seen: set[tuple[str, UUID]] = set()
    found: dict[str, Tally] = {}
    for name, claim in claims:
        if (name, claim.asset_id) not in seen:
            seen.add((name, claim.asset_id))
            tally = found.setdefault(name, Tally())
            tally.assets, tally.bytes = tally.assets + 1, tally.bytes + claim.size_bytes
    return found
