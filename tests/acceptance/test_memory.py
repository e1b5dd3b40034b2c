"""Memory of real processes: large pictures pass through, pressure sheds work and is over when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from PIL import Image

from acceptance.players import ask_until_answered, request
from acceptance.settling import ends, happened, settled, watching
from acceptance.system import API, WORKERS, System, running
from waiting import wait_until

MIB = 1024 * 1024
SIDE = 4096
BODY_BYTES = 2 * MIB

_GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "noise.png"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "noise"}},
}
_DESCRIPTION = """
asset_type = "backdrop"
description = "The largest picture there is, and no pixel like the other"
timeout_seconds = 110
outputs = ["2"]
"""


async def test_a_picture_of_4096_pixels_does_not_pass_through_the_worker_s_memory(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "noise.json").write_text(json.dumps(_GRAPH))
    (tmp_path / "noise.toml").write_text(_DESCRIPTION)
    async with running(root, render_ms="20", FORGE_WORKFLOWS_DIR=str(tmp_path)) as system:
        await _upload_noise(system)
        async with watching(system) as witness, system.client("mei") as mei:
            asked = [request("mei")]
            await happened(witness, "completed", job=await ask_until_answered(mei, asked[0]))
            worker = system.process("generation").pid
            before = _peak(worker)
            asked.append(request("mei", job_type="noise", params={}))
            await happened(witness, "completed", job=await ask_until_answered(mei, asked[1]), timeout=100)
            grown = _peak(worker) - before
            evidence = await settled(witness, asked)
        large = max(evidence.assets.values(), key=lambda row: row["file_size_bytes"])
        assert (large["width"], large["height"]) == (SIDE, SIDE)
        assert large["file_size_bytes"] > 45 * MIB
        assert grown < 16 * MIB, f"the worker grew by {grown / MIB:.1f} MiB"
        assert system.process("generation").pid == worker


@pytest.mark.fault("M1")
async def test_an_api_short_of_memory_sheds_work_answers_readers_and_recovers(root: Path) -> None:
    async with running(root, render_ms="20") as system, watching(system) as witness:
        async with system.client("mei") as mei:
            asked = [request("mei") for _ in range(2)]
            for one in asked:
                await ask_until_answered(mei, one)
            usual = psutil.Process(system.process("api").pid).memory_info().rss
            await _anew(system, "api", FORGE_MEMORY_LIMIT_BYTES=str(round((usual + 50 * MIB) / 0.9)))
            await system.ready()
            pid = system.process("api").pid
            async with _unfinished_bodies(system, 60):
                refused = await _shed(mei)
                assert int(refused.headers["retry-after"]) > 0
                for path in ("/queue", "/assets", "/stats", "/usage"):
                    assert (await mei.get(path)).status_code == 200, "reading goes on"
                await wait_until(
                    lambda: _short_of_memory(system), 30, "it says so, and that all else is well"
                )
            asked.append(request("mei"))
            await ask_until_answered(mei, asked[-1])  # as soon as the memory is given back
            evidence = await settled(witness, asked)
        assert ends(evidence) == ["completed"] * 3
        assert (system.process("api").pid, system.deaths) == (pid, []), "it shed before it was killed"
        log = (system.root / "log" / "api.log").read_text()
        assert "memory is short" in log
        assert "memory is enough again" in log


@pytest.mark.fault("M1")
async def test_a_worker_short_of_memory_begins_nothing_and_loses_nothing(root: Path) -> None:
    others = tuple(name for name in WORKERS if name != "generation")
    async with running(root, render_ms="20", workers=others) as system, watching(system) as witness:
        await _anew(system, "generation", FORGE_MEMORY_LIMIT_BYTES=str(MIB))
        async with system.client("mei") as mei:
            asked = [request("mei") for _ in range(4)]
            for one in asked:
                await ask_until_answered(mei, one)
            log = system.root / "log" / "generation.log"
            await wait_until(lambda: log.exists() and "memory is short" in log.read_text(), 60, "it is short")
            await wait_until(lambda: _three_orders(witness), 60, "orders wait for a worker")
            assert not any(event.type == "forge.job.started.v1" for event in await witness.events())
            await _anew(system, "generation", FORGE_MEMORY_LIMIT_BYTES=str(1024 * MIB))
            evidence = await settled(witness, asked)
        assert ends(evidence) == ["completed"] * 4
        assert not any(event.type == "forge.job.attempt_failed.v1" for event in evidence.events)


async def _three_orders(witness: object) -> bool:
    return len(await witness.orders()) == 3  # type: ignore[attr-defined]


async def _anew(system: System, name: str, **variables: str) -> None:
    """Start a member in another environment than the rest."""
    if name in system.members:
        system.kill(name)
        del system.members[name]
    usual, system._more = system._more, system._more | variables
    system.start(name)
    system._more = usual


async def _upload_noise(system: System) -> None:
    """A picture that no encoder makes smaller, as an input of the simulator's."""
    image = Image.frombytes("RGB", (SIDE, SIDE), os.urandom(SIDE * SIDE * 3))
    path = system.root / "noise.png"
    image.save(path, compress_level=0)
    async with httpx.AsyncClient(timeout=60) as client:
        with path.open("rb") as file:
            answer = await client.post(
                f"{system.url('sim')}/upload/image", files={"image": ("noise.png", file, "image/png")}
            )
    assert answer.status_code == 200, answer.text


def _peak(pid: int) -> int:
    """The most bytes that a process has ever had resident."""
    [kib] = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kib) * 1024


@contextlib.asynccontextmanager
async def _unfinished_bodies(system: System, count: int) -> AsyncIterator[None]:
    """So many requests whose bodies lack their last byte: the API holds all the others in memory."""
    place = urlsplit(system.url("api"))
    head = (
        f"POST {API}/batch HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {BODY_BYTES}\r\n\r\n"
    )
    writers: list[asyncio.StreamWriter] = []
    try:
        for _ in range(count):
            _, writer = await asyncio.open_connection(place.hostname, place.port)
            writers.append(writer)
            writer.write(head.encode() + b" " * (BODY_BYTES - 1))
        yield
    finally:
        for writer in writers:
            writer.close()
        for writer in writers:
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _shed(client: httpx.AsyncClient) -> httpx.Response:
    """The answer to new work once there is no memory for it."""

    async def shed() -> httpx.Response | None:
        answer = await client.post("/jobs", json={"job_type": "no_such_type", "params": {}})
        return answer if answer.status_code == 503 else None

    answer = await wait_until(shed, 30, "work is shed")
    assert answer is not None
    assert answer.json()["code"] == "overloaded", answer.text
    return answer


async def _short_of_memory(system: System) -> bool:
    return await _unready(system) == ["memory"]


async def _unready(system: System) -> list[str]:
    async with httpx.AsyncClient() as client:
        checks = (await client.get(f"{system.url('api')}/readyz")).json()["checks"]
    return [name for name, check in checks.items() if not check["ok"]]
