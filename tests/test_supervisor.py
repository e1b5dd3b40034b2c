"""Children are kept running, told about when they die, and all stopped in the end."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from forge.embedded import OwnedProcess
from forge.embedded.supervisor import Children
from forge.errors import ServerFailed
from waiting import wait_until


class Script:
    """A Python script as a child; notes when it was stopped."""

    def __init__(self, name: str, code: str, place: Path, stops: list[str]) -> None:
        self.name, self.code, self.place, self.stops = name, code, place, stops
        self.process: OwnedProcess | None = None

    def launch(self) -> OwnedProcess:
        self.process = OwnedProcess(
            [sys.executable, "-S", "-c", self.code], log=self.place / f"{self.name}.log", cwd=self.place
        )
        return self.process

    def stop(self) -> None:
        if self.process is not None and self.process.running:
            self.stops.append(self.name)
            self.process.stop()


WAIT = "import signal; signal.pause()"


async def test_a_killed_child_is_told_about_and_started_again(tmp_path: Path) -> None:
    told: list[str] = []
    children = Children(told.append)
    changes: list[dict[str, int]] = []
    children.on_change = lambda: changes.append(children.pids)
    async with children.supervised():
        children.start("one", Script("one", WAIT, tmp_path, []))
        children.steady = True
        first = children.pids["one"]
        os.kill(first, signal.SIGKILL)
        await wait_until(lambda: children.pids["one"] != first, what="a new process")
        assert psutil.pid_exists(children.pids["one"])
    assert told == [f"one was killed; again in 0.2 s, log in {tmp_path / 'one.log'}"]
    assert len(changes) == 2
    assert changes[0]["one"] == first


async def test_pauses_grow_and_the_last_words_are_told(tmp_path: Path) -> None:
    told: list[str] = []
    children = Children(told.append)
    async with children.supervised():
        children.start("one", Script("one", "raise SystemExit('no luck')", tmp_path, []))
        children.steady = True
        await wait_until(lambda: len(told) >= 3, what="three deaths")
    assert [line.split(";")[0] for line in told[:2]] == ["one ended with status 1 (no luck)"] * 2
    assert [line.split("again in ")[1][:5] for line in told[:3]] == ["0.2 s", "0.4 s", "0.8 s"]


async def test_all_are_stopped_in_reverse_order_also_after_an_error(tmp_path: Path) -> None:
    stops: list[str] = []
    children = Children(lambda line: None)

    async def fail() -> None:
        async with children.supervised():
            for name in ("first", "second", "third"):
                children.start(name, Script(name, WAIT, tmp_path, stops))
            raise ServerFailed("something else")

    with pytest.raises(ServerFailed, match="something else"):
        await fail()
    assert stops == ["third", "second", "first"]
    assert not any(psutil.pid_exists(pid) for pid in children.pids.values())


async def test_a_child_that_refuses_before_everything_serves_ends_the_start(tmp_path: Path) -> None:
    stops: list[str] = []
    children = Children(lambda line: None)
    code = "import sys; print('forge: FORGE_PORT=x: bad', file=sys.stderr); sys.exit(2)"

    async def start() -> None:
        async with children.supervised():
            children.start("one", Script("one", WAIT, tmp_path, stops))
            children.start("two", Script("two", code, tmp_path, stops))
            await wait_until(lambda: False, what="the refusal")

    with pytest.raises(ServerFailed, match="two does not start: FORGE_PORT=x: bad"):
        await start()
    assert stops == ["one"]


async def test_kill_ends_a_stop_that_would_take_long(tmp_path: Path) -> None:
    stubborn = (
        "import signal, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "pathlib.Path('deaf').touch(); signal.pause()"
    )
    children = Children(lambda line: None)
    async with children.supervised():
        children.start("stubborn", Script("stubborn", f"while True:\n {stubborn}", tmp_path, []))
        await wait_until((tmp_path / "deaf").exists)
        children.kill()
