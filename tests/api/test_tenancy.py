"""Every route of the OpenAPI document against everybody who may not: another's things do not exist (P9).

The routes are read from the document. A new one with an id in its path needs a thing of mei's for that id in
`Things`; a new one without an id must be named in `OPERATORS`, `OWN` or `ANYBODY`. What is forgotten fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest
from websockets.asyncio.client import connect

from api.keyed import callers, new_key, served_locked
from api.making import completed, picture
from api.serving import ROOT, Serve, Served
from api.test_live import hear
from forge.settings import Settings
from waiting import wait_until

Route = tuple[str, str]

OPERATORS = {
    ("GET", "/keys"),
    ("POST", "/keys"),
    ("DELETE", "/keys/{key_id}"),
}
"""For operators in their own name; 403 for everybody else, whatever the id."""

OWN = {
    ("POST", "/jobs"),
    ("POST", "/batch"),
    ("POST", "/uploads"),
    ("POST", "/events/ticket"),
    ("POST", "/assets/cleanup"),
    ("GET", "/events"),
    ("GET", "/queue"),
    ("GET", "/assets"),
    ("GET", "/limits"),
}
"""For everybody, about their own things."""

ANYBODY = {("GET", "/catalogue"), ("GET", "/stats"), ("GET", "/usage"), ("GET", "/backends")}
"""For everybody, the same for all: numbers of the whole service that name nobody."""

LAN = ("player", "service as lan", "operator as lan")
"""Everybody who speaks for lan. `service` speaks for itself."""

ICON = {"job_type": "ui_icon", "params": {}, "session_id": "mei-session", "character_id": "mei-heroine"}
MADE_UP = f"forge_{'0' * 16}_{'1' * 64}"


@pytest.fixture
async def one(serve: Serve, settings: Settings) -> Served:
    return await served_locked(serve, settings)


@pytest.fixture
async def who(one: Served) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    async with callers(one) as clients:
        yield clients


async def routes(served: Served) -> list[Route]:
    async with httpx.AsyncClient(base_url=served.base_url) as plain:
        document = (await plain.get("/openapi.json")).json()
    found = [
        (method.upper(), path.removeprefix(ROOT))
        for path, operations in document["paths"].items()
        for method in operations
        if path.startswith(ROOT)
    ]
    return found + [("HEAD", path) for method, path in found if method == "GET" and path != "/events"]


class Things(msgspec.Struct):
    """One of each of mei's, by the name it has in paths; a waiting job and a finished one are both jobs."""

    ids: list[dict[str, str]]

    def paths(self, path: str) -> list[str]:
        """The path with mei's ids in it, in every way that differs."""
        names = re.findall(r"{(\w+)}", path)
        for name in names:
            assert name in self.ids[0], f"say in `Things` which {name} of mei's lan may not have: {path}"
        return sorted({path.format_map(ids) for ids in self.ids})

    @property
    def signs(self) -> list[str]:
        """What must not occur in an answer to anybody else."""
        return sorted({value for ids in self.ids for value in ids.values()} | {"mei"})


async def things(served: Served, mei: httpx.AsyncClient) -> Things:
    waiting = (await mei.post("/jobs", json=ICON)).json()
    done = (await mei.post("/jobs", json=ICON)).json()
    batch = (await mei.post("/batch", json={"jobs": [ICON]})).json()
    loaded = await completed(served.parts, "mei", done)
    served.parts.live.wrote(loaded.seq)
    await mei.get("/queue", params={"min_seq": loaded.seq})
    [asset] = (await mei.get("/assets")).json()["items"]
    upload = await mei.post("/uploads", files={"file": ("a.png", picture("#112233", 64), "image/png")})
    _, key_id = await new_key(served, "player", "mei")
    common = {
        "batch_id": batch["batch_id"],
        "asset_id": asset["id"],
        "key_id": key_id,
        "upload_id": upload.json()["id"] if upload.status_code < 300 else str(uuid4()),
    }
    return Things(ids=[common | {"job_id": waiting["id"]}, common | {"job_id": done["id"]}])


async def ask(client: httpx.AsyncClient, method: str, path: str, **more: Any) -> httpx.Response:
    body = {"json": {}} if method in ("POST", "PUT", "PATCH") else {}
    return await client.request(method, path, **body, **more)


async def test_no_route_is_forgotten_here(one: Served) -> None:
    plain = {(method, path) for method, path in await routes(one) if "{" not in path and method != "HEAD"}
    forgotten = plain - OPERATORS - OWN - ANYBODY
    assert forgotten == set(), "say for whom these are"


async def test_nobody_without_a_good_key_gets_anything(one: Served) -> None:
    revoked, key_id = await new_key(one, "operator", "ops")
    await one.parts.keys.revoke(key_id, actor="test")
    await wait_until(lambda: not one.parts.live.keys.good(key_id), what="it is revoked")
    for key in (None, MADE_UP, "nonsense", revoked):
        for user in (None, "mei"):
            async with one.client(user, key) as client:
                for method, path in await routes(one):
                    if path == "/events":
                        continue
                    answer = await ask(client, method, re.sub(r"{\w+}", str(uuid4()), path))
                    where = (key, method, path, answer.status_code, answer.text)
                    if key is not None and answer.status_code == 429:  # who guesses so often is not heard
                        continue
                    if method == "HEAD":  # some routes have none
                        assert answer.status_code in (401, 405), where
                    else:
                        assert answer.status_code == 401, where
                        assert answer.json()["code"] == "unauthenticated", where


async def test_what_is_anothers_does_not_exist(one: Served, who: dict[str, httpx.AsyncClient]) -> None:
    mine, everything = await things(one, who["owner"]), await routes(one)
    head = await one.parts.store.head()
    for method, path in everything:
        for filled in mine.paths(path) if "{" in path else []:
            nothing = re.sub(r"{\w+}", str(uuid4()), path)
            for name in (*LAN, "service"):
                answer = await ask(who[name], method, filled)
                where = (name, method, filled, answer.status_code, answer.text)
                if (method, path) in OPERATORS:
                    assert answer.status_code == 403, where
                elif method == "HEAD":
                    assert answer.status_code in (404, 405), where
                else:
                    assert answer.status_code == 404, where
                    assert answer.json()["code"] == "not_found", where
                    assert told(answer, filled) == told(await ask(who[name], method, nothing), nothing), where
    assert await one.parts.store.head() == head, "and nothing was written"


async def test_its_owner_gets_the_very_same(one: Served, who: dict[str, httpx.AsyncClient]) -> None:
    """Otherwise nobody would notice a path that is 404 for everybody."""
    mine = await things(one, who["owner"])

    def harm(route: Route) -> tuple[Any, ...]:
        method, path = route
        return method == "DELETE", method == "POST", -path.count("/"), route

    by_harm = sorted(await routes(one), key=harm)
    for method, path in by_harm:
        for filled in mine.paths(path) if "{" in path else []:
            name = "operator" if (method, path) in OPERATORS else "owner"
            answer = await ask(who[name], method, filled)
            assert answer.status_code not in (401, 403, 404), (method, filled, answer.text)
            assert answer.status_code < 500, (method, filled, answer.text)


def told(answer: httpx.Response, path: str) -> str:
    """An answer without the ids of its request."""
    text = answer.text
    for part in path.split("/"):
        text = text.replace(part, "ID") if len(part) > 12 else text
    return text


async def test_what_is_for_operators_is_for_them_alone(
    one: Served, who: dict[str, httpx.AsyncClient]
) -> None:
    mine = await things(one, who["owner"])
    there = set(await routes(one))
    head = await one.parts.store.head()
    for method, path in sorted(OPERATORS & there):
        for filled in mine.paths(path):
            for name in (*LAN, "service", "owner"):
                answer = await ask(who[name], method, filled)
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), (name, method, path)
            if method == "GET":
                assert (await ask(who["operator"], method, filled)).status_code == 200
    assert await one.parts.store.head() == head


async def test_no_list_tells_of_anybody_else(one: Served, who: dict[str, httpx.AsyncClient]) -> None:
    mine = await things(one, who["owner"])
    facets = [
        {},
        {"session_id": "mei-session"},
        {"character_id": "mei-heroine"},
        {"asset_type": "ui_icon"},
        {"q": "ui_icon"},
        {"status": ["pending", "running", "completed", "failed", "cancelled"]},
    ]
    for method, path in await routes(one):
        if method != "GET" or "{" in path or path == "/events" or ("GET", path) in OPERATORS:
            continue
        for query in facets:
            for name in (*LAN, "service"):
                answer = await who[name].get(path, params=query)
                assert answer.status_code == 200, (name, path, answer.text)
                assert [sign for sign in mine.signs if sign in answer.text] == [], (name, path, query)
    assert mine.ids[0]["asset_id"] in (await who["owner"].get("/assets")).text
    assert mine.ids[0]["asset_id"] in (await who["operator"].get("/assets")).text


async def test_a_picture_of_two_owners_tells_neither_of_the_other(
    one: Served, who: dict[str, httpx.AsyncClient]
) -> None:
    """Equal pictures are one asset; whoever shares it sees own dates, own fetches, own events."""
    for name, user in (("owner", "mei"), ("player", "lan")):
        job = (await who[name].post("/jobs", json={"job_type": "ui_icon", "params": {}})).json()
        loaded = await completed(one.parts, user, job)
        one.parts.live.wrote(loaded.seq)
    lan, mei = who["player"], who["owner"]
    [asset] = (await lan.get("/assets", params={"min_seq": one.parts.live.newest})).json()["items"]
    for _ in range(3):
        await mei.get(f"/assets/{asset['id']}/file")
    await one.parts.reads.flush()
    now = {"min_seq": await one.parts.store.head()}
    assert (await lan.get(f"/assets/{asset['id']}", params=now)).json() == asset
    assert (await lan.get(f"/assets/{asset['id']}/usage")).json() == {"items": []}
    assert "mei" not in (await lan.get(f"/assets/{asset['id']}/history")).text
    assert (await mei.get(f"/assets/{asset['id']}")).json()["access_count"] == 3
    assert (await who["operator"].get(f"/assets/{asset['id']}/usage")).json()["items"][0]["user_id"] == "mei"
    assert (await lan.delete(f"/assets/{asset['id']}")).status_code == 204
    assert (await mei.get(f"/assets/{asset['id']}/file")).status_code == 200


@pytest.mark.parametrize("name", [*LAN, "service"])
async def test_no_socket_hears_of_anybody_else(
    one: Served, who: dict[str, httpx.AsyncClient], name: str
) -> None:
    headers = {k: v for k, v in who[name].headers.items() if k in ("authorization", "x-forge-user")}
    async with connect(one.socket_url + "?after=0", additional_headers=headers) as socket:
        mine = await things(one, who["owner"])
        await who["owner"].delete(f"/assets/{mine.ids[0]['asset_id']}")
        await who["owner"].delete(f"/jobs/{mine.ids[0]['job_id']}")
        own = (await who[name].post("/jobs", json={"job_type": "ui_icon", "params": {}})).json()
        first = await hear(socket, "ev")
        assert first["key"] == own["id"], json.dumps(first)
