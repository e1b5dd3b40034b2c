"""Two versions of forge beside each other over one log, one database and one volume, while jobs run."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import asyncpg
import nats
import pytest

from acceptance.balancing import Load, balanced
from acceptance.checker import Asked
from acceptance.evidence import Witness
from acceptance.newer import MOOD, newer
from acceptance.players import ask_until_answered, request, scaled
from acceptance.settling import ends, settled, watching
from acceptance.system import System, running, say
from waiting import wait_until

PLAYERS = 4
BESIDE = ("projector2", "dispatcher2", "generation2", "api2")
"""Members of the next version while this one runs as well."""
READERS = ("api", "dispatcher")
"""Members of this version that read every event."""


@pytest.mark.timeout(300)
@pytest.mark.fault("C1")
async def test_two_versions_beside_each_other_and_the_old_one_is_refused_where_it_must_be(root: Path) -> None:
    next_version = newer(root / "next")
    async with (
        running(root, render_ms="5-20", apis=2, FORGE_LEAVE_SECONDS="4") as system,
        watching(system) as witness,
    ):
        async with balanced(system) as (client, balancer):
            asked: list[Asked] = []
            load = Load(client, asked, scaled(30))
            async with asyncio.TaskGroup() as players:
                for nth in range(PLAYERS):
                    players.create_task(load.player(f"user-{nth}"))
                assert f"_{MOOD}.sql: applied" in await _forge(system, "setup", sources=next_version)
                await load.goes_on(2 * PLAYERS, "the new version set up its own")
                await _start_beside(system, next_version)
                await wait_until(
                    lambda: _version(system, "queue", 2), 60, "the new one has filled its tables"
                )
                await load.goes_on(2 * PLAYERS, "both versions run")
                assert system.deaths == []
                await _an_old_one_that_starts_is_refused(system, next_version)
                await load.goes_on(2 * PLAYERS, "one was refused")
                await wait_until(lambda: _both_have_drawn(system, witness), 60, "both versions have drawn")
                load.enough.set()
            say(f"{len(load.asked)} jobs, answers {balancer.answers}")
            assert balancer.broken == []
            assert balancer.answers.keys() <= {200, 202, 503}
        evidence = await settled(witness, load.asked, timeout=120)
        assert {e.type for e in evidence.events if e.type.endswith("failed.v1")} == set()
        assert set(ends(evidence)) == {"completed"}

        await _what_the_new_one_writes_stops_the_old_one_until_it_is_upgraded(
            system, witness, load, next_version
        )


async def _both_have_drawn(system: System, witness: Witness) -> bool:
    told = await witness.events()
    drew = {e.data["worker"].split("-")[-2] for e in told if e.type == "forge.job.started.v1"}
    return drew >= {str(system.process(name).pid) for name in ("generation", "generation2")}


async def _start_beside(system: System, next_version: Path) -> None:
    system.terminate("api2")
    await wait_until(lambda: not system.process("api2").running, 60, "the old api2 has ended")
    system.start_other(next_version, *BESIDE)
    await system.ready()


async def _an_old_one_that_starts_is_refused(system: System, next_version: Path) -> None:
    """It starts again and again, as its supervisor wants, and says each time why it does not."""
    before = await _samples(system)
    assert "this forge knows" in await _forge(system, "setup", status=2)
    assert await _samples(system) == before, "it has changed nothing"
    system.kill("housekeeping")
    system.start("housekeeping")
    await wait_until(lambda: "housekeeping ended with status 2" in system.deaths, 60, "it is refused")
    assert "upgrade forge" in _log(system, "housekeeping")
    system.kill("housekeeping")
    system.start_other(next_version, "housekeeping")


async def _what_the_new_one_writes_stops_the_old_one_until_it_is_upgraded(
    system: System, witness: Witness, load: Load, next_version: Path
) -> None:
    system.terminate("generation2")  # for the old worker to get all orders
    await wait_until(lambda: not system.process("generation2").running, 60, "the new worker has ended")
    (system.data_dir / MOOD).touch()
    asked = [request("mei") for _ in range(4)]
    async with system.client("mei", "api2") as mei:
        for one in asked:
            await ask_until_answered(mei, one)

    def refused() -> set[str]:
        return {death.split()[0] for death in system.deaths if death.endswith(" with status 2")}

    await wait_until(lambda: refused() >= {*READERS}, 60, "every old reader has ended with status 2")
    for name in READERS:
        assert MOOD in _log(system, name)
        assert "upgrade it" in _log(system, name), _log(system, name)[-1000:]
    await wait_until(lambda: _handed_back(system), 60, "the old worker hands back what it can not read")
    assert "a newer forge looks after the tables of queue: upgrade this one" in _log(system, "projector")
    for name in (*READERS, "projector", "generation"):
        system.kill(name)
    system.start_other(next_version, *READERS, "generation2")
    await system.ready()
    asked.append(request("mei"))
    async with system.client("mei") as mei:
        await ask_until_answered(mei, asked[-1])
    evidence = await settled(witness, [*load.asked, *asked])
    new = {id_ for one in asked for id_ in one.answers}
    assert set(ends(evidence, new)) == {"completed"}
    assert {id_: row[MOOD] for id_, row in evidence.jobs.items() if row[MOOD]} == dict.fromkeys(new, "calm")


def _handed_back(system: System) -> bool:
    lines = _log(system, "generation").splitlines()
    return any("handling is interrupted" in line and "upgrade it" in line for line in lines)


async def _version(system: System, projection: str, wanted: int) -> bool:
    connection = await asyncpg.connect(system.postgres_dsn)
    try:
        found = await connection.fetchval(
            "select version from projection_checkpoint where projection = $1", projection
        )
    finally:
        await connection.close()
    return bool(found == wanted)


async def _samples(system: System) -> object:
    """How the stream of samples is set up, which the next version changes."""
    nc = await nats.connect(system.nats.url)
    try:
        return (await nc.jetstream().stream_info("FORGE_METRICS")).config
    finally:
        await nc.close()


async def _forge(system: System, *words: str, sources: Path | None = None, status: int = 0) -> str:
    environ = system.environ("api")
    if sources is not None:
        environ["PYTHONPATH"] = str(sources)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "forge", *words),
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == status, said
    return said


def _log(system: System, name: str) -> str:
    return (system.root / "log" / f"{name}.log").read_text()
