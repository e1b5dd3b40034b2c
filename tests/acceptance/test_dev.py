"""`forge dev` and `forge demo` as processes: killed and started again, twice, and two beside each other."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from acceptance.system import API
from processes import alive
from waiting import wait_until

SWATCH = {"job_type": "ui_icon", "params": {"width": 256, "height": 256}}


class Dev:
    """One `forge dev` that serves."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, data_dir: Path) -> None:
        self.process, self.url, self.data_dir = process, url, data_dir

    def family(self) -> list[int]:
        """The process ids of the supervisor and of everything it started."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [self.process.pid, *(child.pid for child in children)]

    async def asset(self) -> dict[str, Any]:
        """Have a picture made."""
        async with httpx.AsyncClient(base_url=self.url + API, timeout=30) as client:
            job = (await client.post("/jobs", json=SWATCH)).json()

            async def done() -> dict[str, Any] | None:
                answer = await client.get(f"/jobs/{job['id']}", params={"min_seq": job["seq"]})
                seen: dict[str, Any] = answer.json()
                return seen if seen["status"] == "completed" else None

            seen = await wait_until(done, 60, "the picture is made", 0.1)
            assert seen is not None
            asset: dict[str, Any] = seen["assets"][0]
            return asset

    async def assets(self) -> set[str]:
        async with httpx.AsyncClient(base_url=self.url + API, timeout=30) as client:
            return {asset["id"] for asset in (await client.get("/assets")).json()["items"]}


@asynccontextmanager
async def dev(data_dir: Path) -> AsyncIterator[Dev]:
    """A `forge dev` on a free port; stopped by SIGTERM unless it has ended already."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "forge", "dev", "--port", "0", "--data-dir", str(data_dir)),
        env=_environ(),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        said = (await asyncio.wait_for(process.stdout.readline(), 90)).decode()
        ready = re.fullmatch(r"forge ready at (http://127\.0\.0\.1:\d+)\n", said)
        assert ready, f"it said {said!r}"
        yield Dev(process, ready[1], data_dir)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 90)


def _environ() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("FORGE_")}


@pytest.mark.timeout(300)
async def test_after_a_kill_of_the_supervisor_the_next_start_goes_on(root: Path) -> None:
    async with dev(root) as first:
        made = await first.asset()
        family = first.family()
        assert len(family) >= 6, "nats, postgres, simulator, api and worker"
        first.process.kill()
        await first.process.wait()
    async with dev(root) as second:
        assert not [pid for pid in family if alive(pid)], "nobody of the first is left"
        assert await second.assets() == {made["id"]}
        again = await second.asset()
        assert await second.assets() == {made["id"], again["id"]}
        second_family = second.family()
        second.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(second.process.wait(), 90) == 0
    assert not [pid for pid in second_family if alive(pid)]


@pytest.mark.timeout(300)
async def test_two_run_beside_each_other(root: Path) -> None:
    async with dev(root / "one") as one, dev(root / "two") as two:
        pictures = await asyncio.gather(one.asset(), two.asset())
        assert [await one.assets(), await two.assets()] == [{asset["id"]} for asset in pictures]
        refused = await _run("dev", "--once", "--data-dir", str(root / "one"))
        assert (refused[0], "in use" in refused[1]) == (2, True)
        assert await one.assets()


@pytest.mark.timeout(300)
async def test_a_second_demo_sees_what_the_first_one_made(root: Path) -> None:
    for earlier in (0, 12):
        status, told = await _run("demo", "--once", "--port", "0", "--data-dir", str(root))
        assert status == 0, told
        assert ("assets of earlier runs are still here" in told) is bool(earlier), told
        assert f"{earlier + 12} in all" in told
    assert not (root / "dev.json").exists()


async def _run(*words: str) -> tuple[int, str]:
    """A command's exit status and all that it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "forge", *words),
        env=_environ() | {"COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()
