"""Keeps child processes running: what dies is started again after a pause that grows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from forge.embedded.process import OwnedProcess
from forge.errors import ForgeError, ServerFailed

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 5.0
STEADY_AFTER = 10.0
"""Seconds a child has to live before its next death counts as the first one again."""

REFUSED = 2
"""How a forge command ends that a restart cannot cure: a bad setting, say."""

FALSE_STARTS = 4
"""How often a child may die before everything serves, until its supervisor gives up."""


class Launchable(Protocol):
    """What can be kept running: an embedded server or a command of forge."""

    def launch(self) -> OwnedProcess:
        """Start it without waiting until it serves."""

    def stop(self) -> None:
        """End it cleanly, and give back what it held; may block; harmless when it has ended."""


class Children:
    """The children of one supervisor.

    Args:
        report: told in one line about every death.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._kept: dict[str, Launchable] = {}
        self._processes: dict[str, OwnedProcess] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._group: asyncio.TaskGroup | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when `pids` has changed."""
        self.steady = False
        """Set it when everything serves: from then on every death is answered with a restart."""

    @property
    def pids(self) -> dict[str, int]:
        return {name: process.pid for name, process in self._processes.items()}

    @asynccontextmanager
    async def supervised(self) -> AsyncIterator[None]:
        """Keep what is started inside this block; stop it all when the block is left, however it is left.

        Raises:
            ServerFailed: a child did not come up at all before everything was `steady`.
        """
        try:
            async with asyncio.TaskGroup() as self._group:
                try:
                    yield
                finally:
                    await self._stop()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    def start(self, name: str, child: Launchable) -> None:
        """Launch a child and keep it running.

        Raises:
            ServerFailed: it cannot even be launched.
        """
        assert self._group is not None, "children are started inside supervised()"
        self._kept[name] = child
        self._processes[name] = child.launch()
        self._keepers.append(self._group.create_task(self._keep(name), name=f"keep {name}"))
        self.on_change()

    def kill(self) -> None:
        """End all at once, for those who cannot wait for a clean stop."""
        for process in self._processes.values():
            if process.running:
                process.kill()

    async def _stop(self) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        for child in reversed(self._kept.values()):
            await asyncio.to_thread(child.stop)

    async def _keep(self, name: str) -> None:
        pause, deaths = 0.0, 0
        while True:
            launched = time.monotonic()
            await _ended(self._processes[name])
            deaths += 1
            if not self.steady:
                self._give_up_on(name, deaths)
            steady = time.monotonic() - launched > STEADY_AFTER
            pause = FIRST_PAUSE if steady or not pause else min(2 * pause, LONGEST_PAUSE)
            self._explain_death(name, pause)
            await asyncio.sleep(pause)
            await self._launch_again(name)

    def _give_up_on(self, name: str, deaths: int) -> None:
        process = self._processes[name]
        if process.exit_status == REFUSED or deaths > FALSE_STARTS:
            words = process.last_words().removeprefix("forge: ")
            raise ServerFailed(f"{name} does not start: {words or 'it says nothing'} (see {process.log})")

    def _explain_death(self, name: str, pause: float) -> None:
        process = self._processes[name]
        how, words = "was killed", ""
        if process.exit_status is not None and process.exit_status >= 0:
            how, words = f"ended with status {process.exit_status}", process.last_words(limit=600)
        told = f" ({words.splitlines()[-1]})" if words else ""
        self._report(f"{name} {how}{told}; again in {pause:.1f} s, log in {process.log}")

    async def _launch_again(self, name: str) -> None:
        self._kept[name].stop()
        while True:
            try:
                self._processes[name] = self._kept[name].launch()
                self.on_change()
                return
            except ForgeError as error:
                self._report(f"{name} cannot be started, trying again: {error.detail}")
            await asyncio.sleep(LONGEST_PAUSE)


async def _ended(process: OwnedProcess) -> None:
    while process.running:  # noqa: ASYNC110  (a process is no event on every system)
        await asyncio.sleep(0.1)
