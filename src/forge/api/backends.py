"""Which ComfyUI draws now: heard from the workers, who are the ones that know."""

from __future__ import annotations

import logging
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from litestar import Request, Response, Router, get

from forge.api.auth import caller_of
from forge.api.problems import documented

if TYPE_CHECKING:
    from nats.aio.msg import Msg

log = logging.getLogger("forge.live")

STALE_SECONDS = 3.0
"""A worker that said nothing for so long is gone, or its words do not arrive."""

State = Literal["preferred", "fallback", "none", "unknown"]


class _Backend(msgspec.Struct, frozen=True):
    url: str
    healthy: bool
    preferred: bool
    reason: str
    since: datetime
    version: str | None = None
    queue_remaining: int | None = None


class _Heard(msgspec.Struct, frozen=True):
    """What a worker publishes about the backends, preferred first."""

    worker: str
    backends: list[_Backend]


_heard = msgspec.json.Decoder(_Heard)


class Backends:
    """The latest word of every worker that still speaks."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, list[_Backend]]] = {}

    async def hear(self, message: Msg) -> None:
        """Take note of what a worker published."""
        try:
            heard = _heard.decode(message.data)
        except msgspec.DecodeError as error:
            log.warning("backends cannot be read", extra={"reason": str(error)})
            return
        self._latest[heard.worker] = time.monotonic(), heard.backends
        self._forget_the_silent()

    def now(self) -> list[_Backend]:
        """The backends, preferred first, as a worker sees them that can use them; none when nobody speaks."""
        self._forget_the_silent()
        views = [backends for _, backends in self._latest.values()]
        best = max(views, default=[], key=lambda view: [backend.healthy for backend in view])
        return list(best)

    def _forget_the_silent(self) -> None:
        oldest = time.monotonic() - STALE_SECONDS
        self._latest = {worker: told for worker, told in self._latest.items() if told[0] > oldest}


class BackendView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One ComfyUI; ``since`` is when it became usable, or stopped being so. Address and reason are for
    operators."""

    healthy: bool
    preferred: bool
    since: datetime
    version: str | None
    queue_remaining: int | None
    url: str | None = None
    reason: str | None = None


class BackendsView(msgspec.Struct, frozen=True, kw_only=True):
    """What new work is drawn by: ``preferred``, a ``fallback``, ``none`` (work waits), or ``unknown`` while
    no worker is heard; ``items`` are preferred first."""

    state: State
    items: list[BackendView]


@get("/backends", responses=documented(), tags=["operations"], operation_id="getBackends")
async def read_backends(request: Request[Any, Any, Any]) -> Response[BackendsView]:
    """Which ComfyUI draws now, and how each of them is."""
    known: list[_Backend] = request.app.state.parts.live.backends.now()
    operator = caller_of(request).sees_all
    view = BackendsView(
        state=_state(known),
        items=[
            BackendView(
                healthy=backend.healthy,
                preferred=backend.preferred,
                since=backend.since,
                version=backend.version,
                queue_remaining=backend.queue_remaining,
                url=backend.url if operator else None,
                reason=backend.reason if operator else None,
            )
            for backend in known
        ],
    )
    return Response(view, headers={"cache-control": "no-store"})


def _state(known: list[_Backend]) -> State:
    if not known:
        return "unknown"
    chosen = next((backend for backend in known if backend.healthy), None)
    if chosen is None:
        return "none"
    return "preferred" if chosen.preferred else "fallback"


router = Router("/", route_handlers=[read_backends])
