"""API keys over HTTP, for operators: create, list, revoke."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Response, Router, delete, get, post
from litestar.params import FromPath

from forge.api import edge
from forge.api.auth import operator_of
from forge.api.openapi import taking
from forge.api.parts import Parts, parts_of
from forge.api.problems import documented
from forge.api.schemas import CreateKey, KeyCreatedView, KeyList, KeyView
from forge.commands import SUBMIT_SECONDS
from forge.domain.keys import Key
from forge.errors import Unavailable
from forge.events.envelope import Recorded

Asked = Request[Any, Any, Any]

_create = msgspec.json.Decoder(CreateKey)


@post(
    "/keys",
    status_code=201,
    responses=documented(400, 413, 415, 422),
    **taking(CreateKey),
    operation_id="createKey",
)
async def create(request: Asked) -> Response[KeyCreatedView]:
    """Let somebody in. The answer holds the `key` itself, which is kept nowhere and never told again. For
    operators only."""
    parts, caller = parts_of(request), operator_of(request)
    asked = await edge.body(request, _create)
    text, record = await parts.keys.create(
        role=asked.role, user=asked.user_id, label=asked.label, actor=caller.actor, within=SUBMIT_SECONDS
    )
    key = _taken_in(parts, record)
    view = KeyCreatedView(**msgspec.structs.asdict(_view(key)), key=text)
    return Response(view, headers={"location": f"{request.scope['path']}/{key.id}"})


@get("/keys", responses=documented(), operation_id="listKeys")
async def find(request: Asked) -> KeyList:
    """Every key there ever was, oldest first, without the keys of `FORGE_API_KEYS`. For operators only."""
    parts, _ = parts_of(request), operator_of(request)
    if not parts.admissions.caught_up.is_set():
        raise Unavailable("forge is still reading its log and does not know all keys yet")
    return KeyList(items=[_view(key) for key in parts.live.keys.keys.values()])


@delete("/keys/{key_id:str}", status_code=204, responses=documented(404), operation_id="revokeKey")
async def revoke(request: Asked, key_id: FromPath[str]) -> Response[None]:
    """Revoke a key for ever; saying it again does no harm. `X-Forge-Seq` is the event. For operators only."""
    parts, caller = parts_of(request), operator_of(request)
    record = await parts.keys.revoke(key_id, actor=caller.actor, within=SUBMIT_SECONDS)
    _taken_in(parts, record)
    return Response(None, status_code=204, headers={"x-forge-seq": str(record.seq)})


def _taken_in(parts: Parts, record: Recorded) -> Key:
    """The key of an event of one's own, which holds in this process at once."""
    parts.live.keys.apply(record)
    parts.live.wrote(record.seq)
    return parts.live.keys.keys[record.event.key_id]  # type: ignore[attr-defined]  # only keys' events come here


def _view(key: Key) -> KeyView:
    fields = {name: value for name, value in msgspec.structs.asdict(key).items() if name != "digest"}
    return KeyView(**fields)


router = Router("/", route_handlers=[create, find, revoke], tags=["keys"])
