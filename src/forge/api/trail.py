"""Where a request's trail begins: its id, which answer, log lines and events carry, and its place in a trace.

A client may bring both: ``X-Request-Id`` (letters, digits and ``._:-``, up to 64) and a W3C ``traceparent``.
"""

from __future__ import annotations

import re
from random import getrandbits
from typing import Any, cast

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from forge.telemetry import SERVER, about, collecting, failed, span

_FORM = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_UNTRACED = frozenset(("/livez", "/readyz", "/metrics"))


class Trail:
    """Everything behind it can say on whose behalf it does something."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = cast("dict[str, Any]", scope)
        headers = dict(given["headers"])
        named = headers.get(b"x-request-id", b"")
        id_ = named if _FORM.fullmatch(named) else b"%032x" % getrandbits(128)  # it opens nothing
        about(correlation=id_.decode())
        parent = headers.get(b"traceparent")
        if (parent or collecting()) and given["type"] == "http" and given["path"] not in _UNTRACED:
            await self._traced(given, receive, _naming(send, id_), (parent or b"").decode("latin-1"))
        else:
            await self._app(scope, receive, _naming(send, id_))

    async def _traced(self, scope: dict[str, Any], receive: Receive, send: Send, parent: str) -> None:
        method = scope["method"]
        fields = {"http.request.method": method, "url.path": scope["path"]}
        with span(method, parent, fields, kind=SERVER) as current:

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    route, status = scope.get("path_template", ""), message["status"]
                    current.update_name(f"{method} {route}".strip())
                    current.set_attribute("http.route", route)
                    current.set_attribute("http.response.status_code", status)
                    if status >= 500:
                        failed(current, str(status))
                await send(message)

            await self._app(cast("Scope", scope), receive, noted)


def _naming(send: Send, id_: bytes) -> Send:
    """Let the answer carry the request's id."""

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-request-id", id_)]
        await send(message)

    return named
