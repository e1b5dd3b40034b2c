"""Who is asking: keys and roles, and the open door of a developer's own machine."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from api.serving import Serve, Served
from forge.settings import ApiKey, Settings

ICON = {"job_type": "ui_icon", "params": {}}
KEYS = (
    ApiKey("player", "mei", "mei-secret"),
    ApiKey("player", "lan", "lan-secret"),
    ApiKey("service", "shop", "shop-secret"),
    ApiKey("operator", "ops", "ops-secret"),
)


@pytest.fixture
async def locked(serve: Serve, settings: Settings) -> Served:
    """An API with keys; being local or a developer's does not help."""
    return await serve(with_settings=msgspec.structs.replace(settings, api_keys=KEYS))


async def submit(served: Served, *, key: str | None = None, user: str | None = None) -> httpx.Response:
    async with served.client(user, key) as client:
        return await client.post("/jobs", json=ICON)


async def test_with_keys_everybody_needs_one(locked: Served) -> None:
    async with locked.client() as nobody:
        for method, path in (("GET", "/queue"), ("POST", "/jobs"), ("GET", "/catalogue"), ("GET", "/stats")):
            answer = await nobody.request(method, path, json=ICON)
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
            assert answer.headers["www-authenticate"].startswith("Bearer")
        for wrong in ("Bearer nope", "Bearer", "Basic bWVpOm1laQ==", "mei-secret", "Bearer \xff"):
            answer = await nobody.get("/queue", headers={b"Authorization": wrong.encode("latin-1")})  # type: ignore[dict-item]
            assert answer.status_code == 401, wrong
    async with httpx.AsyncClient(base_url=locked.base_url) as plain:
        for path in ("/livez", "/readyz", "/metrics", "/openapi.json", "/", "/docs"):
            answer = await plain.get(path)
            assert answer.status_code == 200, path
            assert answer.headers["content-type"].count("charset") <= 1, path


async def test_a_player_speaks_for_itself_only(locked: Served) -> None:
    assert (await submit(locked, key="mei-secret")).json()["user_id"] == "mei"
    assert (await submit(locked, key="mei-secret", user="mei")).json()["user_id"] == "mei"
    refused = await submit(locked, key="mei-secret", user="lan")
    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")


async def test_a_service_acts_for_players_and_sees_only_theirs(locked: Served) -> None:
    job = (await submit(locked, key="shop-secret", user="mei")).json()
    assert job["user_id"] == "mei"
    async with locked.client(key="shop-secret") as shop:
        assert (await shop.get("/queue", params={"min_seq": job["seq"]})).json()["items"] == []
        path = f"/jobs/{job['id']}"
        assert (await shop.get(path)).status_code == 404
        assert (await shop.get(path, headers={"X-Forge-User": "mei"})).status_code == 200
        assert (await shop.get(path, headers={"X-Forge-User": "lan"})).status_code == 404


async def test_an_operator_sees_everything_and_may_be_anybody(locked: Served) -> None:
    job = (await submit(locked, key="mei-secret")).json()
    async with locked.client(key="ops-secret") as ops:
        assert (await ops.get(f"/jobs/{job['id']}", params={"min_seq": job["seq"]})).status_code == 200
        as_lan = await ops.get(f"/jobs/{job['id']}", headers={"X-Forge-User": "lan"})
        assert as_lan.status_code == 404
    history_by = await _actor(locked, "ops-secret", job)
    assert history_by == "player:mei"


async def _actor(served: Served, key: str, job: dict[str, Any]) -> str:
    async with served.client(key=key) as client:
        items = (await client.get(f"/jobs/{job['id']}/history")).json()["items"]
        actor: str = items[0]["actor"]
        return actor


async def test_without_keys_the_door_opens_only_where_it_was_told_to(serve: Serve) -> None:
    closed = await serve(open_to_loopback=False)
    assert (await submit(closed)).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://[::1"},
        {"Authorization": "Bearer nope"},
    ],
)
async def test_the_open_door_is_for_this_machine_alone(served: Served, headers: dict[str, str]) -> None:
    async with served.client() as client:
        assert (await client.post("/jobs", json=ICON, headers=headers)).status_code == 401


async def test_the_open_door_lets_this_machine_in(served: Served) -> None:
    async with served.client() as client:
        port = served.base_url.rpartition(":")[2]
        for headers in ({}, {"Host": f"localhost:{port}"}, {"Origin": "http://localhost:5173"}):
            answer = await client.post("/jobs", json=ICON, headers=headers)
            assert (answer.status_code, answer.json()["user_id"]) == (202, "dev")
