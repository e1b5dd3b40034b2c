"""Load: raw JetStream publishes, so many awaited at a time, over one connection. Prints what it saw."""

from __future__ import annotations

import argparse
import asyncio
import time

import nats
import uvloop
from nats.js import JetStreamContext

from benchmarks.harness import PATIENCE_SECONDS, Measured, Measuring, tell


async def run(url: str, subject: str, clients: int, size: int, measuring: Measuring) -> Measured:
    nc = await nats.connect(url)
    js = nc.jetstream(timeout=PATIENCE_SECONDS)
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(_client(js, subject, bytes(size), measuring))
    await nc.close()
    return measuring.result()


async def _client(js: JetStreamContext, subject: str, payload: bytes, measuring: Measuring) -> None:
    while not measuring.over:
        began = time.perf_counter()
        await js.publish(subject, payload)
        measuring.note(began)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--subject", required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    measuring = Measuring(min(0.5, given.seconds / 4), given.seconds)
    tell(uvloop.run(run(given.url, given.subject, given.clients, given.size, measuring)))


if __name__ == "__main__":
    main()
