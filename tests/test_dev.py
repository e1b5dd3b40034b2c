"""`forge dev` and `forge demo` as a user meets them: processes, one line, pictures, and a clean end."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from forge import dev
from forge.demo import faults_of
from forge.embedded import EmbeddedNats
from forge.embedded.record import DevRecord, running
from forge.errors import ServerFailed
from processes import alive
from waiting import wait_until

READY = "forge ready at "
PATIENCE = 200
"""Seconds for a command that starts half a dozen processes and draws pictures."""


class Forge:
    """One run of a forge command."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""

    async def ready(self) -> str:
        """Its URL, from the first line it prints."""
        assert self.process.stdout is not None
        line = (await asyncio.wait_for(self.process.stdout.readline(), PATIENCE)).decode()
        if not line.startswith(READY):
            raise AssertionError((line, await self.ended()))
        self.url = line.removeprefix(READY).strip()
        return self.url

    async def ended(self) -> tuple[int, str, str]:
        """Exit status, the rest of stdout, stderr."""
        out, err = await asyncio.wait_for(self.process.communicate(), PATIENCE)
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()

    async def stop(self) -> tuple[int, str, str]:
        self.process.terminate()
        return await self.ended()


Run = Callable[..., Awaitable[Forge]]


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """Short and open, as root's Postgres needs it."""
    path = Path(tempfile.mkdtemp(prefix="forge-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def run() -> AsyncIterator[Run]:
    """Starts forge commands on free ports; what still runs when the test ends is stopped."""
    started: list[Forge] = []

    async def start(command: str, data_dir: Path, *words: str, **variables: str) -> Forge:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FORGE_")}
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "forge",
                command,
                "--data-dir",
                str(data_dir),
                *(words or ("--port", "0")),
            ),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environ | variables,
        )
        started.append(Forge(process))
        return started[-1]

    yield start
    for forge in started:
        if forge.process.returncode is None:
            await forge.stop()


def record_of(data_dir: Path) -> DevRecord:
    record = running(data_dir)
    assert record is not None
    return record


async def serves(client: httpx.AsyncClient, path: str) -> None:
    async def answered() -> bool:
        try:
            return (await client.get(path)).status_code == 200
        except httpx.TransportError:
            return False

    await wait_until(answered, 100, f"{path} answers")


def remaining(pids: dict[str, int]) -> set[str]:
    return {name for name, pid in pids.items() if alive(pid)}


async def test_dev_says_one_line_serves_and_leaves_nothing_behind(run: Run, data_dir: Path) -> None:
    forge = await run("dev", data_dir)
    url = await forge.ready()
    children = record_of(data_dir).children
    assert set(children) == {"nats", "sim", "postgres", "api", "worker"}
    async with httpx.AsyncClient(base_url=url) as client:
        await serves(client, "/readyz")
        await serves(client, "/api/v1/comfyui/stats")
    assert await forge.stop() == (0, "", "")
    assert remaining(children) == set()
    assert running(data_dir) is None
    assert not (data_dir / "dev.json").exists()
    assert {log.stem for log in (data_dir / "log").glob("*.log")} == set(children)


async def test_dev_once_leaves_when_everything_serves(run: Run, data_dir: Path) -> None:
    forge = await run("dev", data_dir, "--port", "0", "--once")
    status, out, err = await forge.ended()
    assert (status, err) == (0, "")
    assert out.startswith(READY)
    assert out.count("\n") == 1


async def test_a_start_after_kill_9_takes_over_port_and_data(run: Run, data_dir: Path) -> None:
    forge = await run("dev", data_dir)
    url = await forge.ready()
    port = url.rpartition(":")[2]
    children = record_of(data_dir).children
    async with httpx.AsyncClient(base_url=f"{url}/api/v1/comfyui", timeout=30) as client:

        async def accepted() -> dict[str, str] | None:
            asked = {"job_type": "ui_icon", "params": {}}
            made = await client.post("/jobs", json=asked, headers={"Idempotency-Key": "one"})
            return made.json() if made.is_success else None

        job = await wait_until(accepted, 60, "a job is accepted")
    forge.process.kill()
    await forge.process.wait()
    again = await run("dev", data_dir, "--port", port)
    assert await again.ready() == url
    assert remaining(children) == set()
    async with httpx.AsyncClient(base_url=f"{url}/api/v1/comfyui", timeout=30) as client:

        async def completed() -> bool:
            return bool((await client.get(f"/jobs/{job['id']}")).json()["status"] == "completed")

        await wait_until(completed, timeout=100, what="the job of the killed run is completed")


async def test_a_killed_child_is_started_again_and_named_on_stderr(run: Run, data_dir: Path) -> None:
    forge = await run("dev", data_dir)
    url = await forge.ready()
    first = record_of(data_dir).children
    for name in ("api", "nats", "postgres"):
        os.kill(first[name], signal.SIGKILL)

    def all_replaced() -> bool:
        now = record_of(data_dir).children
        return all(now[name] != first[name] for name in ("api", "nats", "postgres"))

    await wait_until(all_replaced, timeout=100, what="new processes")
    async with httpx.AsyncClient(base_url=url, timeout=5) as client:
        await serves(client, "/readyz")
    status, _, err = await forge.stop()
    assert status == 0
    for name in ("api", "nats", "postgres"):
        assert f"forge: {name} was killed; again in" in err


async def test_two_run_side_by_side_and_a_second_on_one_directory_is_refused(
    run: Run, data_dir: Path
) -> None:
    one, other = await run("dev", data_dir / "a"), await run("dev", data_dir / "b")
    assert await one.ready() != await other.ready()
    status, out, err = await (await run("dev", data_dir / "a")).ended()
    assert (status, out) == (2, "")
    assert f"in use by process {one.process.pid}" in err
    assert (await one.stop())[0] == (await other.stop())[0] == 0


async def test_servers_of_the_environment_are_used_instead_of_embedded_ones(
    run: Run, data_dir: Path, nats_server: EmbeddedNats, empty_database_dsn: str
) -> None:
    forge = await run(
        "dev",
        data_dir,
        "--port",
        "0",
        "--comfyui",
        "http://127.0.0.1:9",
        FORGE_NATS_URL=nats_server.url,
        FORGE_POSTGRES_DSN=empty_database_dsn,
    )
    await forge.ready()
    record = record_of(data_dir)
    assert set(record.children) == {"api", "worker"}
    assert (record.nats_url, record.postgres_dsn) == (nats_server.url, empty_database_dsn)
    assert record.comfyui_urls == ("http://127.0.0.1:9",)
    assert (await forge.stop())[0] == 0
    assert nats_server.process is not None
    assert nats_server.process.running


async def test_a_taken_port_is_refused_before_anything_starts(run: Run, data_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        forge = await run("dev", data_dir, "--port", str(taken.getsockname()[1]))
        status, out, err = await forge.ended()
    assert (status, out) == (2, "")
    assert "choose another port with --port" in err
    assert not (data_dir / "nats").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a port cannot be kept so")
def test_a_port_is_kept_for_who_asks_for_it_by_number() -> None:
    with dev.kept_port("127.0.0.1", 0) as port:
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        for _ in range(2):  # a child, and the one that is started when it died
            socket.create_server(("127.0.0.1", port)).close()
        with socket.create_server(("127.0.0.1", port)), pytest.raises(ServerFailed, match="choose another"):
            dev.free_port("127.0.0.1", port)


async def test_a_job_type_that_cannot_be_used_ends_the_start_with_its_reason(
    run: Run, data_dir: Path
) -> None:
    (data_dir / "mine").mkdir()
    (data_dir / "mine" / "swatch.toml").write_text('asset_type = "ui_icon"\n')
    forge = await run("dev", data_dir, FORGE_WORKFLOWS_DIR=str(data_dir / "mine"))
    status, out, err = await forge.ended()
    assert (status, out) == (2, "")
    assert "swatch" in err
    assert "Traceback" not in err


async def test_a_signal_while_it_starts_stops_it_cleanly(run: Run, data_dir: Path) -> None:
    forge = await run("dev", data_dir, FORGE_DISK_RESERVE_BYTES=str(1 << 60))  # so it is never ready

    def launched() -> dict[str, int] | None:
        record = running(data_dir)
        return record.children if record and len(record.children) == 5 else None

    children = await wait_until(launched, timeout=100, what="everything was launched")
    status, out, _ = await forge.stop()
    assert (status, out) == (0, "")
    assert remaining(children) == set()


async def test_the_demo_checks_every_picture_and_a_second_one_finds_the_first(
    run: Run, data_dir: Path
) -> None:
    status, out, err = await (await run("demo", data_dir, "--port", "0", "--once")).ended()
    assert (status, err) == (0, ""), out
    assert "12 assets of 12 jobs, 0 with faults; 12 in all" in out
    for kind in ("character_portrait", "npc_bust", "fate_card", "ui_icon"):
        assert kind in out

    forge = await run("dev", data_dir, FORGE_SCAN_SECONDS="86400")  # what is damaged below stays
    url = await forge.ready()
    status, out, err = await (await run("demo", data_dir, "--once")).ended()
    assert (status, err) == (0, ""), out
    assert f"a forge runs here already: {url}" in out
    assert "12 assets of earlier runs are still here" in out
    assert "12 assets of 12 jobs, 0 with faults; 24 in all" in out

    async with httpx.AsyncClient(base_url=f"{url}/api/v1/comfyui", timeout=30) as client:
        await serves(client, "/assets")
        record = (await client.get("/assets")).json()["items"][0]
        assert await faults_of(client, record) == []
        (file,) = (data_dir / "assets").rglob(f"*{record['content_hash']}*.png")
        file.chmod(0o600)
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        assert len(await faults_of(client, record)) == 1


async def test_the_demo_comes_again_when_forge_is_busy_but_not_when_it_is_for_long() -> None:
    asked: list[str] = []
    wait = "0"

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        if asked.count(request.path) == 1:
            return web.Response(status=503, headers={"Retry-After": wait})
        return web.Response(body=b"RIFF....WEBP")

    app = web.Application()
    app.router.add_get("/assets/{id}/{what}", answer)
    async with TestServer(app) as server, httpx.AsyncClient(base_url=str(server.make_url(""))) as client:
        digest = hashlib.sha256(b"RIFF....WEBP").hexdigest()
        assert await faults_of(client, {"id": "one", "content_hash": digest}) == []
        wait = "10"
        assert await faults_of(client, {"id": "two", "content_hash": digest}) == [
            "file: status 503",
            "thumbnail: status 503",
        ]
    assert sorted(asked) == sorted(
        [*2 * ("/assets/one/file", "/assets/one/thumbnail"), "/assets/two/file", "/assets/two/thumbnail"]
    )
