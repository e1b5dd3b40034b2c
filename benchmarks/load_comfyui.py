"""Load: a bare ComfyUI client at its best, so many prompts in flight: submit, hear, history, fetch, hash.

It stores nothing, checks nothing and survives nothing. Prints what it saw.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import time
from uuid import uuid4

import aiohttp
import msgspec
import uvloop

from benchmarks.harness import Measured, Measuring, tell


class _Data(msgspec.Struct):
    prompt_id: str = ""
    node: str | None = ""


class _Message(msgspec.Struct):
    type: str
    data: _Data


class _Named(msgspec.Struct):
    filename: str
    subfolder: str
    type: str


class _Output(msgspec.Struct):
    images: list[_Named] = []


class _Entry(msgspec.Struct):
    outputs: dict[str, _Output]


_message = msgspec.json.Decoder(_Message)
_history = msgspec.json.Decoder(dict[str, _Entry])


class Bare:
    """One client with one socket."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url, self.session = url, session
        self.client_id = uuid4().hex
        self.over: dict[str, asyncio.Future[None]] = {}

    async def listen(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for heard in socket:
            if heard.type is not aiohttp.WSMsgType.TEXT or '"executing"' not in heard.data:
                continue
            message = _message.decode(heard.data)
            if message.type == "executing" and message.data.node is None:
                waiting = self.over.pop(message.data.prompt_id, None)
                if waiting is not None:
                    waiting.set_result(None)

    async def draw(self, color: int) -> str:
        """The hash of one picture."""
        prompt_id = str(uuid4())
        over = self.over[prompt_id] = asyncio.get_running_loop().create_future()
        body = {"prompt_id": prompt_id, "client_id": self.client_id, "prompt": _graph(color, prompt_id)}
        async with self.session.post(self.url + "/prompt", data=msgspec.json.encode(body)) as answer:
            if answer.status != 200:
                raise RuntimeError(f"ComfyUI answered {answer.status}: {await answer.text()}")
            await answer.read()
        await over
        async with self.session.get(f"{self.url}/history/{prompt_id}") as answer:
            entry = _history.decode(await answer.read())[prompt_id]
        [image] = entry.outputs["2"].images
        async with self.session.get(self.url + "/view", params=msgspec.structs.asdict(image)) as answer:
            return hashlib.sha256(await answer.read()).hexdigest()


def _graph(color: int, prompt_id: str) -> dict[str, object]:
    empty = {"width": 64, "height": 64, "batch_size": 1, "color": color % (1 << 24)}
    save = {"images": ["1", 0], "filename_prefix": f"bare/{prompt_id}/picture"}
    return {
        "1": {"class_type": "EmptyImage", "inputs": empty},
        "2": {"class_type": "SaveImage", "inputs": save},
    }


async def run(url: str, in_flight: int, first: int, measuring: Measuring) -> Measured:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        bare = Bare(url, session)
        async with session.ws_connect(f"{url}/ws", params={"clientId": bare.client_id}) as socket:
            listening = asyncio.create_task(bare.listen(socket))
            async with asyncio.TaskGroup() as group:
                for nth in range(in_flight):
                    group.create_task(_client(bare, first + nth, in_flight, measuring))
            listening.cancel()
    return measuring.result()


async def _client(bare: Bare, color: int, step: int, measuring: Measuring) -> None:
    while not measuring.over:
        began = time.perf_counter()
        await bare.draw(color)
        measuring.note(began)
        color += step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    measuring = Measuring(min(0.5, given.seconds / 2), given.seconds)
    tell(uvloop.run(run(given.url, given.in_flight, given.first, measuring)))


if __name__ == "__main__":
    main()
