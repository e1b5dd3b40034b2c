"""Load: clients that each send the next request when the last one is answered. Prints what it saw."""

from __future__ import annotations

import argparse
import asyncio
import time

import uvloop

from benchmarks.asked import SUBMIT, bust, user
from benchmarks.harness import Measured, Measuring, tell
from benchmarks.wire import connect, post


async def run(url: str, clients: int, measuring: Measuring) -> Measured:
    async with asyncio.TaskGroup() as group:
        for client in range(clients):
            group.create_task(_client(url, client, clients, measuring))
    return measuring.result()


async def _client(url: str, client: int, clients: int, measuring: Measuring) -> None:
    connection = await connect(url)
    nth = 0
    while not measuring.over:
        nth += 1
        request = post(url, SUBMIT, bust(client, nth), user(client, nth))
        began = time.perf_counter()
        status, body = await connection.ask(request)
        if status == 503:
            measuring.refused += 1
            continue
        if status != 202:
            raise RuntimeError(f"answered {status}: {body[:500]!r}")
        measuring.note(began)
    connection.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    measuring = Measuring(min(0.5, given.seconds / 4), given.seconds)
    tell(uvloop.run(run(given.url, given.clients, measuring)))


if __name__ == "__main__":
    main()
