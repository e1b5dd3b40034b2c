"""Ends a process whose event loop stands still: whatever blocks it, nobody inside can say so any more, and a
supervisor starts again only what ends.

It counts its own ticks, not the time: while a process is stopped or its machine sleeps, nothing of it runs,
its watchdog neither, so that is no stall. A call into C that never lets other threads run stops it, too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger("forge.watchdog")

TICK_SECONDS = 1.0

TICKS = 30
"""After so many the loop has lost whatever it held: leases, connections, who asked."""

_TELL_SECONDS = 2.0


@contextmanager
def watched(status: int) -> Iterator[None]:
    """End the process with this exit status when the running loop stands still inside this block."""
    thread, over = threading.get_ident(), threading.Event()
    silent = 0

    async def beat() -> None:
        nonlocal silent
        while True:
            silent = 0
            await asyncio.sleep(TICK_SECONDS)

    def watch() -> None:
        nonlocal silent
        while not over.wait(TICK_SECONDS):
            silent += 1
            if silent > TICKS:
                _tell(thread)
                os._exit(status)

    beating = asyncio.create_task(beat(), name="watchdog")
    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        beating.cancel()


def _tell(thread: int) -> None:
    """Log where the loop's thread is, but not for ever: what it waits for may be the log itself."""
    stack = "".join(traceback.format_stack(sys._current_frames().get(thread)))
    words = {"seconds": TICKS * TICK_SECONDS, "stack": stack}
    telling = threading.Thread(
        target=lambda: log.error("the event loop stands still, so this process ends", extra=words),
        daemon=True,
    )
    telling.start()
    telling.join(_TELL_SECONDS)
