"""`forge top` shows what is so, without what does not answer, and leaves the terminal as it was."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from datetime import UTC, datetime
from typing import Any

import httpx
import msgspec
import pytest
from nats.aio.client import Client
from rich.console import Console

from api.making import completed, failed, started
from api.serving import Served
from forge import topology
from forge.cli.top import picture
from forge.comfyui.backends import BackendStatus
from forge.embedded import EmbeddedNats
from forge.settings import Settings
from forge.watching import Frame, watching
from forge.workers.standing import Standing
from waiting import wait_until

ASK = {"job_type": "ui_icon", "params": {}}


async def asked(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    return (await client.post("/jobs", json=ASK | more)).raise_for_status().json()  # type: ignore[no-any-return]


async def in_the_tables(served: Served, client: httpx.AsyncClient) -> None:
    await client.get("/queue", params={"min_seq": await served.parts.store.head()})


def text(frame: Frame, width: int = 160) -> str:
    console = Console(width=width, file=None, record=True, force_terminal=False)
    with console.capture() as captured:
        console.print(picture(frame, width))
    return captured.get()


async def told(nats_client: Client, job: dict[str, Any]) -> None:
    """What a worker tells over and over."""
    backend = BackendStatus("http://comfy", True, True, "answers", datetime.now(UTC), "0.27.0", 2)
    standing = msgspec.json.encode(Standing("worker-a", [backend]))
    progress = {"job_id": job["id"], "user_id": "mei", "attempt": 1, "value": 3, "max": 4}
    while True:
        await nats_client.publish(topology.BACKENDS, standing)
        await nats_client.publish(f"forge.live.job.{job['id']}", msgspec.json.encode(progress))
        await asyncio.sleep(0.1)


async def test_a_frame_tells_what_runs_waits_and_ended(
    served: Served,
    settings: Settings,
    nats_client: Client,
    mei: httpx.AsyncClient,
    lan: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("forge.watching.SECONDS", 30.0)
    monkeypatch.setattr("forge.watching._HEARD_SECONDS", 600.0)
    await completed(served.parts, "lan", await asked(lan))
    await failed(served.parts, "lan", await asked(lan))
    job = await asked(mei)
    await started(served.parts, "mei", job)
    for _ in range(3):
        await asked(lan, job_type="fate_card", params={"prompt": "a crane"})
    await asked(mei)
    await in_the_tables(served, mei)
    telling = asyncio.create_task(told(nats_client, job))
    try:
        async with watching(settings) as watch:
            await watch._connected()
            await wait_until(lambda: watch._backends() and watch._progress, what="the worker is heard")
            first = await watch.frame()
            await completed(served.parts, "lan", await asked(lan), color="#aa0000")
            await in_the_tables(served, lan)
            second = await watch.frame()
    finally:
        telling.cancel()
    assert (first.missing, first.places, first.orders, first.lag) == (
        [],
        3,
        0,
        {"FORGE_EVENTS": 0, "FORGE_METRICS": 0},
    )
    assert first.running is not None
    [run] = first.running
    assert (str(run.id), run.user_id, run.attempt, run.progress) == (job["id"], "mei", 1, 0.75)
    assert first.waiting is not None
    assert (first.waiting.jobs, first.waiting.by_user) == (4, {"lan": 3, "mei": 1})
    assert first.waiting.by_type == {"fate_card": 3, "ui_icon": 1}
    assert first.backends is not None
    assert [b.url for b in first.backends] == ["http://comfy"]
    assert first.hour == {"submitted": 7, "completed": 1, "failed": 1}
    assert first.per_minute is None
    assert second.per_minute is not None
    assert second.per_minute > 0
    shown = text(first)
    for said in (
        "slots ░░░ 0/3",
        "1 running",
        job["id"],
        "75%",
        "4 waiting",
        "3 lan",
        "3 fate_card",
        "2 prompts",
    ):
        assert said in shown, said
    narrow = text(first, 80)
    assert f"{job['id']}  mei" in narrow, "to be copied"
    assert "75%" in narrow
    assert max(map(len, narrow.splitlines())) <= 80


async def test_what_does_not_answer_is_named_and_the_rest_is_shown(
    served: Served, settings: Settings, nats_server: EmbeddedNats
) -> None:
    away = msgspec.structs.replace(settings, postgres_dsn="postgresql://postgres@127.0.0.1:9/forge")
    async with watching(away) as watch:
        frame = await watch.frame()
        assert (frame.running, frame.waiting, frame.hour, frame.places) == (None, None, None, 3)
        [missing] = frame.missing
        assert "Postgres does not answer" in missing
        assert "! Postgres does not answer" in text(frame)
    away = msgspec.structs.replace(settings, nats_url="nats://127.0.0.1:9")
    async with watching(away) as watch:
        frame = await watch.frame()
        assert frame.places is None
        assert frame.waiting is not None
        assert "no worker tells" in text(frame)


def command(settings: Settings, *words: str) -> tuple[list[str], dict[str, str]]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FORGE_")}
    environ |= {"FORGE_NATS_URL": settings.nats_url, "FORGE_POSTGRES_DSN": settings.postgres_dsn}
    environ |= {"FORGE_DATA_DIR": str(settings.data_dir), "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    return [sys.executable, "-m", "forge", "top", *words], environ


async def test_one_frame_without_a_terminal(
    served: Served, settings: Settings, mei: httpx.AsyncClient
) -> None:
    await asked(mei)
    await in_the_tables(served, mei)
    words, environ = command(settings, "--once", "--json")
    done = await asyncio.to_thread(
        subprocess.run, words, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["waiting"]["by_user"] == {"mei": 1}


@pytest.mark.parametrize("leave", ["q", "Ctrl-C"])
async def test_a_key_leaves_and_the_terminal_is_as_it_was(
    served: Served, settings: Settings, leave: str
) -> None:
    keyboard, screen = pty.openpty()
    before = termios.tcgetattr(screen)
    words, environ = command(settings, "--interval", "60")
    process = await asyncio.create_subprocess_exec(
        *words, env=environ, stdin=screen, stdout=screen, stderr=screen, start_new_session=True
    )
    seen = b""

    def drawn() -> bool:
        nonlocal seen
        while select.select([keyboard], [], [], 0)[0]:
            seen += os.read(keyboard, 65536)
        return b"waiting" in seen

    try:
        await wait_until(drawn, 60, "the first frame")
        if leave == "q":
            os.write(keyboard, b"q")
        else:
            process.send_signal(signal.SIGINT)
        status = await asyncio.wait_for(process.wait(), 60)
    finally:
        if process.returncode is None:
            process.kill()
    drawn()
    assert status == 0, seen[-2000:]
    assert seen.count(b"\x1b[?1049h") == seen.count(b"\x1b[?1049l") == 1
    assert b"Traceback" not in seen
    assert termios.tcgetattr(screen) == before
    os.close(keyboard)
    os.close(screen)
