"""In front of every request and every socket: how many from one address, and how large a head.

Outside Litestar, because what no route matches passes none of its middleware, and its limiter skips sockets.
It runs before everything else, so it does little: one look at each header, one at a number.
"""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import msgspec
from litestar import Litestar
from litestar.types import Receive, Scope, Send

from forge.api import problems
from forge.api.addresses import Asker, asker, network, parsed
from forge.api.trail import Trail
from forge.domain.rates import Buckets, Rate
from forge.errors import AddressTooLong, ForgeError, HeadTooLarge, Limit, LimitReached, Malformed
from forge.settings import Settings

if TYPE_CHECKING:
    from forge.api.metrics import Metrics

MAX_HEAD = 32 * 1024
MAX_HEADERS = 100
MAX_ADDRESS = 8 * 1024
MAX_PARAMETERS = 100

DEFAULT_RATE = 200.0
BURST_SECONDS = 5

UNKNOWN_KEYS = Rate(per_second=1.0, burst=100)
"""Wrong keys from one address. Right ones are let in all the same: a neighbour's guesses lock nobody out."""

_ONCE = frozenset((b"authorization", b"content-type", b"host", b"idempotency-key", b"x-forge-user"))
_NETWORK = "forge.network"

IS_HEAD = "forge.head"
"""In the scope of a request that came as HEAD; routes see a GET."""


class Gate:
    """The application behind its limits; each process counts for itself."""

    def __init__(self, app: Litestar, settings: Settings) -> None:
        self._app = app
        self._admitted = Trail(app, self.metrics.answered)
        self._trusted = settings.trusted_proxies
        self._spares_local = settings.rate_per_ip is None
        per_second = DEFAULT_RATE if settings.rate_per_ip is None else settings.rate_per_ip
        burst = max(1, round(per_second * BURST_SECONDS))
        self._buckets = Buckets(Rate(per_second, burst)) if per_second else None
        self.connections: Counter[str] = Counter()

    @property
    def leaving(self) -> bool:
        """Whether this process was told to stop."""
        told: bool = self._app.state.leaving
        return told

    def leave(self) -> None:
        """Say so from now on: `/readyz` is 503, and each answer is the last of its connection."""
        self._app.state.leaving = True

    @property
    def metrics(self) -> Metrics:
        """What the application counts."""
        counters: Metrics = self._app.state.metrics
        return counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = cast("dict[str, Any]", scope)
        if given["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            self._admit(given)
        except ForgeError as error:
            await self._refuse(given, send, error)
            return
        if given.get("method") == "HEAD":  # the server leaves the body out
            given = given | {"method": "GET", IS_HEAD: True}
        await self._admitted(cast("Scope", given), receive, send)

    def connected(self, peer: tuple[str, int] | None) -> str:
        """Count a connection; what it is counted under, nothing for proxies and for this machine."""
        address = None if peer is None else parsed(peer[0])
        if address is None or address.is_loopback or any(address in one for one in self._trusted):
            return ""
        self.connections[network(address)] += 1
        return network(address)

    def disconnected(self, counted: str) -> None:
        """The end of a connection that was counted."""
        self.connections[counted] -= 1
        if not self.connections[counted]:
            del self.connections[counted]

    def _admit(self, scope: dict[str, Any]) -> None:
        """
        Raises:
            LimitReached: too many from this address.
            AddressTooLong, HeadTooLarge, Malformed: nobody needs a head like this one.
        """
        who = asker(scope, self._trusted)
        scope[_NETWORK] = who.network
        self._count(who)
        query: bytes = scope["query_string"]
        if len(scope["raw_path"]) + len(query) > MAX_ADDRESS:
            raise AddressTooLong
        if query.count(b"&") >= MAX_PARAMETERS:
            raise Malformed(f"there are more than {MAX_PARAMETERS} query parameters")
        _check(scope["headers"])

    def _count(self, who: Asker) -> None:
        if self._buckets is None or (who.local and self._spares_local):
            return
        wait = self._buckets.take(who.network, time.monotonic())
        if wait:
            raise _reached("requests_per_ip", self._buckets.rate, wait)

    async def _refuse(self, scope: dict[str, Any], send: Send, error: ForgeError) -> None:
        problem, headers = problems.problem_of(error)
        self.metrics.refused(scope, problem)
        prefix = "websocket.http" if scope["type"] == "websocket" else "http"
        told = {"content-type": problems.MEDIA_TYPE, "cache-control": "no-store"} | headers
        body = msgspec.json.encode(problem)
        told["content-length"] = str(len(body))
        raw = [(name.encode(), value.encode()) for name, value in told.items()]
        start = {"type": f"{prefix}.response.start", "status": problem.status, "headers": raw}
        await send(cast("Any", start))
        await send(cast("Any", {"type": f"{prefix}.response.body", "body": body, "more_body": False}))


class Guesses:
    """Counts keys that nobody has, for each address."""

    def __init__(self) -> None:
        self._buckets = Buckets(UNKNOWN_KEYS)

    def another(self, scope: Any) -> None:
        """
        Raises:
            LimitReached: too many of them came from there.
        """
        wait = self._buckets.take(scope.get(_NETWORK, ""), time.monotonic())
        if wait:
            raise _reached("unknown_keys_per_ip", UNKNOWN_KEYS, wait)


def _reached(name: str, rate: Rate, wait: float) -> LimitReached:
    again = datetime.now(UTC) + timedelta(seconds=wait)
    return LimitReached(
        Limit(name, rate.burst, rate.burst, again), f"{name}: no more than {rate.per_second:g} a second"
    )


def _check(headers: list[tuple[bytes, bytes]]) -> None:
    if len(headers) > MAX_HEADERS:
        raise HeadTooLarge(f"there are more than {MAX_HEADERS} headers")
    size, seen = 0, set[bytes]()
    for name, value in headers:
        size += len(name) + len(value)
        if name in _ONCE:
            if name in seen:
                raise Malformed(f"the header {name.decode()} comes twice")
            seen.add(name)
    if size > MAX_HEAD:
        raise HeadTooLarge(f"the headers are larger than {MAX_HEAD} bytes")
