"""One-time tickets, with which a web page opens a socket: browsers cannot send a key with one.

A ticket names the process that gave it. That one holds it, for 30 s, and tells once whose it is; any other
API process asks there, so that a ticket is good at each of them and still only once.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from forge.api.auth import Caller
from forge.broker import exchange
from forge.errors import Unauthenticated
from forge.topology import ticket_office

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

LIFE_SECONDS = 30.0
_MOST = 10_000
_ASK_SECONDS = 2.0
_LONGEST = 100

_caller = msgspec.json.Decoder(Caller | None)


class Tickets:
    """The tickets this process has given and nobody has used yet; the oldest give way to new ones."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._office = secrets.token_hex(8)
        self._listening = False
        self._held: OrderedDict[str, tuple[float, Caller]] = OrderedDict()

    async def give(self, caller: Caller) -> tuple[str, datetime]:
        """A ticket, and when it is no longer good."""
        if not self._listening:
            self._listening = True  # until the connection ends
            await self._nc.subscribe(ticket_office(self._office), cb=self._asked)
        secret = secrets.token_urlsafe(24)
        self._held[secret] = (time.monotonic() + LIFE_SECONDS, caller)
        if len(self._held) > _MOST:
            self._held.popitem(last=False)
        return f"{self._office}.{secret}", datetime.now(UTC) + timedelta(seconds=LIFE_SECONDS)

    async def take(self, ticket: str) -> Caller:
        """Who a ticket was given to; from now on it is worth nothing.

        Raises:
            Unauthenticated: nobody gave it, it was used, or it is too old.
            LogUnavailable: the process that gave it is not to be asked, or gone.
        """
        office, _, secret = ticket.partition(".")
        if len(ticket) > _LONGEST or not (office.isascii() and office.isalnum() and secret):
            raise Unauthenticated
        if office == self._office:
            caller = self._taken(secret)
        else:
            told = await exchange(self._nc, ticket_office(office), secret.encode(), None, _ASK_SECONDS)
            caller = _caller.decode(told)
        if caller is None:
            raise Unauthenticated
        return caller

    def _taken(self, secret: str) -> Caller | None:
        until, caller = self._held.pop(secret, (0.0, None))
        return caller if time.monotonic() < until else None

    async def _asked(self, message: Msg) -> None:
        await message.respond(msgspec.json.encode(self._taken(message.data.decode("utf-8", "replace"))))
