"""The commands of docs/BACKUP.md, as they stand there: a forge at work is copied, lost, and given back."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from acceptance.evidence import Evidence, Message
from acceptance.players import ask_until_answered, request
from acceptance.settling import ends, happened, settled, watching
from acceptance.system import WORKERS, System, running
from pictures import encoded, noise
from waiting import wait_until

PAGE = Path(__file__).parents[2] / "docs" / "BACKUP.md"


def commands(heading: str) -> str:
    """The shell commands under a heading of the page."""
    found = re.search(rf"^## {heading}\n.*?^```sh\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert found is not None, heading
    return found[1]


async def walk_through(heading: str, system: System, backup: Path) -> str:
    """Run them against a system; what they said."""
    environ = system.environ("projector") | {
        "BACKUP": str(backup),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    process = await asyncio.create_subprocess_exec(
        *("sh", "-eu", "-c", commands(heading)),
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode()


@pytest.mark.timeout(400)
async def test_a_forge_is_given_back_on_an_empty_machine(root: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    backup.mkdir()
    asked = [request(f"user-{nth % 3}") for nth in range(9)]
    async with (
        running(root / "lost", render_ms="20-60") as system,
        watching(system) as witness,
        system.client("user-0") as client,
    ):
        jobs = [await ask_until_answered(client, one) for one in asked]
        await settled(witness, asked)
        await _pinned_and_sent(client, jobs[0])
        before = await settled(witness, asked)
        await system.order("sim", "render", {"least_ms": 600_000})
        under_way = [request(f"user-{nth}") for nth in range(4)]
        started = [await ask_until_answered(client, one) for one in under_way]
        await happened(witness, "started", job=started[0])
        await _copied(system, (await witness.events())[-1].seq)
        assert "is whole: " in await walk_through("Back up", system, backup)
        too_late = request("user-0")
        lost = await ask_until_answered(client, too_late)
        for name in (*system.apis, *WORKERS, "nats", "postgres"):
            system.kill(name)

    async def restored(system: System) -> None:
        assert "the log is whole: " in await walk_through("Restore", system, backup)

    async with (
        running(root / "found", render_ms="20-60", prepare=restored) as system,
        watching(system) as witness,
        system.client() as operator,
    ):
        after = await settled(witness, asked + under_way, timeout=90)
        assert set(ends(after, jobs + started)) == {"completed"}
        assert lost not in after.jobs
        _same(before, after, drawn_since=started)
        await _sent_as_stored(operator, before)
        assert await ask_until_answered(operator, too_late) == lost, "under the id its client was told"
        after = await settled(witness, [*asked, *under_way, too_late], timeout=60)
        assert ends(after, [lost]) == ["completed"]


async def _pinned_and_sent(client: httpx.AsyncClient, job: str) -> None:
    """More than drawn pictures: one is pinned, and a user sends one."""
    asset = (await client.get(f"/jobs/{job}")).json()["assets"][0]["id"]
    for answer in (
        await client.put(f"/assets/{asset}/pin"),
        await client.post("/uploads", files={"image": ("me.png", encoded(noise(96, 64)))}),
    ):
        assert answer.is_success, answer.text


async def _copied(system: System, seq: int) -> None:
    connection = await asyncpg.connect(system.postgres_dsn)
    try:
        there = "select coalesce(max(seq), 0) >= $1 from forge_log.entry"
        await wait_until(lambda: connection.fetchval(there, seq), 60, "the log is copied")
    finally:
        await connection.close()


def _same(before: Evidence, after: Evidence, drawn_since: list[str]) -> None:
    assert [_said(m) for m in after.events[: len(before.events)]] == [_said(m) for m in before.events]
    assert _these(after.assets, before.assets) == before.assets
    assert any(row["pinned"] for row in before.assets.values())
    assert len(after.assets) == len(before.assets) + len(drawn_since)
    old = [row for row in after.references if str(row["job_id"]) not in drawn_since]
    assert sorted(old, key=str) == sorted(before.references, key=str)
    assert _these(after.jobs, before.jobs) == before.jobs
    assert before.files.items() <= after.files.items()
    assert len(after.files) == len(after.assets)
    assert (after.uploads, after.upload_files) == (before.uploads, before.upload_files)
    assert len(after.uploads) == 1


def _said(message: Message) -> tuple[int, str, Mapping[str, Any]]:
    return message.seq, message.subject, message.data


def _these(rows: Mapping[str, object], ids: Mapping[str, object]) -> dict[str, object]:
    return {id_: row for id_, row in rows.items() if id_ in ids}


async def _sent_as_stored(client: httpx.AsyncClient, evidence: Evidence) -> None:
    for id_, row in evidence.assets.items():
        answer = await client.get(f"/assets/{id_}/file")
        assert answer.status_code == 200, answer.text
        assert hashlib.sha256(answer.content).hexdigest() == row["content_hash"]
