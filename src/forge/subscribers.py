"""Other services that read ``FORGE_ASSETS_READY``: a durable consumer for each, which only an operator makes.

A consumer keeps a service's place for as long as the service is away. One message is out at a time, so that
what a service did not ack comes again before anything newer, and the order of the log holds for it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
from nats.aio.client import Client

from forge.broker import BrokerRefused, connect, request
from forge.credentials import OPERATOR, login
from forge.errors import FieldError, Invalid, NotFound, TopologyDiffers
from forge.settings import Settings
from forge.topology import ASSETS_READY, NOT_FOUND, public

ACK_SECONDS = 10
"""How long a service may take for one message, unless it says that it is still at it."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_THERE_ALREADY = 10148


class Subscriber(msgspec.Struct, frozen=True, kw_only=True):
    """One service's place: messages yet to come, the sequence up to which all is acked, how many ask now."""

    name: str
    types: tuple[str, ...]
    to_come: int
    acked: int
    asking: int


class _Info(msgspec.Struct):
    class Config(msgspec.Struct):
        durable_name: str = ""
        filter_subject: str = ""
        filter_subjects: list[str] = []

    class Place(msgspec.Struct):
        stream_seq: int = 0

    name: str
    config: Config
    ack_floor: Place
    num_pending: int = 0
    num_ack_pending: int = 0
    num_waiting: int = 0


class _Page(msgspec.Struct):
    consumers: list[_Info]
    total: int


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Client]:
    """A connection that may make them.

    Raises:
        LogUnavailable, NotLetIn: there is none.
    """
    nc = await connect(settings.nats_url, "subscribers", login(settings.nats_passwords_dir, OPERATOR))
    try:
        yield nc
    finally:
        await nc.close()


async def add(nc: Client, name: str, start: datetime | int | None, types: Sequence[str] = ()) -> None:
    """Keep a place for a service, from a moment or a sequence of the stream on, None: from its beginning.

    Said again in the same words it does nothing.

    Raises:
        Invalid: the name cannot be one.
        TopologyDiffers: there is one of that name that begins elsewhere or hears of other types.
    """
    if not _NAME.fullmatch(name):
        raise Invalid([FieldError("name", "1 to 64 letters, digits, - and _")])
    config: dict[str, Any] = {
        "durable_name": name,
        "description": "Made by forge subscribers.",
        "ack_policy": "explicit",
        "ack_wait": ACK_SECONDS * 10**9,
        "max_ack_pending": 1,
        "replay_policy": "instant",
        "filter_subjects": [public(type_) for type_ in types],
        **_from(start),
    }
    body = {"stream_name": ASSETS_READY, "config": config, "action": "create"}
    try:
        await request(nc, f"CONSUMER.CREATE.{ASSETS_READY}.{name}", body)
    except BrokerRefused as refused:
        if refused.err_code != _THERE_ALREADY:
            raise
        raise TopologyDiffers(
            f"{name} is there already, with another start or other types; to begin anew: "
            f"forge subscribers remove {name}"
        ) from None


async def remove(nc: Client, name: str) -> None:
    """Forget a service's place.

    Raises:
        NotFound: it has none.
    """
    try:
        await request(nc, f"CONSUMER.DELETE.{ASSETS_READY}.{name}")
    except BrokerRefused as refused:
        if refused.err_code in NOT_FOUND:
            raise NotFound(f"there is no subscriber {name!r}") from None
        raise


async def listed(nc: Client) -> list[Subscriber]:
    """All there are, by name."""
    found: list[_Info] = []
    while True:
        answer = await request(nc, f"CONSUMER.LIST.{ASSETS_READY}", {"offset": len(found)})
        page = msgspec.json.decode(answer, type=_Page)
        found += page.consumers
        if not page.consumers or len(found) >= page.total:
            kept = (_subscriber(info) for info in found if info.config.durable_name)
            return sorted(kept, key=lambda one: one.name)


def _subscriber(info: _Info) -> Subscriber:
    filters = info.config.filter_subjects or [info.config.filter_subject]
    return Subscriber(
        name=info.name,
        types=tuple(filter_.split(".")[3] for filter_ in filters if filter_),
        to_come=info.num_pending + info.num_ack_pending,
        acked=info.ack_floor.stream_seq,
        asking=info.num_waiting,
    )


def _from(start: datetime | int | None) -> dict[str, Any]:
    match start:
        case None:
            return {"deliver_policy": "all"}
        case int():
            return {"deliver_policy": "by_start_sequence", "opt_start_seq": start}
        case datetime():
            at = start.astimezone(UTC).isoformat().replace("+00:00", "Z")
            return {"deliver_policy": "by_start_time", "opt_start_time": at}
