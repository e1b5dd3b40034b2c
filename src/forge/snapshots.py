"""Snapshots: what a fold of the log knew at one event, kept in Postgres so that a process starts sooner.

A snapshot is a cache. One that is of another log, of other rules or newer than the log is not used, and
whoever finds none reads the log from its first event, as it does without Postgres. What decides who may enter
is never in one: keys are read from the log.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from functools import cache
from importlib.resources import files
from typing import Generic, TypeVar

import msgspec

from forge.database import Pool, answering
from forge.errors import DatabaseUnavailable, LogUnavailable
from forge.eventstore import EventStore

log = logging.getLogger("forge.snapshots")

_FIND_SECONDS = 5.0
_RULES = ("forge.domain", "forge.events")

_FIND = "select seq, event, state from forge_log.snapshot where of = $1 and rules = $2"
_KEEP = """
insert into forge_log.snapshot as there (of, rules, seq, event, state) values ($1, $2, $3, $4, $5)
on conflict (of, rules) do update
set seq = excluded.seq, event = excluded.event, state = excluded.state, at = excluded.at
where there.seq < excluded.seq or there.at < excluded.at - interval '1 hour'
"""
_FORGET = "delete from forge_log.snapshot where at < now() - interval '30 days'"

S = TypeVar("S")


class Snapshot(msgspec.Struct, Generic[S], frozen=True):
    """A fold's state when it had taken in the events through ``seq``."""

    seq: int
    state: S


class Snapshots(Generic[S]):
    """The snapshots of one kind of fold, ``of``; one is taken every so many events, none with 0."""

    def __init__(self, pool: Pool, store: EventStore, of: str, kind: type[S], every: int) -> None:
        self.pool, self.store, self.of, self.every = pool, store, of, every
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._last = 0
        self._keeping: asyncio.Task[None] | None = None

    async def newest(self) -> Snapshot[S] | None:
        """The newest that fits this log and these rules; None where none does, or nobody answers."""
        if not self.every:
            return None
        try:
            async with answering(), asyncio.timeout(_FIND_SECONDS):
                row = await self.pool.fetchrow(_FIND, self.of, rules())
            if row is None or not await self._is_of_this_log(row["seq"], row["event"]):
                return None
            found = Snapshot(row["seq"], self._decoder.decode(row["state"]))
        except (DatabaseUnavailable, LogUnavailable) as error:
            log.warning("reading the log from its first event", extra={"error": error.detail})
            return None
        except msgspec.MsgspecError as error:
            log.warning("a snapshot cannot be read", extra={"of": self.of, "error": str(error)})
            return None
        self._last = found.seq
        log.info("beginning at a snapshot", extra={"of": self.of, "seq": found.seq})
        return found

    def due(self, seq: int) -> bool:
        """Whether it is time for the next one."""
        return 0 < self.every <= seq - self._last and self._keeping is None

    def take(self, seq: int, event: str, state: S) -> None:
        """Keep a state, beside whatever else is done; ``event`` is the id of the event at ``seq``."""
        self._last = seq
        self._keeping = asyncio.create_task(self._keep(seq, event, msgspec.msgpack.encode(state)))

    async def _keep(self, seq: int, event: str, state: bytes) -> None:
        try:
            async with answering():
                await self.pool.execute(_KEEP, self.of, rules(), seq, event, state)
                await self.pool.execute(_FORGET)
            log.info("snapshot", extra={"of": self.of, "seq": seq, "bytes": len(state)})
        except DatabaseUnavailable as error:
            log.warning("no snapshot was kept", extra={"of": self.of, "error": error.detail})
        finally:
            self._keeping = None

    async def _is_of_this_log(self, seq: int, event: str) -> bool:
        there = await self.store.at(seq)
        return there is not None and str(there.meta.id) == event


@cache
def rules() -> bytes:
    """A hash of the code that folds: a state that other code has made is no good."""
    made = hashlib.sha256()
    for package in _RULES:
        for file in sorted(files(package).iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                made.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return made.digest()
