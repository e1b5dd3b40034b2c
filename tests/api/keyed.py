"""Callers with keys of the log, one of each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import msgspec

from api.serving import Serve, Served
from forge.settings import ApiKey, Settings

BOOTSTRAP = ApiKey("operator", "root", "bootstrap-secret")


def locked(settings: Settings) -> Settings:
    """Settings with one key, from which every other one comes."""
    return msgspec.structs.replace(settings, api_keys=(BOOTSTRAP,))


async def served_locked(serve: Serve, settings: Settings, *, projecting: bool = True) -> Served:
    return await serve(with_settings=locked(settings), projecting=projecting)


async def new_key(served: Served, role: str, user: str) -> tuple[str, str]:
    """A key's text and id."""
    async with served.client(key=BOOTSTRAP.secret) as root:
        answer = await root.post("/keys", json={"role": role, "user_id": user})
        assert answer.status_code == 201, answer.text
        return answer.json()["key"], answer.json()["id"]


@asynccontextmanager
async def callers(served: Served) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    """Name → client: `owner` is mei; all others but `operator` are lan, in every way one can be lan."""
    kinds = {
        "owner": ("player", "mei", None),
        "player": ("player", "lan", None),
        "service as lan": ("service", "shop", "lan"),
        "service": ("service", "shop", None),
        "operator as lan": ("operator", "ops", "lan"),
        "operator": ("operator", "ops", None),
    }
    async with AsyncExitStack() as stack:
        clients = {}
        for name, (role, user, acting_for) in kinds.items():
            key, _ = await new_key(served, role, user)
            clients[name] = await stack.enter_async_context(served.client(acting_for, key))
        yield clients
