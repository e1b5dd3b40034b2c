"""The asset volume runs full under a whole system: refused before it costs anything, nothing lost or half."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from acceptance.evidence import Evidence, Witness
from acceptance.players import ask_until_answered, request
from acceptance.settling import ends, happened, settled, watching
from acceptance.system import System, running
from volumes import small_volume
from waiting import wait_until


@contextlib.asynccontextmanager
async def started(root: Path, **more: str) -> AsyncIterator[tuple[System, Witness]]:
    async with running(root, render_ms="20", **more) as system, watching(system) as witness:
        yield system, witness


@pytest.fixture
def really_small(root: Path) -> Iterator[Path]:
    """The asset volume as a file system of its own, of 3 MiB."""
    folder = root / "data" / "assets"
    folder.mkdir(parents=True, mode=0o755)
    with small_volume(folder, "3m") as volume:
        yield volume


@pytest.mark.fault("D1")
async def test_a_really_full_volume_stops_work_and_loses_none(root: Path, really_small: Path) -> None:
    async with started(root) as (system, witness), system.client("mei") as mei:
        await system.faults(frozen=True)  # nothing is drawn before there is no room for it
        asked = [request("mei") for _ in range(5)]
        jobs = [await ask_until_answered(mei, one) for one in asked]
        await happened(witness, "started", times=3)
        ballast = _filled(really_small / "ballast")
        await _is_refused(system, mei)
        await system.faults(frozen=False)

        # what runs is drawn to its end and then finds no room
        await wait_until(lambda: _drawn(witness) == 3, 30, "three prompts are drawn")
        await wait_until(lambda: "no room for a picture" in _log(system), 60, "a worker met the full disk")
        await wait_until(lambda: witness.leftovers() == [], 30, what="temporary files are gone")
        assert _pictures(really_small) == [], "no picture, whole or half, is visible"
        assert _drawn(witness) == 3, "nothing new was begun"
        assert {(await mei.get(f"/jobs/{id_}")).status_code for id_ in jobs} == {200}, "reading goes on"
        await wait_until(lambda: _levels(witness, 3), 30, what="three lines were crossed")

        ballast.unlink()
        asked.append(request("mei"))
        jobs.append(await ask_until_answered(mei, asked[-1]))
        evidence = await settled(witness, asked)
        assert ends(evidence) == ["completed"] * 6
        assert _never_failed(evidence), "a full disk costs no attempt"
        assert await wait_until(lambda: _levels(witness, 6), 30, what="and crossed back") == [
            *(("warn", True), ("clean", True), ("full", True)),
            *(("full", False), ("clean", False), ("warn", False)),
        ]
        await wait_until(lambda: _well(system), 30, "all is well again")
        assert system.deaths == []


@pytest.mark.fault("D1")
async def test_a_volume_that_the_settings_call_small_is_full_too(root: Path) -> None:
    async with started(root, FORGE_DISK_LIMIT_BYTES="2000000") as (system, witness):
        system.start("housekeeping2")  # of two schedulers only one says it
        async with system.client("mei") as mei:
            await system.faults(frozen=True)
            asked = [request("mei") for _ in range(4)]
            jobs = [await ask_until_answered(mei, one) for one in asked]
            await happened(witness, "started", times=3)
            ballast = system.assets_dir / "ballast"
            ballast.mkdir()
            (ballast / "file").write_bytes(bytes(1_950_000))
            await _is_refused(system, mei)
            again = await mei.post("/jobs", json=asked[0].body, headers={"Idempotency-Key": asked[0].key})
            assert again.json()["id"] == jobs[0], "what was accepted is told as before"
            await wait_until(lambda: _levels(witness, 3), 30, what="three lines were crossed")
            system.kill("housekeeping")
            system.kill("generation")  # whoever comes next waits for room, too
            before = len(_log(system))
            system.start("housekeeping", "generation")
            await wait_until(lambda: "volume is full" in _log(system)[before:], 60, "the new one sees it")
            assert not any(event.type == "forge.job.adopted.v1" for event in await witness.events())

            await system.faults(frozen=False)
            (ballast / "file").unlink()
            evidence = await settled(witness, asked)
            assert ends(evidence) == ["completed"] * 4
            assert _never_failed(evidence)
            down = [("full", False), ("clean", False), ("warn", False)]
            assert (await wait_until(lambda: _levels(witness, 6), 30, what="and crossed back"))[3:] == down
            usage = (await mei.get("/usage", params={"metric_type": "disk_usage"})).json()["items"]
            assert {item["details"]["limit"] for item in usage} == {2_000_000}
            assert max(item["metric_value"] for item in usage) >= 1_950_000


async def _is_refused(system: System, client: httpx.AsyncClient) -> None:
    """New work is refused as it should be, as soon as the API has looked."""

    async def seen() -> bool:
        return await _unready(system) == ["disk"]

    await wait_until(seen, 60, "the API sees that the disk is full")
    for path, body in (("/jobs", request("mei").body), ("/batch", {"jobs": [request("mei").body]})):
        answer = await client.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (503, "disk_full"), answer.text
        assert int(answer.headers["retry-after"]) > 0


async def _unready(system: System) -> list[str]:
    """The checks that fail."""
    async with httpx.AsyncClient() as client:
        checks: dict[str, Any] = (await client.get(f"{system.url('api')}/readyz")).json()["checks"]
    return [name for name, check in checks.items() if not check["ok"]]


async def _well(system: System) -> bool:
    return await _unready(system) == []


def _filled(path: Path) -> Path:
    """A file that takes all the room there is."""
    with path.open("wb", 0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def _log(system: System) -> str:
    return (system.root / "log" / "generation.log").read_text()


def _drawn(witness: Witness) -> int:
    return sum(line.get("status") == "execution_success" for line in witness.simulator("sim"))


def _pictures(volume: Path) -> list[Path]:
    return [path for kind in ("assets", "thumbs") for path in (volume / kind).rglob("*") if path.is_file()]


async def _levels(witness: Witness, count: int) -> list[tuple[str, bool]]:
    """All crossings in the log, once there are so many."""
    events = [event.data for event in await witness.events() if event.type == "forge.disk.crossed.v1"]
    return [(data["level"], data["above"]) for data in events] if len(events) >= count else []


def _never_failed(evidence: Evidence) -> bool:
    return not any(event.type == "forge.job.attempt_failed.v1" for event in evidence.events)
