"""Read the log in order with nats-py alone, and count it: the yardstick of :mod:`benchmarks.replay`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import nats
import uvloop
from nats.aio.msg import Msg


async def read(url: str, events: int) -> float:
    """Seconds for so many events of the log, through an ordered consumer's callback: its quickest way."""
    nc = await nats.connect(url)
    done, count = asyncio.Event(), 0

    async def heard(_: Msg) -> None:
        nonlocal count
        count += 1
        if count == events:
            done.set()

    began = time.perf_counter()
    await nc.jetstream().subscribe(
        "forge.evt.>", ordered_consumer=True, cb=heard, pending_msgs_limit=-1, pending_bytes_limit=-1
    )
    await asyncio.wait_for(done.wait(), 600)
    seconds = time.perf_counter() - began
    await nc.close()
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--events", type=int, required=True)
    given = parser.parse_args()
    sys.stdout.write(f"{uvloop.run(read(given.url, given.events))}\n")
