"""Load: so many jobs of forge in flight, each from its POST to its ``job.completed`` on the socket."""

from __future__ import annotations

import argparse
import asyncio
import time

import aiohttp
import msgspec
import uvloop

from benchmarks.asked import EVENTS, SUBMIT, swatch, user
from benchmarks.harness import PATIENCE_SECONDS, Measured, Measuring, tell
from benchmarks.wire import connect, post


class _Message(msgspec.Struct):
    t: str
    type: str = ""
    key: str = ""


class _Accepted(msgspec.Struct):
    id: str


_message = msgspec.json.Decoder(_Message)
_accepted = msgspec.json.Decoder(_Accepted)


class Endings:
    """How jobs ended, as the socket tells it; a job may end before its id is known here."""

    def __init__(self) -> None:
        self._told: dict[str, asyncio.Future[str]] = {}

    def of(self, job_id: str) -> asyncio.Future[str]:
        return self._told.setdefault(job_id, asyncio.get_running_loop().create_future())

    def tell(self, job_id: str, ending: str) -> None:
        told = self.of(job_id)
        if not told.done():
            told.set_result(ending)

    async def listen(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for heard in socket:
            message = _message.decode(heard.data)
            if message.type in ("job.completed", "job.failed"):
                self.tell(message.key, message.type)
        raise RuntimeError("the socket was closed")

    def forget(self, job_id: str) -> None:
        del self._told[job_id]


async def run(url: str, in_flight: int, first: int, measuring: Measuring) -> Measured:
    endings = Endings()
    async with aiohttp.ClientSession() as session, session.ws_connect(url + EVENTS) as socket:
        while _message.decode((await socket.receive()).data).t != "mark":
            pass
        async with asyncio.TaskGroup() as group:
            listening = group.create_task(endings.listen(socket))
            clients = (_client(url, nth, in_flight, first, endings, measuring) for nth in range(in_flight))
            await asyncio.gather(*clients)
            listening.cancel()
    return measuring.result()


async def _client(
    url: str, client: int, clients: int, first: int, endings: Endings, measuring: Measuring
) -> None:
    connection = await connect(url)
    nth = 0
    while not measuring.over:
        request = post(url, SUBMIT, swatch(first + nth * clients + client), user(client, nth))
        nth += 1
        began = time.perf_counter()
        status, body = await connection.ask(request)
        if status == 503:
            measuring.refused += 1
            continue
        if status != 202:
            raise RuntimeError(f"forge answered {status}: {body[:500]!r}")
        job_id = _accepted.decode(body).id
        ending = await asyncio.wait_for(endings.of(job_id), PATIENCE_SECONDS)
        if ending != "job.completed":
            raise RuntimeError(f"{job_id} ended as {ending}")
        measuring.note(began)
        endings.forget(job_id)
    connection.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    measuring = Measuring(min(1.0, given.seconds / 2), given.seconds)
    tell(uvloop.run(run(given.url, given.in_flight, given.first, measuring)))


if __name__ == "__main__":
    main()
