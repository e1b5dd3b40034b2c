"""A bare client for whatever speaks ComfyUI's protocol: it decides nothing, it only asks and listens."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from waiting import wait_until

RECORDINGS = Path(__file__).parent.parent / "recordings"
PATIENCE = 60.0
HOUR_MS = 3_600_000

_colours = itertools.count(int(uuid.uuid4().int % 0xF00000))


def recorded(name: str) -> Any:
    """What a real server answered, condensed."""
    return json.loads((RECORDINGS / f"{name}.json").read_text("utf-8"))


def new_id() -> str:
    return str(uuid.uuid4())


def flat(prefix: str, color: int | None = None, **inputs: Any) -> dict[str, Any]:
    """EmptyImage -> SaveImage, in a colour no other graph has, so that nothing is cached."""
    color = next(_colours) if color is None else color
    image = {"width": 64, "height": 64, "batch_size": 1, "color": color} | inputs
    return {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def slow() -> dict[str, Any]:
    """A graph that keeps a server without a model busy for minutes; an interrupt is seen between nodes."""
    graph: dict[str, Any] = {
        "0": {
            "class_type": "EmptyImage",
            "inputs": {"width": 1024, "height": 1024, "batch_size": 1, "color": next(_colours)},
        }
    }
    for step in range(1, 41):
        inputs = {"image": [str(step - 1), 0], "blur_radius": 31, "sigma": 10.0}
        graph[str(step)] = {"class_type": "ImageBlur", "inputs": inputs}
    graph["41"] = {"class_type": "PreviewImage", "inputs": {"images": ["40", 0]}}
    return graph


class Answer(NamedTuple):
    """One HTTP answer, read to its end."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Listener:
    """One open WebSocket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, client_id: str) -> None:
        self.socket = socket
        self.client_id = client_id

    async def message(self) -> dict[str, Any]:
        """The next text message; binary ones are passed over."""
        while True:
            received = await self.socket.receive(timeout=PATIENCE)
            if received.type is aiohttp.WSMsgType.TEXT:
                return dict(json.loads(received.data))
            assert received.type is aiohttp.WSMsgType.BINARY, received

    async def until_over(self, prompt_id: str) -> list[dict[str, Any]]:
        """Every message up to the one that says this prompt is over."""
        heard = []
        while True:
            heard.append(await self.message())
            data = heard[-1]["data"]
            if heard[-1]["type"] == "executing" and data["node"] is None and data["prompt_id"] == prompt_id:
                return heard

    async def heard_so_far(self) -> list[dict[str, Any]]:
        """Every text message that was sent to this socket before now; needs `listen(autoping=False)`."""
        await self.socket.ping()
        heard = []
        while (received := await self.socket.receive(timeout=PATIENCE)).type is not aiohttp.WSMsgType.PONG:
            if received.type is aiohttp.WSMsgType.TEXT:
                heard.append(json.loads(received.data))
        return heard

    async def until(self, kind: str, **facts: Any) -> dict[str, Any]:
        """The next message of a type whose data has these values."""
        while True:
            message = await self.message()
            if message["type"] == kind and facts.items() <= message["data"].items():
                return message


class Server:
    """One server under test, simulated or real."""

    def __init__(self, session: aiohttp.ClientSession, url: str, version: str, *, simulated: bool) -> None:
        self.session = session
        self.url = url
        self.version = version
        self.simulated = simulated

    @property
    def old(self) -> bool:
        """Whether it is of the line before `/api/jobs`."""
        return tuple(int(part) for part in self.version.split(".")[:2]) < (0, 27)

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        async with self.session.request(method, path, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def submit(self, graph: dict[str, Any], **fields: Any) -> str:
        """Queue a graph and return its id; fails unless all of it is taken. None leaves a field out."""
        body = {"prompt": graph, "client_id": "conformance", "prompt_id": new_id()} | fields
        body = {name: value for name, value in body.items() if value is not None}
        answer = await self.ask("POST", "/prompt", json=body)
        assert (answer.status, answer.json.get("node_errors")) == (200, {}), answer
        return str(answer.json["prompt_id"])

    async def history(self, prompt_id: str) -> dict[str, Any] | None:
        answer = await self.ask("GET", f"/history/{prompt_id}")
        entry: dict[str, Any] | None = answer.json.get(prompt_id)
        return entry

    async def over(self, prompt_id: str) -> dict[str, Any]:
        """The prompt's history entry, once there is one."""
        entry = await wait_until(lambda: self.history(prompt_id), PATIENCE, f"history of {prompt_id}")
        assert entry is not None
        return entry

    async def run(self, graph: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return await self.over(await self.submit(graph, **fields))

    async def queue(self) -> tuple[list[str], list[str]]:
        """Ids of the running and of the waiting prompts, the latter in the order they will run."""
        queue = (await self.ask("GET", "/queue")).json
        waiting = sorted(queue["queue_pending"], key=lambda item: (item[0], item[1]))
        return [item[1] for item in queue["queue_running"]], [item[1] for item in waiting]

    async def interrupt(self, prompt_id: str) -> None:
        assert (await self.ask("POST", "/interrupt", json={"prompt_id": prompt_id})).status == 200

    @asynccontextmanager
    async def listen(self, client_id: str | None = None, **options: Any) -> AsyncIterator[Listener]:
        client_id = client_id or new_id()
        params = {"clientId": client_id}
        async with self.session.ws_connect("/ws", params=params, max_msg_size=0, **options) as socket:
            yield Listener(socket, client_id)

    @asynccontextmanager
    async def busy(self, **fields: Any) -> AsyncIterator[str]:
        """Keep the worker occupied by one slow prompt, and interrupt it at the end."""
        await self.render(HOUR_MS)
        blocker = await self.submit(slow(), **fields)
        await wait_until(lambda: self._is_running(blocker), PATIENCE, "the slow prompt runs")
        await self.render(0)
        try:
            yield blocker
        finally:
            await self.interrupt(blocker)
            await self.over(blocker)

    async def settle(self) -> None:
        """Bring it to rest: nothing waits, nothing runs, history is empty."""
        await self.ask("POST", "/queue", json={"clear": True})
        await self.ask("POST", "/interrupt", json={})
        await wait_until(self._is_idle, PATIENCE, "the server is idle")
        await self.ask("POST", "/history", json={"clear": True})

    async def render(self, milliseconds: int) -> None:
        """Let a simulator take so long for a prompt from now on; a real server takes what it takes."""
        if self.simulated:
            await self.ask("POST", "/simulator/render", json={"least_ms": milliseconds})

    async def _is_running(self, prompt_id: str) -> bool:
        running, _ = await self.queue()
        return running == [prompt_id]

    async def _is_idle(self) -> bool:
        running, waiting = await self.queue()
        return not running and not waiting


def shape(value: Any) -> Any:
    """The types and keys of a JSON value, without its contents."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value]
    return (
        "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
    )
