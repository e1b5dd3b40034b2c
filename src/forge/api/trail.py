"""Where a request's trail begins: its id, which answer, log lines and events carry, its place in a trace, and
the time that its answer took.

A client may bring both: ``X-Request-Id`` (letters, digits and ``._:-``, up to 64) and a W3C ``traceparent``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import getrandbits
from time import perf_counter
from typing import Any, cast

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from forge.telemetry import SERVER, about, collecting, failed, span

_FORM = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_UNTRACED = frozenset(("/livez", "/readyz", "/metrics"))


class Trail:
    """Everything behind it can say on whose behalf it does something.

    ``answered`` is told of each request that has a route: its answer's status, and the seconds until that.
    """

    def __init__(self, app: ASGIApp, answered: Callable[[dict[str, Any], int, float], None]) -> None:
        self._app, self._answered = app, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = cast("dict[str, Any]", scope)
        headers = dict(given["headers"])
        named = headers.get(b"x-request-id", b"")
        id_ = named if _FORM.fullmatch(named) else b"%032x" % getrandbits(128)  # it opens nothing
        about(correlation=id_.decode())
        parent = headers.get(b"traceparent")
        send = self._naming(given, send, id_)
        if (parent or collecting()) and given["type"] == "http" and given["path"] not in _UNTRACED:
            await self._traced(given, receive, send, (parent or b"").decode("latin-1"))
        else:
            await self._app(scope, receive, send)

    def _naming(self, scope: dict[str, Any], send: Send, id_: bytes) -> Send:
        """Let the answer carry the request's id, and be counted."""
        began = perf_counter()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", id_)]
                if "path_template" in scope:
                    self._answered(scope, message["status"], perf_counter() - began)
            await send(message)

        return named

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
