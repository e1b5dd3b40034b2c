"""`forge doctor` names the cause of each prepared breakage and nothing else, and its remedy mends it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from acceptance.system import System, running
from forge import topology
from forge.broker import connect, request
from forge.doctor import Finding, Level, examine
from forge.doctor.gathering import SECONDS, Clock, utc
from waiting import wait_until

SECRET = "a-secret-that-nobody-guesses"
LIMIT = 100_000_000
JOB = {"job_type": "ui_icon", "params": {"width": 256, "height": 256}}


class Clinic:
    """A system that is well, and what the doctor says of it."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.environ = system.environ("api")

    async def examined(self, clock: Clock = utc, **changed: str) -> dict[str, Finding]:
        """What is wrong, by check; ``changed`` are variables of the doctor's own, and so is the ``clock``."""
        return wrong(await examine(self.environ | changed, clock=clock))

    async def well(self, **changed: str) -> None:
        """Wait until nothing is wrong."""

        async def all_right() -> bool:
            self.last = await self.examined(**changed)
            return not self.last

        self.last: dict[str, Finding] = {}
        try:
            await wait_until(all_right, 60, "the system is well", 0.1)
        except AssertionError as error:
            raise AssertionError(self.last) from error

    async def names(self, check: str, said: str, remedy: str, clock: Clock = utc, **changed: str) -> Finding:
        """Wait until one thing is wrong, and nothing else; it is this, and this mends it."""

        async def only_that() -> bool:
            self.last = await self.examined(clock, **changed)
            return self.last.keys() == {check}

        try:
            await wait_until(only_that, 60, f"only {check} is wrong", 0.1)
        except AssertionError as error:
            raise AssertionError(self.last) from error
        found = self.last[check]
        assert said in found.found
        assert remedy in found.remedy
        return found

    async def forge(self, *words: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "forge", *words],
            env=self.environ | changed,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    async def sql(self, statement: str) -> None:
        connection = await asyncpg.connect(self.system.postgres_dsn)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    async def jetstream(self, subject: str, body: Any = None) -> Any:
        nc = await connect(self.system.nats.url, "test")
        try:
            return json.loads(await request(nc, subject, body))
        finally:
            await nc.close()

    async def picture(self) -> None:
        async with self.client() as client:
            job = (await client.post("/jobs", json=JOB)).raise_for_status().json()

            async def done() -> bool:
                return bool((await client.get(f"/jobs/{job['id']}")).json()["status"] == "completed")

            await wait_until(done, 60, "the picture is made", 0.1)

    def client(self) -> Any:
        client = self.system.client()
        client.headers["Authorization"] = f"Bearer {SECRET}"
        return client


def wrong(findings: list[Finding]) -> dict[str, Finding]:
    return {f.check: f for f in findings if f.level in (Level.WARNING, Level.FAILURE)}


@pytest.fixture(scope="module")
async def a_system(module_root: Path) -> AsyncIterator[Clinic]:
    variables = {
        "FORGE_API_KEYS": f"operator:ops:{SECRET}",
        "FORGE_SCAN_SECONDS": "3600",  # what is broken stays so
        "FORGE_DISK_LIMIT_BYTES": str(LIMIT),
    }
    async with running(module_root, render_ms="0", **variables) as system:
        clinic = Clinic(system)
        await clinic.picture()
        await clinic.well()
        yield clinic


@pytest.fixture
async def clinic(a_system: Clinic) -> AsyncIterator[Clinic]:
    """The system; what a test broke, it mends."""
    yield a_system
    await a_system.well()


@pytest.mark.parametrize(
    ("name", "check", "remedy"),
    [
        ("nats", "nats", "start nats-server"),
        ("postgres", "postgres", "start Postgres"),
        ("sim", "comfyui", "FORGE_COMFYUI_URLS"),
        ("api", "api", "forge api"),
        ("generation", "workers", "forge worker --roles generation"),
        ("housekeeping", "workers", "forge worker --roles cleanup"),
    ],
)
async def test_a_process_that_is_not_there(clinic: Clinic, name: str, check: str, remedy: str) -> None:
    clinic.system.kill(name)
    await clinic.names(check, "", remedy)
    clinic.system.start(name)


async def test_a_projector_that_is_not_there_leaves_the_tables_behind(clinic: Clinic) -> None:
    clinic.system.kill("projector")
    async with clinic.client() as client:
        (await client.post("/jobs", json=JOB)).raise_for_status()
    await clinic.names("projections", "not moving", "forge worker --roles projector")
    clinic.system.start("projector")


async def test_servers_that_hang_are_told_in_time(clinic: Clinic) -> None:
    await clinic.system.freeze("nats")
    await clinic.system.freeze("postgres")

    async def told() -> dict[str, Finding]:
        async with asyncio.timeout(5 * SECONDS):
            found = await clinic.examined()
        return found if found.keys() == {"nats", "postgres"} else {}  # a busy machine may add to them once

    try:
        found = await wait_until(told, 30, "these two hang")
    finally:
        clinic.system.thaw("nats")
        clinic.system.thaw("postgres")
    assert f"no answer within {SECONDS:.0f} s" in found["nats"].found


async def test_a_volume_that_is_not_mounted(clinic: Clinic) -> None:
    assets, away = clinic.system.assets_dir, clinic.system.root / "away"
    assets.rename(away)
    assets.mkdir()
    await clinic.names("volume", "not the asset volume", "mount the volume")
    assets.rmdir()
    await clinic.names("volume", "not the asset volume", "mount the volume")
    away.rename(assets)


@pytest.mark.parametrize(
    ("part", "level", "said"),
    [(0.85, Level.WARNING, "85%"), (0.93, Level.WARNING, "clean-ups"), (0.999, Level.FAILURE, "is full")],
)
async def test_a_disk_over_its_lines(clinic: Clinic, part: float, level: Level, said: str) -> None:
    used = sum(file.stat().st_size for file in clinic.system.assets_dir.rglob("*") if file.is_file())
    filler = clinic.system.assets_dir / "thumbs" / "filler"
    filler.touch()
    os.truncate(filler, int(LIMIT * part) - used)
    assert (await clinic.names("disk", said, "make room")).level == level
    filler.unlink()


async def test_a_stream_that_was_changed_by_hand(clinic: Clinic) -> None:
    config = (await clinic.jetstream(f"STREAM.INFO.{topology.DISPATCH}"))["config"]
    await clinic.jetstream(f"STREAM.UPDATE.{topology.DISPATCH}", config | {"max_msgs": 5})
    await clinic.names(
        "streams", "FORGE_DISPATCH differs from its file under nats/ in max_msgs", "forge setup"
    )
    assert (await clinic.forge("setup")).returncode == 0


async def test_a_consumer_that_was_deleted(clinic: Clinic) -> None:
    await clinic.jetstream(f"CONSUMER.DELETE.{topology.DISPATCH}.{topology.GENERATION}")
    await clinic.names("streams", "FORGE_DISPATCH.generation is missing", "forge setup")
    assert (await clinic.forge("setup")).returncode == 0


async def test_a_database_without_tables(clinic: Clinic) -> None:
    await clinic.sql("create database bare")
    dsn = clinic.system.postgres.dsn("bare")
    await clinic.names("tables", "not applied: 0001", "forge setup", FORGE_POSTGRES_DSN=dsn)
    assert (await clinic.forge("setup", FORGE_POSTGRES_DSN=dsn)).returncode == 0
    assert "tables" not in await clinic.examined(FORGE_POSTGRES_DSN=dsn)


async def test_a_database_of_a_newer_forge(clinic: Clinic) -> None:
    await clinic.sql("insert into forge_migration (number, name, checksum) values (99, '0099_new.sql', '')")
    await clinic.names("tables", "at migration 99", "newer forge")
    await clinic.sql("delete from forge_migration where number = 99")


async def test_a_migration_that_was_changed_after_it_was_applied(clinic: Clinic) -> None:
    await clinic.sql("update forge_migration set checksum = 'x' || checksum where number = 2")
    await clinic.names("tables", "0002_uploads.sql is not the file", "put the released file back")
    await clinic.sql("update forge_migration set checksum = substr(checksum, 2) where number = 2")


async def test_a_setting_that_cannot_be_used(a_system: Clinic) -> None:
    found = await a_system.names(
        "settings", "FORGE_QUEUE_LIMIT='lots'", "forge settings", FORGE_QUEUE_LIMIT="lots"
    )
    assert found.level == Level.FAILURE
    ratios = {"FORGE_DISK_WARN_RATIO": "0.99"}  # over the default of the next line
    await a_system.names("settings", "FORGE_DISK_CLEAN_RATIO=0.9", "FORGE_DISK_CLEAN_RATIO", **ratios)


async def test_a_model_that_comfyui_does_not_have(a_system: Clinic) -> None:
    nowhere = {"FORGE_MODELS": "checkpoint=nowhere.safetensors"}
    said = "CheckpointLoaderSimple has no ckpt_name 'nowhere.safetensors'"
    found = await a_system.names("job_types", said, "FORGE_MODELS", **nowhere)
    assert found.found.startswith("character_portrait, fate_card, npc_bust, ui_icon cannot be drawn at ")


async def test_a_variable_that_is_misspelt(a_system: Clinic) -> None:
    await a_system.names(
        "settings", "FORGE_QUEUE_LIMITS is no setting", "FORGE_QUEUE_LIMIT", FORGE_QUEUE_LIMITS="9"
    )


async def test_working_files_of_a_dead_process(clinic: Clinic) -> None:
    left = clinic.system.assets_dir / "tmp" / "attempt.0"
    left.mkdir()
    (left / "half.png").write_bytes(b"half")
    soon = {"FORGE_ORPHAN_GRACE_SECONDS": "0"}
    await clinic.names("leftovers", "1 working files", "forge cleanup --reason temporary", **soon)
    assert (await clinic.forge("cleanup", "--reason", "temporary", **soon)).returncode == 0
    assert not left.exists()


async def test_a_folder_of_comfyui_that_is_not_there(a_system: Clinic) -> None:
    nowhere = {"FORGE_COMFYUI_DIRS": str(a_system.system.root / "nowhere")}
    await a_system.names("comfyui", "there is no such directory", "FORGE_COMFYUI_DIRS", **nowhere)


@pytest.mark.parametrize(
    ("by", "level"), [(timedelta(minutes=-10), Level.FAILURE), (timedelta(seconds=30), Level.WARNING)]
)
async def test_a_clock_that_is_wrong(a_system: Clinic, by: timedelta, level: Level) -> None:
    found = await a_system.names("clocks", "", "", clock=lambda: datetime.now(UTC) + by)
    assert found.level == level
    assert "set the clock of this machine right" in found.remedy


_SQUATTER = """
from http.server import *
server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def squatter() -> Iterator[int]:
    """A port where somebody else serves."""
    words = [sys.executable, "-c", _SQUATTER]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


async def test_a_port_that_somebody_else_has(a_system: Clinic, squatter: int) -> None:
    await a_system.names("api", "is no forge", "FORGE_PORT", FORGE_PORT=str(squatter))


async def test_a_nats_server_that_lets_nobody_in(a_system: Clinic, tmp_path: Path) -> None:
    for name, said in (("operator", "does not let in user 'operator'"), ("api", "operator: No such file")):
        directory = tmp_path / name
        directory.mkdir()
        (directory / name).write_text("wrong")
        variables = {"FORGE_NATS_PASSWORDS_DIR": str(directory)}
        await a_system.names("nats", said, "FORGE_NATS_PASSWORDS_DIR", **variables)


async def test_keys_that_can_be_guessed(a_system: Clinic) -> None:
    found = await a_system.names("keys", "operator:me", "16 random", FORGE_API_KEYS="operator:me:hunter2")
    assert "hunter2" not in found.found + found.remedy
    await a_system.names("keys", "there is no key", "forge keys create", FORGE_API_KEYS="")
    file = a_system.system.root / "keys"
    file.write_text(f"operator:ops:{SECRET}\n")
    await a_system.well(FORGE_API_KEYS="", FORGE_API_KEYS_FILE=str(file))
    file.write_text("king:ops:secret")
    await a_system.names(
        "settings", "FORGE_API_KEYS", "another value", FORGE_API_KEYS="", FORGE_API_KEYS_FILE=str(file)
    )


async def test_the_command_says_it_in_lines_and_in_json_and_by_its_status(a_system: Clinic) -> None:
    await a_system.well()
    well = await a_system.forge("doctor")
    assert (well.returncode, well.stderr) == (0, "")
    assert "warning" not in well.stdout
    ill = await a_system.forge("doctor", "--json", FORGE_NATS_URL="nats://127.0.0.1:9")
    assert (ill.returncode, ill.stderr) == (1, "")
    told = [json.loads(line) for line in ill.stdout.splitlines()]
    assert [f["check"] for f in told if f["level"] == "failure"] == ["nats"]
    assert all(f["remedy"] for f in told if f["level"] in ("warning", "failure"))
