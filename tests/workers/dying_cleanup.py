"""A cleanup worker that kills itself at one step: `dying_cleanup.py STEP`, settings in the environment."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge.broker import connect
from forge.database import opened
from forge.eventstore import EventStore
from forge.library import Library
from forge.plans import Planner
from forge.retention import Retention
from forge.settings import load
from forge.store import Store
from forge.workers.cleanup import Cleanup
from forge.workers.loop import Delivery


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Die when this is called."""
    call = getattr(owner, name)

    def dying(*given: Any, **more: Any) -> Any:
        if when(*given):
            die()
        return call(*given, **more)

    setattr(owner, name, dying)


def after(owner: Any, name: str, when: Callable[..., bool]) -> None:
    """Die when this is done."""
    call = getattr(owner, name)

    def dying(*given: Any, **more: Any) -> Any:
        answer = call(*given, **more)
        if when(*given):
            die()
        return answer

    setattr(owner, name, dying)


def after_some(count: int) -> Callable[..., bool]:
    seen: list[int] = []

    def enough(*_: Any) -> bool:
        seen.append(1)
        return len(seen) > count

    return enough


STEPS: dict[str, Callable[[], None]] = {
    "before the grace": lambda: before(Cleanup, "_left_of_grace"),
    "before the look": lambda: before(Planner, "projected"),
    "before the unlink": lambda: before(Store, "_remove"),
    "after the picture": lambda: after(Path, "unlink", lambda path, *_: path.suffix == ".png"),
    "after the thumbnails": lambda: after(Path, "unlink", lambda path, *_: path.suffix == ".webp"),
    "before the ack": lambda: before(Delivery, "settle"),
    "after a third": lambda: before(Library, "give_up", after_some(3)),
}


async def main(step: str) -> None:
    settings = load()
    nc = await connect(settings.nats_url, "dying")
    async with opened(settings.postgres_dsn) as pool:
        retention = Retention(EventStore(nc), pool, Store(settings.assets_dir), settings)
        STEPS[step]()
        await Cleanup(retention, settings.cleanup_grace_seconds).run(asyncio.Event())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
