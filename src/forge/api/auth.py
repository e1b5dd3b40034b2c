"""Who is asking: bearer keys with a role, or this machine's own user while forge is open to it.

Bootstrap keys come from the settings and are always good. All others are events of the log, as far as this
process has read it; see ``docs/adr/0011-keys-are-events.md``.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
from litestar import Request
from litestar.connection import ASGIConnection

from forge.api import edge
from forge.domain.keys import MAX_TEXT, digest, has_form
from forge.errors import Forbidden, Unauthenticated, Unavailable
from forge.settings import ApiKey
from forge.telemetry import about

if TYPE_CHECKING:
    from forge.api.live import Live

Connection = ASGIConnection[Any, Any, Any, Any]

DEVELOPER = "dev"
_SAFE = ("GET", "HEAD", "OPTIONS")
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


class Caller(msgspec.Struct, frozen=True):
    """Who asks, for whom: ``user`` owns what is made; ``actor`` goes into the log.

    It is ``role:user`` of whoever asks, and with a key of the log ``role:user#key``.
    """

    role: str
    user: str
    actor: str
    sees_all: bool = False
    key_id: str | None = None

    @property
    def tenant(self) -> str | None:
        """Whose things may be seen; None for everybody's."""
        return None if self.sees_all else self.user

    def may_see(self, user: str) -> bool:
        return self.sees_all or user == self.user


class Door:
    """Knows the keys, and whether this machine needs one."""

    def __init__(self, keys: Sequence[ApiKey], live: Live, *, open_to_loopback: bool) -> None:
        self._keys = [(digest(key.secret), key) for key in keys]
        self._live = live
        self._open = open_to_loopback and not keys

    def caller(self, connection: Connection) -> Caller:
        """Who is asking.

        Raises:
            Unauthenticated: no key, an unknown or a revoked one.
            Unavailable: it may be a key of the log, which this process has not read to its end yet.
            Forbidden: the key may not act for that user.
            Invalid: ``X-Forge-User`` cannot be anybody.
        """
        role, user, key_id = self._known(connection)
        acting_for = edge.header(connection.headers, "x-forge-user")
        actor = f"{role}:{user}" if key_id is None else f"{role}:{user}#{key_id}"
        if acting_for is None:
            return Caller(role, user, actor, role == "operator", key_id)
        if role == "player" and acting_for != user:
            raise Forbidden("a player's key speaks for that player only")
        return Caller(role, acting_for, actor, key_id=key_id)

    def lets_stay(self, caller: Caller) -> bool:
        """Whether a caller who was let in would be let in still."""
        return caller.key_id is None or self._live.keys.good(caller.key_id)

    def _known(self, connection: Connection) -> tuple[str, str, str | None]:
        given = connection.headers.get("authorization")
        if given is None and self._open and _is_this_machine(connection):
            return "operator", DEVELOPER, None
        scheme, _, secret = (given or "").partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not 1 <= len(secret) <= MAX_TEXT:
            raise Unauthenticated
        given_digest = digest(secret)
        found = [key for known, key in self._keys if hmac.compare_digest(known, given_digest)]
        if found:
            return found[0].role, found[0].user, None
        if not self._live.admissions.caught_up.is_set() and has_form(secret):
            raise Unavailable("forge is still reading its log and does not know all keys yet")
        key = self._live.keys.find(secret)
        if key is None:
            raise Unauthenticated
        return key.role, key.user_id, key.id


async def admit(request: Request[Any, Any, Any]) -> None:
    """Litestar's hook before every route behind the door: leaves the caller in the scope.

    Not a guard, for which Litestar copies the route's handler each time; and async, because it would send a
    plain function to a thread.
    """
    caller = request.scope["user"] = admitted(request)
    named = request.path_params.get("job_id")
    about(user=caller.user) if named is None else about(user=caller.user, job=str(named))


def admitted(connection: Connection) -> Caller:
    """Who is asking; each key that nobody has is counted against the address it came from.

    Raises:
        LimitReached: there were too many of them.
        Unauthenticated, Forbidden, Invalid, Unavailable: as :meth:`Door.caller` says.
    """
    try:
        return door_of(connection).caller(connection)
    except Unauthenticated:
        if "authorization" in connection.headers:
            connection.scope["litestar_app"].state.guesses.another(connection.scope)
        raise


def door_of(connection: Connection) -> Door:
    """The door of the app that serves this connection."""
    door: Door = connection.scope["litestar_app"].state.door
    return door


def caller_of(connection: Connection) -> Caller:
    caller: Caller = connection.scope["user"]
    return caller


def operator_of(connection: Connection) -> Caller:
    """The caller, of a route that is for operators alone.

    Raises:
        Forbidden: it is none, or acts for somebody else and has that one's rights only.
    """
    caller = caller_of(connection)
    if not caller.sees_all:
        raise Forbidden("this is for operators, in their own name")
    return caller


def _is_this_machine(connection: Connection) -> bool:
    """Whether a request comes from here, not through a proxy, and not from a web page of elsewhere.

    A page may make a browser on this machine send requests: under a name of its own that resolves to
    127.0.0.1 (seen in Host), or across origins (seen in Origin).
    """
    client = connection.scope.get("client")
    headers = connection.headers
    if client is None or not _is_loopback(client[0]) or any(name in headers for name in _FORWARDED):
        return False
    if not _is_loopback(_hostname(f"//{headers.get('host', '')}")):
        return False
    origin = headers.get("origin")
    if origin is None or connection.scope.get("method") in _SAFE:
        return True
    return _is_loopback(_hostname(origin))


@lru_cache(1024)
def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


@lru_cache(1024)
def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
