"""The tables are rebuilt, killed in the act, and wiped while forge serves and jobs complete (E1, E2, D9)."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from acceptance.evidence import Witness
from acceptance.players import SEED, Crowd, ask_until_answered, request, scaled
from acceptance.settling import ends, settled
from acceptance.system import Command, System, running, say
from folding import tables
from forge.topology import EVENTS
from forge.workers.projector import PROJECTIONS
from waiting import wait_until


@pytest.fixture(scope="module")
async def system(module_root: Path) -> AsyncIterator[System]:
    async with running(module_root, render_ms="50-200") as system:
        yield system


async def test_it_rebuilds_while_jobs_complete_and_readers_read(
    system: System, witness: Witness, crowds: list[Crowd]
) -> None:
    async with _busy(system, crowds) as seen:
        await wait_until(lambda: _begun(system), 30, "every live table has come to an event", 0.1)
        for nth in range(2):
            told = await _replayed(system, f"replay-{nth}", "all")
            assert told["differences"] == []
            assert "inventory" in told["compared"]
    assert seen[200] > 20, seen
    await _judged(witness, crowds)
    before = await _everything(system)
    told = await _replayed(system, "replay-at-rest", "all")
    assert set(told["compared"]) == {projection.name for projection in PROJECTIONS}
    assert await _everything(system) == before


@pytest.mark.fault("D9")
async def test_one_that_is_killed_is_run_again(system: System, witness: Witness, crowds: list[Crowd]) -> None:
    async with _busy(system, crowds):
        for nth in range(3):
            await _killed_in_the_act(system, _command(system, f"killed-{nth}", "all"))
        await _replayed(system, "after-the-kills", "all")
    assert await _shadow(system) is None
    await _judged(witness, crowds)


@pytest.mark.fault("D9")
async def test_a_wiped_database_is_rebuilt_while_forge_serves(
    system: System, witness: Witness, crowds: list[Crowd]
) -> None:
    async with _busy(system, crowds) as seen, system.client("mei") as mei:
        await wait_until(lambda: _wiped(system), 60, "all tables are gone")
        await ask_until_answered(mei, request("mei"))
    say(f"readers saw {seen}")
    await _judged(witness, crowds)
    assert system.deaths == []


async def _wiped(system: System) -> bool:
    connection = await asyncpg.connect(system.postgres_dsn)
    try:
        await connection.execute("drop schema public cascade")
    except asyncpg.DeadlockDetectedError:  # with somebody who writes to several tables
        return False
    finally:
        await connection.close()
    return True


async def _begun(system: System) -> bool:
    connection = await asyncpg.connect(system.postgres_dsn)
    try:
        at = await connection.fetch("select seq from projection_checkpoint where projection <> 'usage'")
        return len(at) == len(PROJECTIONS) - 1 and all(row["seq"] for row in at)
    finally:
        await connection.close()


@asynccontextmanager
async def _busy(system: System, crowds: list[Crowd]) -> AsyncIterator[Counter[int]]:
    """Players ask, others read without a pause; nobody is ever told of an error of ours."""
    crowd = Crowd(system, scaled(20), users=5, dice=random.Random(f"{SEED} {len(crowds)}"), pause=0.3)
    crowds.append(crowd)
    say(f"FORGE_TEST_SEED={SEED}")
    seen: Counter[int] = Counter()
    async with asyncio.TaskGroup() as group:
        playing = group.create_task(crowd.play())
        reading = [group.create_task(_read(system, seen)) for _ in range(2)]
        yield seen
        await playing
        for reader in reading:
            reader.cancel()
    assert seen.keys() <= {200, 503}, seen


async def _read(system: System, seen: Counter[int]) -> None:
    async with system.client() as operator:
        while True:
            for path in ("/assets?limit=5", "/queue", "/stats", "/usage"):
                answer = await operator.get(path)
                seen[answer.status_code] += 1
                if answer.status_code == 503:
                    assert answer.headers.get("retry-after")
                    await asyncio.sleep(0.05)


def _command(system: System, name: str, *words: str) -> Command:
    log = system.root / "log" / f"{name}.log"
    return Command(["replay", *words], log, system.environ(name))


async def _replayed(system: System, name: str, *words: str) -> dict[str, Any]:
    replay = _command(system, name, *words, "--json")
    process = replay.launch()
    await wait_until(lambda: not process.running, 100, "the replay ends")
    said = replay.log.read_text()
    assert process.exit_status == 0, said
    told: dict[str, Any] = msgspec.json.decode(said[said.index("{") :])
    return told


async def _killed_in_the_act(system: System, replay: Command) -> None:
    """Kill it once it has begun to fill tables of its own, not those that another one left."""
    before, process = await _shadow(system), replay.launch()
    connection = await asyncpg.connect(system.postgres_dsn)

    async def under_way() -> bool:
        nonlocal process
        if not process.running:  # it was done before anybody looked
            process = replay.launch()
        return await connection.fetchval(_SHADOW) not in (None, before)

    try:
        await wait_until(under_way, 60, "a replay is under way", 0.002)
    finally:
        await connection.close()
        replay.kill()


_SHADOW = "select oid from pg_namespace where nspname = 'forge_shadow'"


async def _shadow(system: System) -> int | None:
    """Where a replay is under way, or was ended before its end."""
    connection = await asyncpg.connect(system.postgres_dsn)
    try:
        found: int | None = await connection.fetchval(_SHADOW)
        return found
    finally:
        await connection.close()


async def _everything(system: System) -> dict[str, list[str]]:
    """All rows but of samples, which go on being taken."""
    connection = await asyncpg.connect(system.postgres_dsn)
    try:
        found = await tables(connection, [p for p in PROJECTIONS if p.stream == EVENTS])
        del found["projection_checkpoint"]
        return found
    finally:
        await connection.close()


async def _judged(witness: Witness, crowds: list[Crowd]) -> None:
    asked = [one for crowd in crowds for one in crowd.asked]
    evidence = await settled(witness, timeout=120)
    accepted = {id_ for one in asked for id_ in one.answers}
    assert set(ends(evidence, accepted)) == {"completed"}
