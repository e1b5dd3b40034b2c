"""The web application: every route, and how errors leave it."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Litestar, Request, Response, Router, get
from litestar.datastructures import State
from litestar.exceptions import HTTPException

from forge.api import assets, docs, jobs, keys, metrics, openapi, operations, problems
from forge.api.auth import Door, admit
from forge.api.edge import MAX_BODY
from forge.api.parts import Parts
from forge.api.sockets import events
from forge.api.views import ROOT


def create_app(parts: Parts) -> Litestar:
    """The application over these parts; ``parts.live`` is to run beside it."""
    counters = metrics.Metrics(parts.live)
    door = Door(parts.settings.api_keys, parts.live, open_to_loopback=parts.open_to_loopback)
    behind_the_door = Router(
        ROOT,
        route_handlers=[jobs.router, assets.router, keys.router, operations.router],
        before_request=admit,
    )
    return Litestar(
        route_handlers=[
            behind_the_door,
            Router(ROOT, route_handlers=[events]),
            operations.livez,
            operations.readyz,
            metrics.metrics,
            openapi_document,
            docs.landing,
            docs.script,
            docs.style,
        ],
        exception_handlers={HTTPException: problems.answer, Exception: problems.answer},
        middleware=[counters],
        state=State({"parts": parts, "door": door, "metrics": counters}),
        openapi_config=openapi.config(),
        request_max_body_size=MAX_BODY,
        logging_config=None,
    )


@get("/openapi.json", include_in_schema=False, media_type="application/vnd.oai.openapi+json")
async def openapi_document(request: Request[Any, Any, Any]) -> Response[bytes]:
    """What this API takes and gives, in OpenAPI 3.1."""
    state = request.app.state
    if "openapi" not in state:
        document = openapi.document(request.app.openapi_schema.to_schema(), ROOT)
        state.openapi = msgspec.json.encode(document)
    return Response(state.openapi, headers={"cache-control": "no-cache"})
