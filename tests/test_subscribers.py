"""A place in the stream for each service: made by an operator, used by a reader who may do nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import nats
import pytest
from nats.aio.client import Client

import factories
from forge import topology
from forge.broker import connect
from forge.credentials import OPERATOR, SUBSCRIBER, login
from forge.embedded import EmbeddedNats
from forge.errors import Invalid, NotFound, TopologyDiffers
from forge.events.assets import AssetReady
from forge.eventstore import Draft, EventStore
from forge.subscribers import add, listed, remove
from waiting import wait_until

BEFORE = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
async def operator(nats_server: EmbeddedNats) -> AsyncIterator[Client]:
    nc = await connect(nats_server.url, "test", login(nats_server.passwords_dir, OPERATOR))
    await topology.apply(nc)
    yield nc
    await nc.close()


async def ready(nc: Client, *types: str) -> list[str]:
    """Announce an asset of each type; their ids."""
    made: list[AssetReady] = [
        factories.ready(asset_type=type_, content_hash=f"{n:064x}") for n, type_ in enumerate(types)
    ]
    for event in made:
        meta = factories.meta(str(event.asset_id))
        await EventStore(nc).append([Draft(event, meta, topology.subject(event), 0)])
    return [str(event.asset_id) for event in made]


async def read(server: EmbeddedNats, name: str, count: int) -> list[str]:
    """What the service of that name hears, as the user that it is; the ids of the assets."""
    known = login(server.passwords_dir, SUBSCRIBER)
    assert known is not None
    nc = await nats.connect(
        server.url, user=known.user, password=known.password, inbox_prefix="_INBOX_subscriber"
    )
    try:
        subscription = await nc.jetstream().pull_subscribe_bind(name, stream=topology.ASSETS_READY)
        heard = []
        for _ in range(count):
            [message] = await subscription.fetch(1, timeout=30)
            heard.append(message.subject.split(".")[4])
            await message.ack_sync(timeout=30)
        with pytest.raises(TimeoutError):
            await subscription.fetch(1, timeout=0.3)
        return heard
    finally:
        await nc.close()


async def there(nc: Client, name: str, count: int) -> None:
    async def has() -> bool:
        return {one.name: one.to_come for one in await listed(nc)}.get(name) == count

    await wait_until(has, what=f"{count} messages for {name}")


async def test_each_hears_from_where_it_wants_what_it_wants(
    operator: Client, nats_server: EmbeddedNats
) -> None:
    first = await ready(operator, "ui_icon", "fate_card", "ui_icon")
    await add(operator, "all", None)
    await there(operator, "all", 3)
    await add(operator, "icons", BEFORE, ["ui_icon"])
    await add(operator, "second", 2)
    await add(operator, "new", datetime.now(UTC))
    assert await read(nats_server, "all", 3) == first
    assert await read(nats_server, "icons", 2) == [first[0], first[2]]
    assert await read(nats_server, "second", 2) == first[1:]
    assert await read(nats_server, "new", 0) == []
    told = {one.name: (one.types, one.to_come, one.acked) for one in await listed(operator)}
    assert told["icons"] == (("ui_icon",), 0, 3)
    assert told["all"] == ((), 0, 3)


async def test_added_twice_is_added_once_unless_it_is_another(operator: Client) -> None:
    await add(operator, "shop", BEFORE)
    await add(operator, "shop", BEFORE)
    with pytest.raises(TopologyDiffers, match="forge subscribers remove shop"):
        await add(operator, "shop", None)
    await remove(operator, "shop")
    await add(operator, "shop", None)
    assert [one.name for one in await listed(operator)] == ["shop"]


@pytest.mark.parametrize("name", ["", "a.b", "a b", "*", ">", "x" * 65])
async def test_a_name_that_cannot_be_one_is_refused(operator: Client, name: str) -> None:
    with pytest.raises(Invalid, match="letters, digits"):
        await add(operator, name, None)


async def test_who_is_not_there_cannot_be_removed(operator: Client) -> None:
    with pytest.raises(NotFound, match="no subscriber 'shop'"):
        await remove(operator, "shop")
