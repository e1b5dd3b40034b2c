"""Clean-ups over HTTP: what would go, and letting it go."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import msgspec
from litestar import Request, Response, Router, post

from forge.api import edge, openapi
from forge.api.auth import Caller, caller_of
from forge.api.parts import Parts, parts_of
from forge.api.problems import documented
from forge.api.schemas import CleanUp, CleanupCount, CleanupView
from forge.domain.ids import new_id
from forge.domain.retention import DAMAGED, EVICTED, EXPIRED, LOST, OF_FILES, OLD, ORPHANED, TEMPORARY
from forge.errors import Forbidden, Unavailable
from forge.events.cleanup import CleanupRequested
from forge.plans import Plan, Tally, Wish

Asked = Request[Any, Any, Any]

_WASTE = (EXPIRED, LOST, DAMAGED, ORPHANED, TEMPORARY)
_PLAN_SECONDS = 10.0

_decoder = msgspec.json.Decoder(CleanUp)


@post(
    "/assets/cleanup",
    status_code=202,
    responses=documented(400, 413, 415, 422),
    operation_id="cleanUpAssets",
    **openapi.taking(CleanUp),
)
async def clean_up(request: Asked) -> Response[CleanupView]:
    """Let go of what has expired, is old, or does not belong together. First see what would go (`dry_run`).
    Where that is much (`held`), nothing goes until `confirm` repeats the number of assets that were shown."""
    parts, caller = parts_of(request), caller_of(request)
    asked = await edge.body(request, _decoder)
    wish = _wish(asked, caller)
    now = await parts.retention.planner.now()
    if asked.older_than_seconds is not None:
        wish = msgspec.structs.replace(wish, before=now - timedelta(seconds=asked.older_than_seconds))
    try:
        async with asyncio.timeout(_PLAN_SECONDS):
            plan = await parts.retention.planner.plan(wish, now)
    except TimeoutError:
        raise Unavailable(
            "looking through the library took too long; `forge cleanup` takes its time"
        ) from None
    held = plan.held and (asked.confirm is None or asked.confirm < plan.assets)
    view = _view(plan, dry_run=asked.dry_run, held=held)
    if not asked.dry_run and not held and view.by_reason:
        view = await _requested(parts, caller, plan, view)
    return Response(view, status_code=202, headers={} if view.seq is None else {"x-forge-seq": str(view.seq)})


def _wish(asked: CleanUp, caller: Caller) -> Wish:
    """What a request is for; without reasons: what is nobody's use, and what is old if an age is given.

    Raises:
        Forbidden: only who sees everything may see to the volume, or make room in it.
        Invalid: old without an age.
    """
    if asked.reasons is None:
        everything = _WASTE if asked.older_than_seconds is None else (*_WASTE, OLD)
        reasons = tuple(r for r in everything if caller.sees_all or r not in OF_FILES)
    else:
        reasons = tuple(dict.fromkeys(asked.reasons))
        others = set(reasons) & {*OF_FILES, EVICTED}
        if others and not caller.sees_all:
            raise Forbidden(f"{', '.join(sorted(others))}: an operator's to ask for")
    if OLD in reasons and asked.older_than_seconds is None:
        raise edge.invalid("older_than_seconds", "is needed to tell what is old")
    return Wish(reasons=reasons, asset_type=edge.name("asset_type", asked.asset_type), owner=caller.tenant)


async def _requested(parts: Parts, caller: Caller, plan: Plan, view: CleanupView) -> CleanupView:
    asked = CleanupRequested(
        request_id=new_id(),
        reasons=list(plan.wish.reasons),
        asked_at=plan.at,
        assets=plan.assets,
        size_bytes=plan.bytes,
        executor="cleanup",
        before=plan.wish.before,
        asset_type=plan.wish.asset_type,
        owner=plan.wish.owner,
    )
    seq = await parts.retention.requested(asked, actor=caller.actor)
    parts.live.wrote(seq)
    return msgspec.structs.replace(view, id=asked.request_id, seq=seq)


def _view(plan: Plan, *, dry_run: bool, held: bool) -> CleanupView:
    return CleanupView(
        dry_run=dry_run,
        held=held,
        assets=plan.assets,
        bytes=plan.bytes,
        of=plan.of,
        by_reason=_counts(plan.by_reason()),
        by_type=_counts(plan.by_type()),
    )


def _counts(tallies: dict[str, Tally]) -> dict[str, CleanupCount]:
    return {name: CleanupCount(assets=tally.assets, bytes=tally.bytes) for name, tally in tallies.items()}


router = Router("/", route_handlers=[clean_up], tags=["assets"])
