"""What surrounds the API: the page, the static files unknown paths fall through to, the origin check."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

from forge.comfyui.simulator.folders import Folders

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PAGE = "<!doctype html><title>ComfyUI, simulated</title><p>This simulates a ComfyUI; only its API is here."
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def frontend_routes(folders: Folders) -> list[web.AbstractRouteDef]:
    """The page, and an empty static folder: unknown paths answer 404 as octet-stream without a body."""
    static = folders.base / "web"
    static.mkdir(exist_ok=True)

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=PAGE, content_type="text/html")

    return [web.get("/", page), web.static("/", static)]


@web.middleware
async def same_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a page of another site sends to a loopback address; answer every OPTIONS."""
    if request.method == "OPTIONS":
        return web.Response()
    if request.headers.get("Sec-Fetch-Site") == "cross-site":
        return web.Response(status=403)
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin", "")
    if origin and urlsplit(f"//{host}").hostname in LOOPBACK:
        claimed = urlsplit(origin).netloc
        if claimed and claimed != host:
            return web.Response(status=403)
    return await handler(request)
