"""GET /backends: what the workers say about ComfyUI, and what a player may know of it."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest
from nats.aio.client import Client

from forge.api import backends
from forge.topology import BACKENDS
from waiting import wait_until

SINCE = "2026-05-01T12:00:00Z"


@pytest.fixture(autouse=True)
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker said once holds for the whole test."""
    monkeypatch.setattr(backends, "STALE_SECONDS", 600.0)


def told(worker: str, *healthy: bool) -> bytes:
    """What a worker publishes, preferred first."""
    seen = [
        {
            "url": f"http://comfy-{nth}",
            "healthy": fine,
            "preferred": nth == 0,
            "reason": "" if fine else "unreachable (refused)",
            "since": SINCE,
            "version": "0.27.0",
            "queue_remaining": nth,
        }
        for nth, fine in enumerate(healthy)
    ]
    return msgspec.json.encode({"worker": worker, "backends": seen})


async def state(client: httpx.AsyncClient) -> str:
    answer = await client.get("/backends")
    assert answer.status_code == 200
    found: str = answer.json()["state"]
    return found


async def becomes(client: httpx.AsyncClient, wanted: str) -> None:
    async def so() -> bool:
        return await state(client) == wanted

    await wait_until(so, what=wanted)


@pytest.mark.parametrize(
    ("healthy", "expected"),
    [((True, True), "preferred"), ((False, True), "fallback"), ((False, False), "none")],
)
async def test_it_is_said_what_draws_now(
    mei: httpx.AsyncClient, nats_client: Client, healthy: tuple[bool, ...], expected: str
) -> None:
    assert await state(mei) == "unknown", "no worker was heard"
    await nats_client.publish(BACKENDS, told("a", *healthy))
    await becomes(mei, expected)


async def test_addresses_and_reasons_are_for_operators(
    mei: httpx.AsyncClient, operator: httpx.AsyncClient, nats_client: Client
) -> None:
    await nats_client.publish(BACKENDS, told("a", False, True))
    await becomes(mei, "fallback")
    shown = (await mei.get("/backends")).json()["items"]
    assert shown[0] == {
        "healthy": False,
        "preferred": True,
        "since": SINCE,
        "version": "0.27.0",
        "queue_remaining": 0,
    }
    everything: list[dict[str, Any]] = (await operator.get("/backends")).json()["items"]
    assert [item["url"] for item in everything] == ["http://comfy-0", "http://comfy-1"]
    assert everything[0]["reason"] == "unreachable (refused)"


async def test_a_worker_that_falls_silent_is_no_longer_believed(
    mei: httpx.AsyncClient, nats_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await nats_client.publish(BACKENDS, told("a", True))
    await becomes(mei, "preferred")
    monkeypatch.setattr(backends, "STALE_SECONDS", 0.0)
    assert await state(mei) == "unknown"


async def test_one_worker_that_can_draw_is_enough(mei: httpx.AsyncClient, nats_client: Client) -> None:
    await nats_client.publish(BACKENDS, told("a", True, True))
    await nats_client.publish(BACKENDS, told("b", False, False))
    await nats_client.publish(BACKENDS, b"nonsense")
    await becomes(mei, "preferred")
    await nats_client.publish(BACKENDS, told("a", False, True))
    await becomes(mei, "fallback")
