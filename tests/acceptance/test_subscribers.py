"""I-SUB: a service that is killed, and whose server is killed, hears of every picture, in order."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from acceptance.players import ask_until_answered, request, scaled
from acceptance.settling import settled, watching
from acceptance.system import System, running
from forge.embedded import OwnedProcess
from waiting import wait_until

EXAMPLE = Path(__file__).parents[2] / "examples" / "subscriber.py"


def heard(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


class Service:
    """The example as a process."""

    def __init__(self, system: System, name: str) -> None:
        self.name, self.system, self.path = name, system, system.root / f"{name}.jsonl"
        self.start()

    def start(self) -> None:
        password = self.system.nats.passwords_dir / "subscriber"
        words = [sys.executable, EXAMPLE, self.system.nats.url, password, self.name, self.path]
        self.process = OwnedProcess(
            list(map(str, words)), log=self.system.root / "log" / f"{self.name}.log", cwd=self.system.root
        )

    async def has_heard(self, count: int) -> None:
        await wait_until(lambda: len(heard(self.path)) >= count, 60, f"{self.name} has heard {count}", 0.05)


async def forge(system: System, *words: str) -> str:
    told = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "forge", "subscribers", *words],
        env=system.environ("cli"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return told.stdout


@pytest.fixture
def services() -> Iterator[list[Service]]:
    started: list[Service] = []
    yield started
    for service in started:
        service.process.kill()


@pytest.mark.timeout(240)
async def test_a_service_hears_of_everything_whoever_dies(root: Path, services: list[Service]) -> None:
    async with running(root, render_ms="20-60") as system, watching(system) as witness:
        asked = [request(f"user-{nth % 6}") for nth in range(scaled(30))]
        async with system.client() as client:
            for one in asked[:10]:
                await ask_until_answered(client, one)
            await forge(system, "add", "shop")
            services.append(shop := Service(system, "shop"))
            await shop.has_heard(3)
            shop.process.kill()
            for one in asked[10:20]:
                await ask_until_answered(client, one)
            shop.start()
            await shop.has_heard(8)
            system.kill("nats")
            shop.process.kill()
            shop.start()  # before its server is back
            system.start("nats")
            for one in asked[20:]:
                await ask_until_answered(client, one)
        evidence = await settled(witness, asked, timeout=120)
        await shop.has_heard(len(asked))
        ready = [event for event in evidence.events if event.type == "forge.asset.ready.v1"]
        assert [line["id"] for line in heard(shop.path)] == [event.headers["ce-id"] for event in ready]
        assert [line["asset"] for line in heard(shop.path)] == [event.data for event in ready]

        await forge(system, "add", "late", "--from", "seq:26")
        services.append(late := Service(system, "late"))
        await late.has_heard(len(asked) - 25)
        assert heard(late.path) == heard(shop.path)[25:]

        async def all_acked() -> bool:  # which comes after it was written down
            told = [json.loads(line) for line in (await forge(system, "list", "--json")).splitlines()]
            standing = [(one["name"], one["to_come"], one["acked"]) for one in told]
            return standing == [("late", 0, len(asked)), ("shop", 0, len(asked))]

        await wait_until(all_acked, 30, "both are told to have acked everything")


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
