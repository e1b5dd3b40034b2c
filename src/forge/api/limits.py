"""What the caller may still ask for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from litestar import Request, Router, get
from litestar.params import QueryParameter

from forge.admissions import Admissions
from forge.api import edge
from forge.api.auth import caller_of
from forge.api.parts import Parts, parts_of
from forge.api.problems import documented
from forge.api.schemas import LimitsView, LimitView
from forge.commands import SUBMIT_SECONDS
from forge.domain.limits import MAX_CHARACTER_ASSETS, MAX_RUNNING_JOBS, MAX_SESSION_BYTES
from forge.errors import Limit

Id = Annotated[str | None, QueryParameter(max_length=128)]


@get("/limits", responses=documented(422), operation_id="getLimits")
async def read_limits(
    request: Request[Any, Any, Any], session_id: Id = None, character_id: Id = None
) -> LimitsView:
    """The caller's limits; with a session or a character also theirs."""
    parts, user = parts_of(request), caller_of(request).user
    edge.name("session_id", session_id)
    edge.name("character_id", character_id)
    mine = [view(limit, "user") for limit in parts.admissions.limits(user)]
    theirs = [limit async for limit in _owners(parts, session_id, character_id)]
    return LimitsView(user_id=user, items=[*mine, *theirs, *everybodys(parts.admissions)])


async def _owners(parts: Parts, session_id: str | None, character_id: str | None) -> AsyncIterator[LimitView]:
    if session_id is not None:
        held = await parts.library.held_by_session(session_id, timeout=SUBMIT_SECONDS)
        yield view(Limit("session_bytes", MAX_SESSION_BYTES, held.amount), "session")
    if character_id is not None:
        held = await parts.library.held_by_character(character_id, timeout=SUBMIT_SECONDS)
        yield view(Limit("character_assets", MAX_CHARACTER_ASSETS, held.amount), "character")


def everybodys(admissions: Admissions) -> list[LimitView]:
    """What all users share."""
    line = admissions.line
    return [
        view(Limit("running_jobs", MAX_RUNNING_JOBS, len(line.jobs) - line.pending), "everybody"),
        view(Limit("waiting_jobs", admissions.queue_limit, line.pending), "everybody"),
    ]


def view(limit: Limit, of: str) -> LimitView:
    """A limit as clients see it."""
    return LimitView(
        name=limit.name, of=of, allowed=limit.allowed, used=limit.used, resets_at=limit.resets_at
    )


router = Router("/", route_handlers=[read_limits], tags=["operations"])
