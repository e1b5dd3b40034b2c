"""The watchdog in processes of their own, whose ticks are short."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from forge import watchdog
from waiting import wait_until

TICK = 0.03
LIMIT = TICK * watchdog.TICKS

PROGRAM = f"""
import asyncio, os, signal, time
from forge import watchdog
from forge.telemetry import lines

async def work():
    with watchdog.watched(70):
        await asyncio.sleep(0)
        the_call()

def the_call():
    THE_CALL

watchdog.TICK_SECONDS = {TICK}
lines.write("test", "INFO")
asyncio.run(work())
"""


def process(call: str) -> subprocess.Popen[str]:
    program = PROGRAM.replace("THE_CALL", call)
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("call", ["time.sleep(60)", "while True: pass"])
def test_a_process_whose_loop_stands_still_ends_and_says_where(call: str) -> None:
    with process(call) as stalled:
        _, said = stalled.communicate(timeout=100)
    assert stalled.returncode == 70
    line = json.loads(said)
    assert line["event"] == "the event loop stands still, so this process ends"
    assert "in the_call" in line["stack"]


def test_it_ends_even_if_nobody_takes_its_last_words() -> None:
    """The log may be what it stands in: a pipe that nobody reads."""
    with process("[os.write(2, b'x' * 4096) for _ in range(1000)]") as stalled:
        assert stalled.wait(timeout=100) == 70


async def test_the_time_a_process_was_stopped_is_not_counted() -> None:
    """Nor what it does first when it goes on, for a while."""
    with process(f"os.kill(os.getpid(), signal.SIGSTOP); time.sleep({LIMIT / 3})") as stopped:
        await wait_until(lambda: _stopped(stopped.pid), 60, "it has stopped")
        began = time.monotonic()
        await wait_until(lambda: time.monotonic() > began + 2 * LIMIT, 20, "for longer than the limit")
        os.kill(stopped.pid, signal.SIGCONT)
        _, said = stopped.communicate(timeout=100)
    assert (stopped.returncode, said) == (0, "")


def _stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED
