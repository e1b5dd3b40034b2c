"""Who is asking: bearer keys with a role, or this machine's own user while forge is open to it."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import msgspec
from litestar import Request
from litestar.connection import ASGIConnection

from forge.api import edge
from forge.errors import Forbidden, Unauthenticated
from forge.settings import ApiKey

Connection = ASGIConnection[Any, Any, Any, Any]

DEVELOPER = "dev"
_SAFE = ("GET", "HEAD", "OPTIONS")
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


class Caller(msgspec.Struct, frozen=True):
    """Who asks, for whom: ``user`` owns what is made; ``actor`` goes into the log."""

    role: str
    user: str
    actor: str
    sees_all: bool = False

    @property
    def tenant(self) -> str | None:
        """Whose things may be seen; None for everybody's."""
        return None if self.sees_all else self.user

    def may_see(self, user: str) -> bool:
        return self.sees_all or user == self.user


class Door:
    """Knows the keys, and whether this machine needs one."""

    def __init__(self, keys: Sequence[ApiKey], *, open_to_loopback: bool) -> None:
        self._keys = [(hashlib.sha256(key.secret.encode()).digest(), key) for key in keys]
        self._open = open_to_loopback and not keys

    def caller(self, connection: Connection) -> Caller:
        """Who is asking.

        Raises:
            Unauthenticated: no key, or an unknown one.
            Forbidden: the key may not act for that user.
            Invalid: ``X-Forge-User`` cannot be anybody.
        """
        role, user = self._known(connection)
        acting_for = edge.header(connection.headers, "x-forge-user")
        actor = f"{role}:{user}"
        if acting_for is None:
            return Caller(role, user, actor, sees_all=role == "operator")
        if role == "player" and acting_for != user:
            raise Forbidden("a player's key speaks for that player only")
        return Caller(role, acting_for, actor)

    def lets_stay(self, caller: Caller) -> bool:
        """Whether a caller who was let in would be let in still."""
        return True

    def _known(self, connection: Connection) -> tuple[str, str]:
        given = connection.headers.get("authorization")
        if given is None and self._open and _is_this_machine(connection):
            return "operator", DEVELOPER
        scheme, _, secret = (given or "").partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise Unauthenticated
        digest = hashlib.sha256(secret.strip().encode("utf-8", "surrogateescape")).digest()
        found = [key for known, key in self._keys if hmac.compare_digest(known, digest)]
        if not found:
            raise Unauthenticated
        return found[0].role, found[0].user


async def admit(request: Request[Any, Any, Any]) -> None:
    """Litestar's hook before every route behind the door: leaves the caller in the scope.

    Not a guard, for which Litestar copies the route's handler each time; and async, because it would send a
    plain function to a thread.
    """
    request.scope["user"] = admitted(request)


def admitted(connection: Connection) -> Caller:
    """Who is asking; each key that nobody has is counted against the address it came from.

    Raises:
        LimitReached: there were too many of them.
        Unauthenticated, Forbidden, Invalid: as :meth:`Door.caller` says.
    """
    state = connection.scope["litestar_app"].state
    try:
        caller: Caller = state.door.caller(connection)
    except Unauthenticated:
        if "authorization" in connection.headers:
            state.guesses.another(connection.scope)
        raise
    return caller


def caller_of(connection: Connection) -> Caller:
    caller: Caller = connection.scope["user"]
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
