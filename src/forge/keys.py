"""Acts on API keys: create, revoke, list. They need the log alone, so they work while Postgres is down."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import aclosing
from datetime import UTC, datetime

from forge import chronicle
from forge.domain.keys import Key, Keyring, created, is_id
from forge.errors import Conflict, LogUnavailable, NotFound
from forge.events.catalogue import Event
from forge.events.envelope import Meta, Recorded, event_id
from forge.events.keys import KeyRevoked
from forge.eventstore import Draft, EventStore
from forge.telemetry import traceparent
from forge.topology import ALL_KEYS
from forge.topology import key as facts_of

_TRIES = 5
_LIST_SECONDS = 10.0


class Keys:
    """Creates and revokes keys, as events."""

    def __init__(self, store: EventStore) -> None:
        self.store = store

    async def create(
        self, *, role: str, user: str, label: str | None, actor: str, within: float = 10.0
    ) -> tuple[str, Recorded]:
        """A new key's text, which is kept nowhere, and the event that tells of it.

        Raises:
            Invalid: names every field that is wrong.
            LogUnavailable: whether it was created is unknown; nobody knows its text, so it opens nothing.
        """
        text, event = created(secrets.token_hex(8), secrets.token_hex(32), role, user, label)
        return text, await self._append(event, event.key_id, "create", 0, actor, within)

    async def revoke(self, key_id: str, *, actor: str, within: float = 10.0) -> Recorded:
        """The event by which a key was revoked, now or before.

        Raises:
            NotFound: there never was such a key.
            LogUnavailable: whether it is revoked is unknown; say it again.
        """
        if not is_id(key_id):
            raise NotFound(f"there is no key {key_id[:40]}")
        for _ in range(_TRIES):
            facts = await self.store.load(facts_of(key_id), timeout=min(within, 2.0))
            if not facts.events:
                raise NotFound(f"there is no key {key_id}")
            said = next((r for r in facts.events if isinstance(r.event, KeyRevoked)), None)
            if said is not None:
                return said
            try:
                return await self._append(
                    KeyRevoked(key_id=key_id), key_id, "revoke", facts.seq, actor, within
                )
            except Conflict:
                continue
        raise LogUnavailable(f"key {key_id} changes faster than can be decided")

    async def all(self) -> list[Key]:
        """Every key there ever was, oldest first.

        Raises:
            LogUnavailable: it took too long.
        """
        ring = Keyring()
        try:
            async with (
                asyncio.timeout(_LIST_SECONDS),
                aclosing(chronicle.records(self.store, 1, (ALL_KEYS,))) as batches,
            ):
                async for batch in batches:
                    for record in batch.records:
                        ring.apply(record)
                    if batch.caught_up:
                        break
        except TimeoutError:
            raise LogUnavailable("reading the keys took too long") from None
        return list(ring.keys.values())

    async def _append(
        self, event: Event, key_id: str, act: str, expected: int, actor: str, within: float
    ) -> Recorded:
        command = f"key/{key_id}/{act}/{actor}"
        meta = Meta(
            id=event_id(command, 0),
            at=datetime.now(UTC),
            actor=actor,
            correlation=key_id,
            causation=command,
            traceparent=traceparent(),
        )
        [record] = await self.store.append([Draft(event, meta, facts_of(key_id), expected)], within=within)
        return record
