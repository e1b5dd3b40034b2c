"""What a worker says about itself over HTTP, where it is given a port: three paths that an API has, too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from forge.errors import ForgeError, ServerFailed
from forge.telemetry.numbers import registry

if TYPE_CHECKING:
    from aiohttp.web import Request, Response

_CHECK_SECONDS = 1.0

Check = Callable[[], Awaitable[object]]
"""Raises what is wrong, if anything is."""


class Status:
    """``checks`` say whether the worker has what it needs; ready is who works and is not to ``stop``."""

    def __init__(self, stop: asyncio.Event) -> None:
        self.stop = stop
        self.checks: dict[str, Check] = {}
        self.working = False

    @asynccontextmanager
    async def serving(self, host: str, port: int) -> AsyncIterator[int]:
        """Answer meanwhile; the port, which is another if ``port`` is 0.

        Raises:
            ServerFailed: the address cannot be listened on.
        """
        from aiohttp import web  # heavy: only where a port is given

        app = web.Application()
        app.router.add_get("/livez", self._livez)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                raise ServerFailed(f"FORGE_WORKER_PORT={port} on {host} cannot be used: {error}") from error
            yield runner.addresses[0][1]
        finally:
            await runner.cleanup()

    async def _livez(self, _: Request) -> Response:
        return _answer(b"ok\n", "text/plain")

    async def _readyz(self, _: Request) -> Response:
        found = await asyncio.gather(*(_wrong(check) for check in self.checks.values()))
        checks = {
            name: {"ok": not wrong, "detail": wrong} for name, wrong in zip(self.checks, found, strict=True)
        }
        ready = self.working and not self.stop.is_set() and not any(found)
        body = msgspec.json.encode({"ready": ready, "checks": checks})
        return _answer(body, "application/json", 200 if ready else 503)

    async def _metrics(self, _: Request) -> Response:
        return _answer(generate_latest(registry), CONTENT_TYPE_LATEST)


def _answer(body: bytes, media_type: str, status: int = 200) -> Response:
    from aiohttp.web import Response

    headers = {"Content-Type": media_type, "Cache-Control": "no-store"}
    return Response(body=body, status=status, headers=headers)


async def _wrong(check: Check) -> str:
    try:
        async with asyncio.timeout(_CHECK_SECONDS):
            await check()
    except (ForgeError, TimeoutError, OSError) as error:
        return str(error) or "no answer in time"
    return ""
