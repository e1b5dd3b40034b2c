"""A damaged log among real processes: nobody serves on it, and one command gives it back."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

import damage
from acceptance.players import ask_until_answered, request
from acceptance.settling import settled, watching
from acceptance.system import WORKERS, System, running
from waiting import wait_until

FORGE = ("api", *WORKERS)


@pytest.fixture
async def system(module_root: Path) -> AsyncIterator[System]:
    async with running(module_root, render_ms="20-60") as system:
        yield system


@pytest.mark.fault("D7")
async def test_a_damaged_log_is_refused_and_given_back(system: System) -> None:
    async with watching(system) as witness, system.client("mei") as mei:
        asked = [request("mei") for _ in range(5)]
        for one in asked:
            await ask_until_answered(mei, one)
        before = await settled(witness, asked)
        await _copied(system, before.events[-1].seq)
        for name in (*FORGE, "nats"):
            system.kill(name)
        damage.cut(system.nats)
        system.start("nats")
        system.nats.wait_ready()
        system.start(*FORGE)
        await wait_until(lambda: set(FORGE) <= _refused(system), 100, "everybody refuses")
        assert "the log is not whole: " in await _forge(system, "setup", status=2)
        for name in FORGE:
            system.kill(name)
        assert "the log is whole: " in await _forge(system, "log", "restore")
        system.deaths.clear()
        system.start(*FORGE)
        await system.ready()
        asked.append(request("mei"))
        await ask_until_answered(mei, asked[-1])
        after = await settled(witness, asked)
    assert [_said(m) for m in after.events[: len(before.events)]] == [_said(m) for m in before.events]
    assert "the log is whole: " in await _forge(system, "log", "verify")
    assert "the same as before, byte for byte" in await _forge(system, "replay", "all")


def _said(message: object) -> tuple[object, ...]:
    return (message.seq, message.subject, message.data)  # type: ignore[attr-defined]


def _refused(system: System) -> set[str]:
    """Who ended because something must be mended first."""
    return {death.split(" ")[0] for death in system.deaths if death.endswith(" with status 2")}


async def _copied(system: System, seq: int) -> None:
    connection = await asyncpg.connect(system.postgres_dsn)
    try:
        there = "select coalesce(max(seq), 0) >= $1 from forge_log.entry"
        await wait_until(lambda: connection.fetchval(there, seq), 60, "the log is copied")
    finally:
        await connection.close()


async def _forge(system: System, *words: str, status: int = 0) -> str:
    """What a command says, when it ends with this status."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "forge", *words),
        env=system.environ("projector"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == status, said.decode()
    return said.decode()
