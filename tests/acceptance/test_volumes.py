"""The volumes of NATS and Postgres run full: told in time, nothing lost, and all goes on with room again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from acceptance.checker import Asked
from acceptance.evidence import Witness
from acceptance.players import ask, ask_until_answered, in_time, request
from acceptance.settling import ends, happened, settled, watching
from acceptance.system import System, running
from volumes import small_volume
from waiting import wait_until


@pytest.fixture
def small(root: Path) -> Iterator[None]:
    """File systems of their own, of a size that a day's work would not fill."""
    with contextlib.ExitStack() as stack:
        for name, size in (("nats", "24m"), ("postgres", "160m")):
            (root / name).mkdir(mode=0o755)
            stack.enter_context(small_volume(root / name, size))
        yield


@pytest.mark.timeout(240)
@pytest.mark.fault("D2", "D3")
async def test_full_volumes_of_the_servers_lose_nothing(root: Path, small: None) -> None:
    async with (
        running(root, render_ms="20") as system,
        watching(system) as witness,
        system.client("mei") as mei,
    ):
        asked = [request("mei")]
        await ask_until_answered(mei, asked[0])
        await settled(witness, asked)
        asked += await _log_is_full(system, mei)
        asked += await _tables_are_full(system, witness, mei)
        evidence = await settled(witness, asked, timeout=90)
        assert set(ends(evidence)) == {"completed"}


async def _log_is_full(system: System, mei: httpx.AsyncClient) -> list[Asked]:
    ballast = fill(system.root / "nats" / "ballast")
    asked: list[Asked] = []

    async def refused() -> bool:
        asked.append(request(f"user-{len(asked)}"))
        return await ask(mei, asked[-1]) is None  # else it was the last room

    await wait_until(refused, 60, "the log takes no more")
    answered = await in_time(3, lambda: ask(mei, asked[-1]))  # a second, and room for a busy machine
    assert answered is None, "a 503 that says when to come again"
    ballast.unlink()
    system.kill("nats")  # its stream takes nothing until it is started again, room or not
    system.start("nats")
    await ask_until_answered(mei, asked[-1])
    return asked


async def _tables_are_full(system: System, witness: Witness, mei: httpx.AsyncClient) -> list[Asked]:
    before = await witness.checkpoint()
    ballast = fill(system.root / "postgres" / "ballast")
    asked = [request("mei") for _ in range(3)]
    for one in asked:
        await ask_until_answered(mei, one)
        await happened(witness, "completed", job=one.answers[0])
    ballast.unlink()
    newest = (await witness.events())[-1].seq
    assert newest > before
    return asked


def fill(path: Path) -> Path:
    """Take all the room that is left, by single bytes in the end."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as ballast:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    ballast.write(b"0" * size)
    return path
