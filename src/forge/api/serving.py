"""The web server around the application: uvicorn in our own event loop, under our own signals."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import Iterator

import uvicorn

from forge.api.connections import HttpConnection, SocketConnection
from forge.api.gate import Gate
from forge.api.live import Live
from forge.api.sockets import MAX_MESSAGE
from forge.errors import ServerFailed

log = logging.getLogger("forge.api")

GRACE_SECONDS = 5
"""How long open requests may take once the server is told to stop."""

PING_SECONDS = 20.0
"""How often a socket is asked whether it lives, and how long it may take to say so."""


class Server(uvicorn.Server):
    """uvicorn without its own signal handling, which re-raises SIGTERM before anything else is closed, and
    without an exit of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen.

        Raises:
            ServerFailed: the address cannot be listened on.
        """
        host, port = self.config.host, self.config.port
        try:
            await super().startup(sockets)
        except SystemExit as end:
            if not isinstance(end.__context__, OSError):
                raise
            raise ServerFailed(
                f"FORGE_PORT={port} on FORGE_HOST={host} cannot be used: {end.__context__}"
            ) from end
        log.info("serving", extra={"host": host, "port": port})


def configuration(app: Gate, host: str, port: int) -> uvicorn.Config:
    """How uvicorn is to serve, with every bound it knows of and those of our own connections."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        loop="none",
        http=HttpConnection,
        ws=SocketConnection,
        ws_max_size=MAX_MESSAGE,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PING_SECONDS,
        ws_per_message_deflate=False,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # whoever asks is who connects: nothing a client sends makes it local
        timeout_keep_alive=30,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


async def serve(
    app: Gate, live: Live, host: str, port: int, stop: asyncio.Event, leave_seconds: float = 0.0
) -> None:
    """Serve until ``stop`` is set, and for ``leave_seconds`` more with `/readyz` 503, for who sends requests
    here to send them elsewhere; then sockets are told to come again, and open requests finish.

    Raises:
        LogUnreadable: an event that no API can read has ended the live reader.
        ServerFailed: the address cannot be listened on.
    """
    # The line and the remembered events are many objects that stay: looking through them for cycles at the
    # default pace costs a fifth of every request.
    gc.set_threshold(20_000, 20, 100)
    server = Server(configuration(app, host, port))
    reading = asyncio.create_task(live.run(), name="live")
    serving = asyncio.create_task(server.serve(), name="server")
    told = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({reading, serving, told}, return_when=asyncio.FIRST_COMPLETED)
        if done == {told}:
            app.leave()
            done, _ = await asyncio.wait(
                {reading, serving}, timeout=leave_seconds, return_when=asyncio.FIRST_COMPLETED
            )
        for task in done - {told}:
            task.result()
    finally:
        live.close()
        server.should_exit = True
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await serving
        finally:
            for task in (reading, told):
                task.cancel()
            await asyncio.gather(reading, told, return_exceptions=True)
