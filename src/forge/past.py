"""``forge at``: the queue, the limits or the library as they were, told by the log alone.

The log is read from its first event to the one that was the newest, through the very folds and projections
that the live system uses; what they make is shown as the API shows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from datetime import datetime
from typing import Any, Literal

import msgspec

from forge import chronicle, closed, database
from forge.admissions import Admissions
from forge.api.limits import everybodys, view
from forge.api.places import Places
from forge.api.schemas import AssetPage, LimitsView, QueuePage
from forge.api.views import asset_of_row, job_of_row
from forge.broker import connect
from forge.credentials import OPERATOR, login
from forge.domain.admission import Balances
from forge.domain.dispatch import Line
from forge.domain.jobs import Status
from forge.domain.limits import MAX_CHARACTER_ASSETS, MAX_SESSION_BYTES
from forge.errors import FieldError, Invalid, Limit
from forge.events.envelope import Recorded
from forge.eventstore import EventStore
from forge.projections import asset_lists, inventory
from forge.projections import queue as jobs
from forge.projections.projection import Projection, advance
from forge.projections.throwaway import hide
from forge.settings import Settings

What = Literal["queue", "limits", "inventory"]
Progress = Callable[[int, int], None]

_ALL = 2**62
"""Sessions and characters to remember: nobody can be asked about one that was forgotten."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, understood: a moment or a sequence, and which part of the state; None: any.

    Without a user it is the operator's view, of everybody.
    """

    when: datetime | int
    what: What
    user: str | None = None
    statuses: tuple[Status, ...] = ()
    job_type: str | None = None
    asset_type: str | None = None
    session_id: str | None = None
    character_id: str | None = None
    limit: int = 50


class AsOf(msgspec.Struct, frozen=True, kw_only=True):
    """Of which event the state is, what time it was, and how many events were read for it."""

    seq: int
    at: datetime | None
    events: int


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A past state, in the shape the API has for it; of everybody's limits one for each active user."""

    as_of: AsOf
    state: QueuePage | AssetPage | LimitsView | list[LimitsView]

    def as_json(self) -> dict[str, Any]:
        state = msgspec.to_builtins(self.state)
        named = state if isinstance(state, dict) else {"items": state}
        return {"as_of": msgspec.to_builtins(self.as_of), **named}


async def tell(settings: Settings, asked: Asked, progress: Progress = lambda done, of: None) -> Told:
    """The state as of a moment or a sequence.

    Raises:
        Invalid: the log has no such event yet.
        LogUnavailable, LogUnreadable, DatabaseUnavailable: it cannot be read. Limits need no database.
    """
    async with AsyncExitStack() as stack:
        nc = await connect(settings.nats_url, "at", login(settings.nats_passwords_dir, OPERATOR))
        stack.push_async_callback(nc.close)
        before = await stack.enter_async_context(closed.found(nc, settings.postgres_dsn))
        fold = _Fold(EventStore(nc, before=before), settings)
        projections = {"queue": [jobs.queue], "inventory": [inventory.inventory], "limits": []}[asked.what]
        connection = None
        if projections:
            pool = await stack.enter_async_context(
                database.opened(settings.postgres_dsn, most=1, command_timeout=600.0)
            )
            await stack.enter_async_context(database.answering())
            connection = await stack.enter_async_context(pool.acquire())
            await hide(connection, projections)
        last = await _last(fold.store, asked.when)
        await fold.read(last, connection, projections, progress)
        then = asked.when if isinstance(asked.when, datetime) else fold.at
        as_of = AsOf(seq=last, at=then, events=fold.events)
        match asked.what:
            case "queue":
                return Told(as_of=as_of, state=await _queue(connection, fold, asked, then))
            case "inventory":
                return Told(as_of=as_of, state=await _inventory(connection, asked))
            case "limits":
                return Told(as_of=as_of, state=_limits(fold, asked, then))


async def _last(store: EventStore, when: datetime | int) -> int:
    """The newest event there was then."""
    head = await store.head()
    if isinstance(when, datetime):
        later = await store.since(when)
        return head if later is None else later.seq - 1
    if when > head:
        raise Invalid([FieldError("TIME", f"the log ends at seq:{head}")])
    return when


class _Fold:
    """What is folded in memory: the line of jobs, and what each has been granted."""

    def __init__(self, store: EventStore, settings: Settings) -> None:
        self.store = store
        self.admissions = Admissions(
            store, Line(), queue_limit=settings.queue_limit, rate_per_hour=settings.rate_per_hour
        )
        self.admissions.balances = Balances(_ALL)
        self.users: set[str] = set()
        self.events = 0
        self.at: datetime | None = None

    async def read(
        self,
        last: int,
        connection: database.Connection | None,
        projections: list[Projection],
        progress: Progress,
    ) -> None:
        """Take in the log up to an event."""
        if not last:
            return
        positions = {projection.name: 0 for projection in projections}
        async with aclosing(chronicle.records(self.store)) as batches:
            async for batch in batches:
                records = [record for record in batch.records if record.seq <= last]
                for record in records:
                    self._take(record)
                if connection is not None and records:
                    positions = await advance(connection, projections, records, positions)
                progress(self.events, last)
                if batch.caught_up or (batch.records and batch.records[-1].seq >= last):
                    return

    def _take(self, record: Recorded) -> None:
        self.events, self.at = self.events + 1, record.meta.at
        self.admissions.apply(record)
        user = getattr(record.event, "user_id", None)
        if user is not None:
            self.users.add(user)


async def _queue(
    connection: database.Connection | None, fold: _Fold, asked: Asked, then: datetime | None
) -> QueuePage:
    assert connection is not None
    statuses = asked.statuses or (Status.PENDING, Status.RUNNING)
    wanted = jobs.Wanted(statuses=statuses, job_type=asked.job_type)
    rows = await jobs.page(connection, asked.user, wanted, None, asked.limit)
    places = Places(fold.admissions.line, lambda: then) if then is not None else None
    counts = await jobs.counts(connection, asked.user)
    return QueuePage(items=[job_of_row(row, places) for row in rows], next_cursor=None, counts=counts)


async def _inventory(connection: database.Connection | None, asked: Asked) -> AssetPage:
    assert connection is not None
    wanted = asset_lists.Wanted(
        asset_type=asked.asset_type, session_id=asked.session_id, character_id=asked.character_id
    )
    rows = await asset_lists.page(connection, asked.user, wanted, "-created_at", None, asked.limit)
    estimate = await asset_lists.estimate(connection, asked.user, wanted)
    return AssetPage(items=[asset_of_row(row) for row in rows], next_cursor=None, total_estimate=estimate)


def _limits(fold: _Fold, asked: Asked, then: datetime | None) -> LimitsView | list[LimitsView]:
    """One user's, or of each who had anything in use."""
    if asked.user is not None:
        return _limits_of(fold, asked, asked.user, then)
    all_of_them = (_limits_of(fold, asked, user, then) for user in sorted(fold.users))
    return [
        limits for limits in all_of_them if any(limit.used for limit in limits.items if limit.of == "user")
    ]


def _limits_of(fold: _Fold, asked: Asked, user: str, then: datetime | None) -> LimitsView:
    admissions = fold.admissions
    items = [view(limit, "user") for limit in admissions.limits(user, then)]
    if asked.session_id is not None:
        held = admissions.balances.session(asked.session_id) or 0
        items.append(view(Limit("session_bytes", MAX_SESSION_BYTES, held), "session"))
    if asked.character_id is not None:
        held = admissions.balances.character(asked.character_id) or 0
        items.append(view(Limit("character_assets", MAX_CHARACTER_ASSETS, held), "character"))
    return LimitsView(user_id=user, items=[*items, *everybodys(admissions)])


def run(settings: Settings, asked: Asked, progress: Progress) -> Told:
    """:func:`tell`, from a command."""
    return asyncio.run(tell(settings, asked, progress))
