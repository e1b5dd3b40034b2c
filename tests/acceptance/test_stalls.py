"""A process whose event loop stands still ends and says where it stood; one that was only stopped goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from acceptance.failpoints import HASTE, Failpoints
from acceptance.players import ask_until_answered, request
from acceptance.settling import ends, happened, settled, watching
from acceptance.system import System, running
from forge import watchdog
from waiting import wait_until

HASTY = 5
LIMIT = watchdog.TICKS * watchdog.TICK_SECONDS / HASTY
BLOCKED = {
    "api": "api: before the request is in the log",
    "generation": "worker: before the POST",
}


@pytest.mark.fault("H6")
@pytest.mark.timeout(240)
async def test_a_process_that_stands_still_ends_and_one_that_was_stopped_does_not(root: Path) -> None:
    failpoints = Failpoints(root / "armed")
    hasty = {HASTE: str(HASTY), **failpoints.environ}
    async with (
        running(root, render_ms="50", apis=2, **hasty) as system,
        watching(system) as witness,
        system.client("mei") as mei,
        system.client("mei", "api2") as elsewhere,
    ):
        failpoints.arm(*BLOCKED.values(), action="block")
        frozen_at = time.monotonic()
        await system.freeze("projector")
        asked = request("mei")
        with pytest.raises(httpx.TimeoutException):
            await mei.post("/jobs", json=asked.body, headers={"Idempotency-Key": asked.key}, timeout=1)
        job = await ask_until_answered(elsewhere, asked)
        await wait_until(lambda: len(system.deaths) == len(BLOCKED), 90, "both have ended")
        assert set(system.deaths) == {f"{name} ended with status 70" for name in BLOCKED}
        for name in BLOCKED:
            assert "come_by" in stack_in(system, name)
        await happened(witness, "completed", job=job)
        await wait_until(lambda: time.monotonic() > frozen_at + 1.5 * LIMIT, 20, "stopped for long enough")
        system.thaw("projector")
        assert ends(await settled(witness, [asked])) == ["completed"]
        assert len(system.deaths) == len(BLOCKED)


def stack_in(system: System, name: str) -> str:
    """What a process's watchdog wrote of where its loop stood."""
    lines = (system.root / "log" / f"{name}.log").read_text().splitlines()
    told: list[dict[str, Any]] = [json.loads(line) for line in lines if line.startswith("{")]
    (last,) = [line for line in told if line["logger"] == watchdog.log.name]
    return str(last["stack"])
