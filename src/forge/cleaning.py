"""``forge cleanup``: shows what would go, lets it go, says what went; over log, database and volume."""

from __future__ import annotations

import asyncio
import getpass
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from forge import closed, database
from forge.bootstrap import opened_store
from forge.broker import connect
from forge.credentials import OPERATOR, login
from forge.domain.ids import new_id
from forge.domain.retention import DAMAGED, EXPIRED, LOST, OLD, ORPHANED, TEMPORARY
from forge.events.cleanup import CleanupRequested
from forge.eventstore import EventStore
from forge.plans import Plan, Tally, Wish
from forge.retention import Retention
from forge.settings import Settings

HELD = 1
"""Exit status when it is so much that an operator has to say ``--yes``."""

_WASTE = (EXPIRED, LOST, DAMAGED, ORPHANED, TEMPORARY)
_MEANING = {
    "expired": "past their time",
    "old": "older than was asked for",
    "evicted": "least recently used, to make room",
    "lost": "a row without its file",
    "damaged": "the file is not what was stored",
    "orphaned": "files without a row",
    "temporary": "working files, thumbnails and folders of nobody",
}


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, understood."""

    reasons: tuple[str, ...] = ()
    older_than: int | None = None
    asset_type: str | None = None
    dry_run: bool = False
    yes: bool = False


def clean(settings: Settings, asked: Asked, *, as_json: bool) -> int:
    """Do it; the exit status.

    Raises:
        ForgeError: a server does not answer, or nothing may be deleted now.
    """
    return asyncio.run(_clean(settings, asked, _Voice(as_json)))


async def _clean(settings: Settings, asked: Asked, voice: _Voice) -> int:
    async with AsyncExitStack() as stack:
        nc = await connect(settings.nats_url, "cleanup", login(settings.nats_passwords_dir, OPERATOR))
        stack.push_async_callback(nc.close)
        before = await stack.enter_async_context(closed.found(nc, settings.postgres_dsn))
        events = EventStore(nc, before=before)
        store = await opened_store(settings, events)
        pool = await stack.enter_async_context(database.opened(settings.postgres_dsn, command_timeout=60.0))
        retention = Retention(events, pool, store, settings)
        plan = await _plan(retention, asked)
        held = plan.held and not asked.yes
        voice.plan(plan, held=held, dry_run=asked.dry_run)
        if asked.dry_run or held or not plan.by_reason():
            voice.end({})
            return HELD if held and not asked.dry_run else 0
        voice.end(await _carried_out(retention, plan, voice))
        return 0


async def _plan(retention: Retention, asked: Asked) -> Plan:
    now = await retention.planner.now()
    before = None if asked.older_than is None else now - timedelta(seconds=asked.older_than)
    reasons = asked.reasons or (_WASTE if before is None else (*_WASTE, OLD))
    return await retention.planner.plan(
        Wish(reasons=reasons, asset_type=asked.asset_type, before=before), now
    )


async def _carried_out(retention: Retention, plan: Plan, voice: _Voice) -> dict[str, Tally]:
    """Exactly this plan: who asked is written down first, what went afterwards."""
    actor = f"operator:{getpass.getuser()}@cleanup"
    wish = plan.wish
    request = CleanupRequested(
        request_id=new_id(),
        reasons=list(wish.reasons),
        asked_at=plan.at,
        assets=plan.assets,
        size_bytes=plan.bytes,
        executor="command",
        before=wish.before,
        asset_type=wish.asset_type,
    )
    await retention.requested(request, actor=actor)
    with voice.progress(len(plan.claims) + len(plan.orphans)) as advance:
        went = await retention.carry_out(plan, actor=actor, progress=advance)
    await retention.finished(went, request.request_id, actor=actor)
    return went


class _Voice:
    """How it is told: a table and a bar for people, one object for programs."""

    def __init__(self, as_json: bool) -> None:
        self.as_json, self.said = as_json, dict[str, Any]()
        self.console = Console(stderr=as_json, highlight=False, soft_wrap=True)

    def plan(self, plan: Plan, *, held: bool, dry_run: bool) -> None:
        by_reason, by_type = plan.by_reason(), plan.by_type()
        self.said = {
            "dry_run": dry_run,
            "held": held,
            "assets": plan.assets,
            "bytes": plan.bytes,
            "of": plan.of,
            "by_reason": by_reason,
            "by_type": by_type,
        }
        if self.as_json:
            return
        if not by_reason:
            self.console.print(f"Nothing to clean up among {plan.of} assets.")
            return
        table = Table("reason", "what", _right("assets"), _right("bytes"), box=None)
        for reason, tally in by_reason.items():
            table.add_row(reason, _MEANING[reason], str(tally.assets), f"{tally.bytes:,}")
        for type_, tally in by_type.items():
            table.add_row("", f"of type {type_}", str(tally.assets), f"{tally.bytes:,}", style="dim")
        self.console.print(table)
        if held:
            self.console.print(
                f"{plan.assets} of {plan.of} assets is much: nothing goes without --yes.", style="bold"
            )
        elif dry_run:
            self.console.print("A dry run: nothing went.")

    def progress(self, of: int) -> _Bar:
        return _Bar(self.console, of)

    def end(self, went: dict[str, Tally]) -> None:
        if self.as_json:
            text = msgspec.json.encode({**self.said, "went": went}).decode()
            Console(highlight=False, soft_wrap=True).print(text, markup=False)
        elif went:
            told = ", ".join(f"{tally.assets} {reason}" for reason, tally in went.items())
            self.console.print(f"Went: {told}. Files of deleted assets follow after their grace.")


class _Bar:
    """A progress bar where somebody looks."""

    def __init__(self, console: Console, of: int) -> None:
        columns = (TextColumn("cleaning up"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=of)

    def __enter__(self) -> Any:
        self.bar.start()
        return lambda count: self.bar.advance(self.task, count)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def _right(header: str) -> Any:
    from rich.table import Column

    return Column(header, justify="right")
