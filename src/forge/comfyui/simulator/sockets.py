"""The WebSocket side: who listens, and the one publisher that writes to everybody in turn."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from typing import Any

from aiohttp import WSMessage, WSMsgType, web

Status = Callable[[], dict[str, Any]]


class Sockets:
    """Open sockets by client id.

    One publisher writes all messages in order and waits for every socket, so a reader that stops reading
    stalls everybody. A second socket under the same id replaces the first, and the first takes the id with
    it when it closes: the second is deaf from then on.
    """

    def __init__(self, status: Status, features: dict[str, Any]) -> None:
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.last_node: str | None = None
        self.last_client: Any = None
        self.metadata_clients: set[str] = set()
        self._status = status
        self._features = features
        self._registered: dict[Any, web.WebSocketResponse] = {}
        self._open: dict[web.WebSocketResponse, web.Request] = {}
        self._messages: asyncio.Queue[tuple[str | bytes, Any]] = asyncio.Queue()

    def send(self, event: str, data: Any, client_id: Any = None) -> None:
        """Queue a message for one client id, or for every socket when it is None."""
        self._messages.put_nowait((json.dumps({"type": event, "data": data}), client_id))

    def send_bytes(self, frame: bytes, client_id: Any = None) -> None:
        self._messages.put_nowait((frame, client_id))

    async def publish(self) -> None:
        """Write queued messages until cancelled."""
        while True:
            message, client_id = await self._messages.get()
            await self.flowing.wait()
            if client_id is None:
                receivers = list(self._registered.values())
            else:
                found = self._registered.get(client_id)
                receivers = [found] if found is not None else []
            for socket in receivers:
                await _write(socket, message)

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        """Answer one handshake and stay until that socket closes."""
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        client_id = request.rel_url.query.get("clientId", "") or uuid.uuid4().hex
        self._registered[client_id] = socket
        self._open[socket] = request
        try:
            await _write(
                socket, json.dumps({"type": "status", "data": {"status": self._status(), "sid": client_id}})
            )
            if self.last_client == client_id and self.last_node is not None:
                self.send("executing", {"node": self.last_node}, client_id)
            await self._read(socket, client_id)
        finally:
            self._registered.pop(client_id, None)
            self.metadata_clients.discard(client_id)
            del self._open[socket]
        return socket

    def abort_all(self) -> None:
        """Drop every connection without a close frame: clients see code 1006. What was queued is lost."""
        while not self._messages.empty():
            self._messages.get_nowait()
        for request in list(self._open.values()):
            if request.transport is not None:
                request.transport.abort()

    async def close_all(self) -> None:
        """Close every socket politely, for the end of a test."""
        for socket in list(self._open):
            await socket.close()

    async def _read(self, socket: web.WebSocketResponse, client_id: str) -> None:
        first = True
        async for message in socket:
            flags = _feature_flags(message) if first else None
            first = first and flags is None
            if flags:
                if flags.get("data", {}).get("supports_preview_metadata"):
                    self.metadata_clients.add(client_id)
                await _write(socket, json.dumps({"type": "feature_flags", "data": self._features}))


def _feature_flags(message: WSMessage) -> dict[str, Any] | None:
    """The message as feature flags: None for what is no JSON, empty for JSON of another type."""
    if message.type is not WSMsgType.TEXT:
        return None
    try:
        content = json.loads(message.data)
    except ValueError:
        return None
    if isinstance(content, dict) and content.get("type") == "feature_flags":
        return content
    return {}


async def _write(socket: web.WebSocketResponse, message: str | bytes) -> None:
    try:
        if isinstance(message, bytes):
            await socket.send_bytes(message)
        else:
            await socket.send_str(message)
    except (ConnectionError, RuntimeError):
        return  # it went away between the look-up and the write; its own task cleans up
