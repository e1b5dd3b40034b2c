"""Acts on the library of stored pictures: count a job's pictures in, lend them again, give references up.

What a session and a character hold stands in the newest entry of their ledgers in the log
(:mod:`forge.domain.assets`), so both limits are exact with any number of workers: an append names the entry
that its decision saw, and whoever comes second reads again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from forge.domain import assets as rules
from forge.errors import Conflict, LogUnavailable, NotFound, Pinned
from forge.events.assets import (
    AssetGivenUp,
    AssetPin,
    AssetPinned,
    AssetReady,
    AssetStored,
    AssetUnpinned,
    SessionReleased,
)
from forge.events.jobs import JobCompleted, JobSubmitted
from forge.eventstore import Boundary, Entry, EventStore, drafts_of
from forge.store import Store
from forge.topology import character, character_or_pins, reference, reference_or_pins, session

_TRIES = 20


class Shelf:
    """Pictures that were drawn before, to be lent to another job with the same recipe (M7)."""

    def __init__(self, store: EventStore, blobs: Store, ttl_of: Callable[[str], int]) -> None:
        self.store, self.blobs, self.ttl_of = store, blobs, ttl_of

    async def recall(self, recipe: str, drawn_at: int, *, timeout: float = 2.0) -> list[AssetStored]:
        """The pictures of the job that was completed there, renewed so that no clean-up takes them meanwhile.

        None of them when any is gone, or the event is not the completion of such a job.

        Raises:
            LogUnavailable: no answer.
            StoreFailed: the volume refuses.
        """
        done = await self.store.at(drawn_at, timeout=timeout)
        if done is None or not isinstance(done.event, JobCompleted) or done.event.recipe != recipe:
            return []
        count = len(done.event.assets)
        where = (drawn_at - 2 * count + 2 * nth for nth in range(count))
        records = await asyncio.gather(*(self.store.at(seq, timeout=timeout) for seq in where))
        pictures = [r.event for r in records if r is not None and isinstance(r.event, AssetStored)]
        renewed = [await self.blobs.renew(p.content_hash, p.format) for p in pictures]
        return pictures if len(pictures) == count and all(renewed) else []

    def lent(self, picture: AssetStored, asked: JobSubmitted, now: datetime) -> AssetStored:
        """A recalled picture as what this job gets."""
        ttl = asked.ttl_seconds or self.ttl_of(asked.asset_type)
        return rules.lent(picture, asked, now, timedelta(seconds=ttl))


class Held(msgspec.Struct, frozen=True):
    """What a session (bytes) or a character (assets) holds; ``seq`` is its newest entry, 0 for none."""

    amount: int = 0
    seq: int = 0


NOTHING = Held()


class Library:
    """Counts pictures in and out, over one log."""

    def __init__(self, store: EventStore) -> None:
        self.store = store

    async def held_by_session(self, session_id: str | None, *, timeout: float = 2.0) -> Held:
        """The session's bytes."""
        if session_id is None:
            return NOTHING
        last = await self.store.last(session(session_id), timeout=timeout)
        if last is None:
            return NOTHING
        assert isinstance(last.event, AssetStored | SessionReleased)
        return Held(last.event.session_bytes or 0, last.seq)

    async def held_by_character(self, character_id: str | None, *, timeout: float = 2.0) -> Held:
        """The character's assets."""
        if character_id is None:
            return NOTHING
        last = await self.store.last(character(character_id), timeout=timeout)
        if last is None:
            return NOTHING
        assert isinstance(last.event, AssetReady | AssetGivenUp)
        return Held(last.event.character_assets or 0, last.seq)

    async def entries(self, pictures: Sequence[AssetStored]) -> list[Entry]:
        """What is to be written, together with a job's completion, to count its pictures in.

        Raises:
            LimitReached: session or character would hold too much.
            LogUnavailable: no answer.
        """
        session_id, character_id = pictures[0].session_id, pictures[0].character_id
        bytes_, assets = await asyncio.gather(
            self.held_by_session(session_id), self.held_by_character(character_id)
        )
        entries = [Entry(event) for event in rules.count_in(pictures, bytes_.amount, assets.amount)]
        # a ready follows its stored picture, and the first of each boundary carries what was seen of it
        if session_id is not None:
            entries[0] = Entry(entries[0].event, session(session_id), bytes_.seq)
        if character_id is not None:
            entries[1] = Entry(entries[1].event, character(character_id), assets.seq)
        return entries

    async def give_up(
        self, gone: AssetGivenUp, *, actor: str, within: float = 10.0, unless_pinned: bool = False
    ) -> int:
        """Record that a job's references to an asset are gone; said again, it is the same event.

        Returns the sequence of the event that says so. With ``unless_pinned`` a pin wins, also one that is
        set at the same moment: the boundary then covers pins, too.

        Raises:
            Pinned: the reference is pinned, and ``unless_pinned``.
            LogUnavailable: whether it is recorded is unknown.
        """
        # a filter over pins is wider: only who heeds them pays for it
        of_reference = reference_or_pins if unless_pinned else reference
        of_character = character_or_pins if unless_pinned else character
        where = of_reference(gone.character_id, gone.asset_type, gone.asset_id, gone.job_id)
        patience: dict[str, Any] = {"timeout": min(within, 2.0)}
        for _ in range(_TRIES):
            # the character first: whatever happens to the reference from here on moves it, too
            moved = await self._newest(of_character, gone.character_id, **patience)
            assets = await self.held_by_character(gone.character_id, **patience)
            bytes_ = await self.held_by_session(gone.session_id, **patience)
            mine = await self.store.load(where, **patience)
            before = next((r.seq for r in mine.events if isinstance(r.event, AssetGivenUp)), None)
            if before is not None:
                return before
            if _pinned(mine):
                raise Pinned(f"asset {gone.asset_id} is pinned")
            said, *released = rules.give_back(gone, bytes_.amount, assets.amount)
            if gone.character_id is None:
                entries = [Entry(said, where, mine.seq)]
            else:
                entries = [Entry(said, of_character(gone.character_id), moved)]
            entries += [Entry(event, session(gone.session_id), bytes_.seq) for event in released]
            drafts = drafts_of(entries, f"{gone.asset_id}/{gone.job_id}/give-up", actor, gone.job_id)
            try:
                return (await self.store.append(drafts, within=within))[0].seq
            except Conflict:
                continue
        raise LogUnavailable(f"asset {gone.asset_id} changes faster than can be decided")

    async def pin(self, wanted: AssetPinned | AssetUnpinned, *, actor: str, within: float = 10.0) -> int:
        """Pin a job's reference to an asset, or let it go; what is so already stays so.

        Returns the sequence since when it is so.

        Raises:
            NotFound: the reference was given up.
            LogUnavailable: whether it is recorded is unknown.
        """
        where = reference_or_pins(wanted.character_id, wanted.asset_type, wanted.asset_id, wanted.job_id)
        for _ in range(_TRIES):
            mine = await self.store.load(where, timeout=min(within, 2.0))
            if any(isinstance(r.event, AssetGivenUp) for r in mine.events):
                raise NotFound(f"there is no asset {wanted.asset_id}")
            if _pinned(mine) is isinstance(wanted, AssetPinned):
                return mine.seq
            # named for what it follows: pinning again after unpinning is another act
            command = f"{wanted.asset_id}/{wanted.job_id}/pin/{mine.seq}"
            drafts = drafts_of([Entry(wanted, where, mine.seq)], command, actor, wanted.job_id)
            try:
                return (await self.store.append(drafts, within=within))[0].seq
            except Conflict:
                continue
        raise LogUnavailable(f"asset {wanted.asset_id} changes faster than can be decided")

    async def _newest(
        self, filter_of: Callable[[str], str], character_id: str | None, *, timeout: float
    ) -> int:
        if character_id is None:
            return 0
        last = await self.store.last(filter_of(character_id), timeout=timeout)
        return last.seq if last else 0


def _pinned(reference: Boundary) -> bool:
    """Whether the newest word about its being pinned says so."""
    words = [r for r in reference.events if isinstance(r.event, AssetPin)]
    return bool(words) and isinstance(words[-1].event, AssetPinned)
