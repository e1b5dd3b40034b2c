"""API keys: made once, shown once, good everywhere at once, and gone everywhere at once."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
import pytest
from nats.aio.client import Client
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from api.keyed import BOOTSTRAP, callers, new_key, served_locked
from api.serving import Serve, Served
from api.test_live import code_of, hear
from forge.events.envelope import Recorded
from forge.follower import follow
from forge.settings import Settings
from forge.topology import ALL_EVENTS
from waiting import wait_until

ICON = {"job_type": "ui_icon", "params": {}}
MADE_UP = f"forge_{'0' * 16}_{'1' * 64}"


@pytest.fixture
async def one(serve: Serve, settings: Settings) -> Served:
    return await served_locked(serve, settings)


async def status(served: Served, key: str, path: str = "/catalogue") -> int:
    async with served.client(key=key) as client:
        return (await client.get(path)).status_code


async def revoke(served: Served, key_id: str) -> httpx.Response:
    async with served.client(key=BOOTSTRAP.secret) as root:
        return await root.delete(f"/keys/{key_id}")


async def log_of(nc: Client) -> list[Recorded]:
    records: list[Recorded] = []
    async for batch in follow(nc, 1, (ALL_EVENTS,)):
        records += batch.records
        if batch.caught_up:
            return records
    raise AssertionError("the log has an end")


async def test_a_key_is_told_once_and_the_log_has_only_its_hash(one: Served, nats_client: Client) -> None:
    async with one.client(key=BOOTSTRAP.secret) as root:
        made = await root.post("/keys", json={"role": "player", "user_id": "mei", "label": "her phone"})
        assert (made.status_code, made.headers["location"].rpartition("/")[2]) == (201, made.json()["id"])
        key = made.json().pop("key")
        [listed] = (await root.get("/keys")).json()["items"]
    assert {name: value for name, value in made.json().items() if name != "key"} == listed
    assert (listed["role"], listed["user_id"], listed["label"]) == ("player", "mei", "her phone")
    assert (listed["created_by"], listed["revoked_at"]) == ("operator:root", None)
    [record] = await log_of(nats_client)
    assert key.rpartition("_")[2] not in str(record)
    assert (record.meta.actor, record.seq) == ("operator:root", listed["seq"])


async def test_a_key_holds_on_every_api_at_once_and_is_gone_from_every_api(
    one: Served, serve: Serve, settings: Settings
) -> None:
    other = await served_locked(serve, settings, projecting=False)
    key, key_id = await new_key(one, "player", "mei")
    assert await status(one, key) == 200
    await wait_until(lambda: other.parts.live.keys.good(key_id), what="the other API heard of it")
    assert await status(other, key) == 200
    revoked = await revoke(other, key_id)
    assert revoked.status_code == 204
    assert await status(other, key) == 401
    await wait_until(lambda: not one.parts.live.keys.good(key_id), what="the first API heard of it")
    assert await status(one, key) == 401
    again = await revoke(one, key_id)
    assert (again.status_code, again.headers["x-forge-seq"]) == (204, revoked.headers["x-forge-seq"])


async def test_keys_are_what_the_log_says_after_a_restart(
    one: Served, serve: Serve, settings: Settings
) -> None:
    good, _ = await new_key(one, "service", "shop")
    gone, gone_id = await new_key(one, "operator", "ops")
    await revoke(one, gone_id)
    restarted = await served_locked(serve, settings, projecting=False)
    assert (await status(restarted, good), await status(restarted, gone)) == (200, 401)


async def test_keys_need_no_postgres(serve: Serve, settings: Settings) -> None:
    away = msgspec.structs.replace(settings, postgres_dsn="postgresql://nobody@127.0.0.1:9/none")
    served = await served_locked(serve, away, projecting=False)
    key, key_id = await new_key(served, "player", "mei")
    async with served.client(key=key) as mei:
        assert (await mei.post("/jobs", json=ICON)).json()["user_id"] == "mei"
        assert (await revoke(served, key_id)).status_code == 204
        assert (await mei.post("/jobs", json=ICON)).status_code == 401


async def test_what_a_key_did_is_told_with_the_key(one: Served) -> None:
    async with callers(one) as who:
        job = (await who["service as lan"].post("/jobs", json=ICON)).json()
        assert (await who["operator"].delete(f"/jobs/{job['id']}")).status_code == 202
        params = {"min_seq": one.parts.live.newest}
        assert (await who["player"].get(f"/jobs/{job['id']}", params=params)).status_code == 200
        items = (await who["player"].get(f"/jobs/{job['id']}/history")).json()["items"]
    ids = {key.user_id: key.id for key in one.parts.live.keys.keys.values() if key.role == "operator"}
    shops = [f"service:shop#{key.id}" for key in one.parts.live.keys.keys.values() if key.role == "service"]
    assert [(i["type"], i["data"]["user_id"]) for i in items] == [
        ("job.submitted", "lan"),
        ("job.cancelled", "lan"),
    ]
    assert items[0]["actor"] in shops
    assert items[1]["actor"].startswith("operator:ops#")
    assert len(ids) == 1


async def test_only_an_operator_in_its_own_name_handles_keys(one: Served) -> None:
    _, key_id = await new_key(one, "player", "wu")
    async with callers(one) as who:
        head = one.parts.live.newest
        for name in ("owner", "player", "service", "service as lan", "operator as lan"):
            for method, path in (("GET", "/keys"), ("POST", "/keys"), ("DELETE", f"/keys/{key_id}")):
                answer = await who[name].request(method, path, json={"role": "operator", "user_id": "x"})
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (name, method)
        assert one.parts.live.newest == head
        assert (await who["operator"].get("/keys")).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"role": "king", "user_id": "mei"},
        {"role": "player", "user_id": ""},
        {"role": "player", "user_id": "a\u0000b"},
        {"role": "player", "user_id": "mei", "label": "\u200b"},
        {"role": "player", "user_id": "mei", "digest": "00"},
    ],
)
async def test_a_key_that_cannot_be_is_refused(one: Served, body: dict[str, Any]) -> None:
    async with one.client(key=BOOTSTRAP.secret) as root:
        answer = await root.post("/keys", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")


@pytest.mark.parametrize("key_id", ["0" * 16, "nonsense", "x" * 300, "%3E", "forge.evt", "%E6%A2%85"])
async def test_a_key_that_never_was_cannot_be_revoked(one: Served, key_id: str) -> None:
    answer = await revoke(one, key_id)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_before_the_log_is_read_no_key_of_it_is_refused_for_good(one: Served) -> None:
    key, _ = await new_key(one, "player", "mei")
    live = one.parts.live
    await wait_until(lambda: live.head == live.written, what="the event has come back from the log")
    one.parts.admissions.caught_up.clear()
    for text, expected in ((key, 503), (MADE_UP, 503), ("not-a-key-of-the-log", 401)):
        async with one.client(key=text) as client:
            answer = await client.get("/catalogue")
            assert answer.status_code == expected, text
            assert (answer.headers.get("retry-after") is None) == (expected == 401)
    assert await status(one, BOOTSTRAP.secret) == 200
    assert await status(one, BOOTSTRAP.secret, "/keys") == 503


async def test_unknown_keys_cost_no_look_into_the_log_and_leave_nothing_behind(
    one: Served, nats_client: Client
) -> None:
    _, key_id = await new_key(one, "player", "mei")
    size, sent = len(one.parts.live.keys.keys), nats_client.stats["out_msgs"]
    guesses = [f"forge_{key_id}_{n:064x}" for n in range(50)] + [
        f"forge_{n:016x}_{'0' * 64}" for n in range(50)
    ]
    async with one.client() as client:
        for guess in [*guesses, "x" * 513, "x" * 8000, "x"]:
            answer = await client.get("/queue", headers={"Authorization": f"Bearer {guess}"})
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert len(one.parts.live.keys.keys) == size
    # the follower asks for more once in a while, whoever knocks
    assert nats_client.stats["out_msgs"] - sent < 20


async def test_a_socket_is_closed_with_its_key(one: Served) -> None:
    key, key_id = await new_key(one, "player", "mei")
    stays, _ = await new_key(one, "player", "mei")
    async with (
        connect(one.socket_url, additional_headers={"Authorization": f"Bearer {key}"}) as socket,
        connect(one.socket_url, additional_headers={"Authorization": f"Bearer {stays}"}) as other,
        one.client(key=stays) as mei,
    ):
        await hear(socket, "mark")
        await hear(other, "mark")
        await revoke(one, key_id)
        job = (await mei.post("/jobs", json=ICON)).json()
        heard = await hear(other, "ev")
        assert heard["key"] == job["id"]
        left = [message async for message in _rest(socket)]
        assert job["id"] not in str(left)
        assert await code_of(socket) == 4401


async def _rest(socket: Any) -> Any:
    try:
        async with asyncio.timeout(30):
            while True:
                yield await socket.recv()
    except ConnectionClosed:
        return


async def test_the_open_door_of_a_developer_stays_open_when_keys_are_made(served: Served) -> None:
    async with served.client() as dev:
        made = (await dev.post("/keys", json={"role": "player", "user_id": "mei"})).json()
        assert made["created_by"] == "operator:dev"
        assert (await dev.get("/queue")).status_code == 200
    async with served.client(key=made["key"]) as mei:
        assert (await mei.post("/jobs", json=ICON)).json()["user_id"] == "mei"
        assert (await mei.get("/keys")).status_code == 403
    assert await status(served, MADE_UP) == 401


async def test_keys_are_listed_from_the_log_as_the_apis_know_them(one: Served) -> None:
    _, first = await new_key(one, "player", "mei")
    await new_key(one, "service", "shop")
    await revoke(one, first)
    assert await one.parts.keys.all() == list(one.parts.live.keys.keys.values())
