"""The pages forge has of its own: landing page and the API's description. They load nothing from outside."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from litestar import Request, Response, Router, get
from litestar.openapi.plugins import OpenAPIRenderPlugin

_PAGES = Path(__file__).with_name("pages")

_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@cache
def _page(name: str) -> bytes:
    return (_PAGES / name).read_bytes()


def _served(name: str, media_type: str) -> Response[bytes]:
    return Response(_page(name), media_type=media_type, headers=_HEADERS)


@get("/", include_in_schema=False)
async def landing() -> Response[bytes]:
    """What this is and where to look."""
    return _served("landing.html", "text/html")


@get("/docs/docs.js", include_in_schema=False)
async def script() -> Response[bytes]:
    return _served("docs.js", "text/javascript")


@get("/docs/docs.css", include_in_schema=False)
async def style() -> Response[bytes]:
    return _served("docs.css", "text/css")


class DocsPage(OpenAPIRenderPlugin):
    """``/docs``: drawn in the browser from ``/openapi.json``, by a script of our own.

    The usual viewers are megabytes of somebody else's and want a network.
    """

    def __init__(self) -> None:
        super().__init__(path="/")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return _page("docs.html")


def docs_router() -> Router:
    """Where Litestar puts the page, with the headers it needs."""
    return Router("/docs", route_handlers=[], include_in_schema=False, response_headers=_HEADERS)
