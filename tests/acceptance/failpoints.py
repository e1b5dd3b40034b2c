"""Places in forge where a process of a test's own dies, stops or is refused: `failpoints.py WORDS…` is
`forge WORDS…`, with every place below wrapped.

Nothing of this is in forge. A place does nothing until a test arms it: a file with its name and an action in
`FORGE_TEST_ARMED`. Whichever process comes by first takes the file away, so it happens once.

`FORGE_TEST_PLANTED` names a bug that forge then has, see `planted.py`. `FORGE_TEST_HASTE` says how many times
as fast leases, back-offs and the watchdog's ticks pass, where a test would wait minutes for them, and lets
fewer workers be lost.
"""

from __future__ import annotations

import errno
import functools
import importlib
import inspect
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

ARMED, PLANTED, HASTE = "FORGE_TEST_ARMED", "FORGE_TEST_PLANTED", "FORGE_TEST_HASTE"
HASTY_ATTEMPTS = 2


@dataclass(frozen=True)
class Place:
    """Right before, or right after, a call of `owner.name`; `about` an event where it is an append."""

    owner: str
    name: str
    before: bool = True
    about: str = ""


_APPEND = "forge.eventstore:EventStore"
_CLIENT = "forge.comfyui.client:Comfy"

PLACES = {
    # the API
    "api: before the request is in the log": Place(_APPEND, "append", True, "JobSubmitted"),
    "api: before the 202": Place(_APPEND, "append", False, "JobSubmitted"),
    # an attempt
    "worker: before the start": Place(_APPEND, "append", True, "JobStarted"),
    "worker: before the POST": Place(_CLIENT, "_post", True),
    "worker: after the POST": Place(_CLIENT, "_post", False),
    "worker: before the fetch": Place("forge.store:Store", "receive", True),
    "worker: before the store": Place("forge.store:Store", "_keep", True),
    "worker: before the rename": Place("forge.store", "_move", True),
    "worker: before the sync": Place("forge.store", "_sync", True),
    "worker: before the conclusion": Place(_APPEND, "append", True, "JobCompleted"),
    "worker: after the conclusion": Place(_APPEND, "append", False, "JobCompleted"),
    "worker: before the ack": Place("forge.workers.loop:Delivery", "settle", True),
    "worker: after the ack": Place("forge.workers.loop:Delivery", "settle", False),
    # who follows
    "dispatcher: before the order": Place("forge.workers.dispatcher:Dispatcher", "_give", True),
    "dispatcher: after the order": Place("forge.workers.dispatcher:Dispatcher", "_give", False),
    "projector: before the commit": Place("forge.projections.projection", "_write", False),
    "projector: after the commit": Place("forge.workers.projector", "advance", False),
    "scheduler: before the expiry": Place(_APPEND, "append", True, "AssetExpired"),
    "scheduler: after the expiry": Place(_APPEND, "append", False, "AssetExpired"),
    "cleanup: before the unlink": Place("forge.store:Store", "_remove", True),
    "cleanup: after the unlink": Place("forge.store:Store", "_remove", False),
}


class Failpoints:
    """What a test does: arm places for the processes that are told of this folder, and see what was taken."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._armed = folder, 0
        folder.mkdir(mode=0o755)

    @property
    def environ(self) -> dict[str, str]:
        return {ARMED: str(self.folder)}

    def arm(self, *places: str, action: str = "kill", times: int = 1, about: str = "") -> None:
        """`kill`, `stop` (SIGSTOP to itself), `block` (a call that never returns) or `error` (the volume
        refuses), at the next so many calls; with `about` only at those that are given something with this in
        it."""
        for place in places:
            assert place in PLACES, place
            for nth in range(times):
                name = f"{place}.{self._armed + nth}"
                whole = self.folder / f"{name}.new"
                whole.write_text(f"{action} {about}")
                whole.rename(self.folder / name)
        self._armed += times

    def waiting(self) -> list[str]:
        """What nobody has come by yet."""
        return sorted(path.name for path in self.folder.iterdir() if path.suffix != ".taken")

    def taken(self) -> dict[str, int]:
        """Place → the process that came by, once it has said which one it is."""
        said = {path: path.read_text().rpartition(" ")[2] for path in self.folder.glob("*.taken")}
        return {
            path.name.removesuffix(".taken").rpartition(".")[0]: int(pid)
            for path, pid in said.items()
            if pid.isdecimal()
        }


def come_by(place: str, folder: Path, given: Sequence[Any]) -> None:
    """Do what is armed here, once."""
    for armed in sorted(folder.glob(f"{place}.[0-9]*")):
        if armed.suffix == ".taken" or armed.suffix == ".new":
            continue
        taken = armed.with_name(f"{armed.name}.taken")
        try:
            action, _, about = armed.read_text().partition(" ")
            if about and not any(about in str(one) for one in given):
                continue
            armed.rename(taken)
        except FileNotFoundError:
            continue  # another process was faster
        taken.write_text(f"{action} {os.getpid()}")
        match action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "block":
                threading.Event().wait()
            case "error":
                raise OSError(errno.EIO, "a test says no")
        return


def wrap(place: Place, happen: Callable[[Sequence[Any]], None]) -> None:
    """Let something happen at a place."""
    module, _, attribute = place.owner.partition(":")
    owner: Any = importlib.import_module(module)
    owner = getattr(owner, attribute) if attribute else owner
    call = getattr(owner, place.name)

    def meant(given: Sequence[Any]) -> bool:
        return not place.about or any(type(d.event).__name__ == place.about for d in given[1])

    if inspect.iscoroutinefunction(call):

        @functools.wraps(call)
        async def wrapped(*given: Any, **more: Any) -> Any:
            if place.before and meant(given):
                happen(given)
            answer = await call(*given, **more)
            if not place.before and meant(given):
                happen(given)
            return answer

    else:

        @functools.wraps(call)
        def wrapped(*given: Any, **more: Any) -> Any:
            if place.before:
                happen(given)
            answer = call(*given, **more)
            if not place.before:
                happen(given)
            return answer

    setattr(owner, place.name, wrapped)


def hurry(haste: float) -> None:
    """Let leases and back-offs pass so many times as fast, and a job have fewer attempts; the consumer's own
    wait is for the test to set."""
    from forge import watchdog
    from forge.domain import jobs
    from forge.workers import loop

    loop.HEARTBEAT_SECONDS /= haste
    loop.LEASE_SECONDS /= haste
    watchdog.TICK_SECONDS /= haste
    admitted = jobs.admitted
    jobs.admitted = lambda *given: msgspec.structs.replace(admitted(*given), max_attempts=HASTY_ATTEMPTS)
    jobs.BACKOFF_SECONDS = (2.0 / haste, 10.0 / haste, 60.0 / haste)


def main() -> None:
    """forge, with what the environment asks for."""
    if planted := os.environ.get(PLANTED):
        from acceptance.planted import BUGS

        BUGS[planted]()
    if haste := os.environ.get(HASTE):
        hurry(float(haste))
    if folder := os.environ.get(ARMED):
        for name, place in PLACES.items():
            wrap(place, functools.partial(come_by, name, Path(folder)))
    from forge.cli import main as forge

    forge()


if __name__ == "__main__":
    main()
