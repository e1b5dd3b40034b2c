"""Keeps the library to what it should hold: lets go what may go.

A :class:`~forge.plans.Plan` is found first, whoever asks: scheduler, cleanup role, API or ``forge cleanup``.
Only what is in it goes. Rows go by events (:class:`forge.library.Library`), files without a row at once; the
file of a row that went is the cleanup role's, after its grace.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from datetime import timedelta
from uuid import UUID

import msgspec

from forge import chronicle
from forge.database import Pool, answering
from forge.domain import retention as rules
from forge.domain.ids import new_id
from forge.domain.retention import EVICTED, ORPHANED, TEMPORARY, Claim, given_up
from forge.errors import Conflict, LogUnavailable, Pinned
from forge.events.assets import AssetDamaged, AssetDeleted, AssetLost
from forge.events.catalogue import Event
from forge.events.cleanup import CleanupFinished, CleanupHeld, CleanupRequested
from forge.events.envelope import Meta, Recorded, event_id
from forge.eventstore import Draft, EventStore
from forge.library import Library
from forge.plans import PAGE, Clock, Plan, Planner, Tally, Wish, fault_of, tallied, utc
from forge.projections import retention as table
from forge.settings import Settings
from forge.store import Store, StoredFile
from forge.topology import ALL_DELETED, subject

log = logging.getLogger("forge.retention")

_AT_ONCE = 8
_TRIES = 20
_HOLD_AGAIN = timedelta(days=1)

Progress = Callable[[int], None]


class Retention:
    """Over one log, one database and one volume; ``planner`` says what may go."""

    def __init__(
        self, events: EventStore, pool: Pool, store: Store, settings: Settings, clock: Clock = utc
    ) -> None:
        self.events, self.pool, self.store, self.settings = events, pool, store, settings
        self.planner = Planner(events, pool, store, settings, clock)
        self.library = Library(events)
        self._scrubbed = ""

    # ---------------------------------------------------------------- carrying out

    async def carry_out(
        self, plan: Plan, *, actor: str, most: int | None = None, progress: Progress | None = None
    ) -> dict[str, Tally]:
        """Let go what the plan says, at most ``most`` assets of it; what went, by reason.

        What was pinned, touched or given up meanwhile stays, or is not counted twice.
        """
        for fault in plan.faults:
            await self.report(fault, actor=actor)
        claims = _first(list(plan.claims.values()), most)
        went: list[tuple[str, Claim]] = []
        for begin in range(0, len(claims), _AT_ONCE):
            some = claims[begin : begin + _AT_ONCE]
            done = await asyncio.gather(*(self._let_go(reason, claim, actor) for reason, claim in some))
            went += [one for one, gone in zip(some, done, strict=True) if gone]
            if progress:
                progress(len(some))
        found = tallied(went)
        if plan.orphans:
            room = None if most is None else max(0, most - len({c.asset_id for _, c in claims}))
            found[ORPHANED] = await self._unlinked(plan, plan.orphans[:room], progress)
        if plan.temporary:
            swept = await asyncio.to_thread(self.planner.swept, self.planner.cutoff(plan.wish, plan.at))
            found[TEMPORARY] = Tally(assets=swept)
        return {reason: tally for reason, tally in found.items() if tally.assets}

    async def _let_go(self, reason: str, claim: Claim, actor: str) -> bool:
        try:
            await self.library.give_up(given_up(claim, reason), actor=actor, unless_pinned=True)
        except Pinned:
            return False
        return True

    async def _unlinked(self, plan: Plan, orphans: Sequence[StoredFile], progress: Progress | None) -> Tally:
        went, cutoff = Tally(), self.planner.cutoff(plan.wish, plan.at)
        for file in orphans:
            if not await self.planner.spoken_for(file, plan.at) and await self.store.remove(
                file.content_hash, file.format, untouched_since=cutoff
            ):
                went.assets, went.bytes = went.assets + 1, went.bytes + file.size_bytes
            if progress:
                progress(1)
        return went

    # ------------------------------------------------------------------- sweeping

    async def sweep(self, *reasons: str, actor: str) -> dict[str, Tally]:
        """Let go what there is for these reasons, unless it is so much that an operator should decide."""
        plan = await self.planner.plan(Wish(reasons=reasons))
        if plan.held:
            for fault in plan.faults:
                await self.report(fault, actor=actor)
            await self.hold(plan, actor=actor)
            return {}
        went = await self.carry_out(plan, actor=actor)
        if ORPHANED in went:  # of these nothing else tells
            await self.finished(went, None, actor=actor)
        return went

    async def make_room(self, crossed_seq: int, used: int, limit: int, *, actor: str) -> dict[str, Tally]:
        """Evict until the volume would be at its target, judged by what crossed the line and by what is now.

        Said again after a crash, it takes what this crossing has evicted already into account.
        """
        already = await self._evicted_since(crossed_seq)
        plan = await self.planner.plan(Wish(reasons=(EVICTED,)))
        need = rules.too_many_bytes(used, limit, self.settings.target_ratio) - already
        plan = _within(plan, need)
        if plan.held:
            await self.hold(plan, actor=actor)
        went = await self.carry_out(plan, actor=actor, most=rules.most(plan.of))
        await self.finished(went, None, actor=actor)
        return went

    async def _evicted_since(self, seq: int) -> int:
        sizes: dict[UUID, int] = {}
        async with aclosing(chronicle.records(self.events, seq + 1, (ALL_DELETED,))) as batches:
            async for batch in batches:
                for record in batch.records:
                    event = record.event
                    if isinstance(event, AssetDeleted) and event.reason == EVICTED:
                        sizes[event.asset_id] = event.file_size_bytes // max(1, event.pictures)
                if batch.caught_up:
                    break
        return sum(sizes.values())

    async def scrub(self, *, actor: str) -> int:
        """Compare some more of what is stored with its hash, and report what differs; the bytes it read."""
        rows = await self.planner.rows(self._scrubbed)
        read = 0
        for row in rows:
            if read >= self.settings.scrub_bytes:
                return read
            self._scrubbed, read = row.content_hash, read + row.file_size_bytes
            if what := await asyncio.to_thread(self.store.fault, row.content_hash, row.format):
                async with answering(), self.pool.acquire() as connection:
                    still = await table.known(connection, [row.content_hash])
                if still:
                    await self.report(fault_of(row, what), actor=actor)
        if len(rows) < PAGE:
            self._scrubbed = ""
        return read

    # -------------------------------------------------------------------- telling

    async def requested(self, asked: CleanupRequested, *, actor: str) -> int:
        """Write down what somebody asked for; the sequence."""
        noted = await self._note(asked, actor)
        assert noted is not None
        return noted.seq

    async def finished(self, went: dict[str, Tally], request_id: UUID | None, *, actor: str) -> None:
        """Write down what a clean-up did, where it did something or was asked for."""
        if went or request_id:
            assets = {reason: tally.assets for reason, tally in went.items()}
            sizes = {reason: tally.bytes for reason, tally in went.items()}
            done = CleanupFinished(assets=assets, size_bytes=sizes, request_id=request_id)
            await self._note(done, actor)

    async def hold(self, plan: Plan, *, actor: str) -> None:
        """Say, once a day while it lasts, that a sweep waits for an operator."""
        held = CleanupHeld(
            reasons=sorted({*plan.by_reason()} - {TEMPORARY}),
            assets=plan.assets,
            size_bytes=plan.bytes,
            of=plan.of,
        )
        log.error("a clean-up waits for an operator: forge cleanup --dry-run", extra={"assets": held.assets})
        await self._note(held, actor, unless=lambda last: plan.at - last.meta.at <= _HOLD_AGAIN)

    async def report(self, fault: AssetLost | AssetDamaged, *, actor: str) -> None:
        """Write down that a file is not what it should be, once."""
        if await self._note(fault, actor, unless=lambda last: last.seq >= fault.stored_seq):
            what = {"asset": str(fault.asset_id), "content_hash": fault.content_hash, "found": fault.found}
            log.error("an asset's file is not there as stored", extra=what)

    async def _note(
        self, event: Event, actor: str, *, unless: Callable[[Recorded], bool] = lambda _: False
    ) -> Recorded | None:
        """Write an event down, ``unless`` the newest of its subject makes that needless, whoever wrote it."""
        where, id_ = subject(event), event_id(str(new_id()), 0)
        for _ in range(_TRIES):
            last = await self.events.last(where)
            if last is not None and unless(last):
                return None
            meta = Meta(id=id_, at=utc(), actor=actor, correlation=str(id_))
            with suppress(Conflict):
                draft = Draft(event, meta, where, last.seq if last else 0)
                return (await self.events.append([draft]))[0]
        raise LogUnavailable(f"{where} changes faster than can be written")


def _first(claims: list[tuple[str, Claim]], most: int | None) -> list[tuple[str, Claim]]:
    """The claims on the first so many assets, each asset whole."""
    assets = list(dict.fromkeys(claim.asset_id for _, claim in claims))
    kept = set(assets[:most])
    return [(reason, claim) for reason, claim in claims if claim.asset_id in kept]


def _within(plan: Plan, bytes_: int) -> Plan:
    """As much of the plan, from its front, as frees so many bytes."""
    kept: Counter[UUID] = Counter()
    for _, claim in plan.claims.values():
        if claim.asset_id not in kept and kept.total() >= bytes_:
            break
        kept[claim.asset_id] = claim.size_bytes
    claims = {key: value for key, value in plan.claims.items() if key[0] in kept}
    return msgspec.structs.replace(plan, claims=claims)
