"""The web application: every route, and how errors leave it."""

from __future__ import annotations

from inspect import getclosurevars
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, Router, get
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.routes import HTTPRoute

from forge.api import (
    assets,
    backends,
    cleanup,
    docs,
    jobs,
    keys,
    limits,
    metrics,
    openapi,
    operations,
    problems,
    uploads,
)
from forge.api.auth import Door, admit
from forge.api.edge import MAX_BODY
from forge.api.gate import Gate, Guesses
from forge.api.parts import Parts
from forge.api.seats import Seats
from forge.api.sockets import events, give_ticket
from forge.api.tickets import Tickets
from forge.api.views import ROOT


def create_app(parts: Parts) -> Gate:
    """The application over these parts, behind its limits; ``parts.live`` is to run beside it."""
    return Gate(_app(parts), parts.settings)


def _app(parts: Parts) -> Litestar:
    door = Door(parts.settings.api_keys, parts.live, open_to_loopback=parts.open_to_loopback)
    behind_the_door = Router(
        ROOT,
        route_handlers=[
            jobs.router,
            assets.router,
            cleanup.router,
            uploads.router,
            operations.router,
            backends.router,
            limits.router,
            keys.router,
            give_ticket,
        ],
        before_request=admit,
    )
    app = Litestar(
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
        state=State(
            {
                "parts": parts,
                "leaving": False,
                "unready": frozenset[str](),
                "door": door,
                "metrics": metrics.Metrics(parts),
                "reception": uploads.Reception(),
                "guesses": Guesses(),
                "tickets": Tickets(parts.nc),
                "seats": Seats(parts.settings.sockets, parts.settings.sockets_per_user),
            }
        ),
        openapi_config=openapi.config(),
        request_max_body_size=MAX_BODY,
        logging_config=None,
    )
    _tell_all_methods(app)
    return app


def _tell_all_methods(app: Litestar) -> None:
    """Let OPTIONS name each method of a path.

    Litestar makes the route anew for each further handler of a path, but keeps the first one's answer to
    OPTIONS, which looks at a route that is no longer there.
    """
    for route in app.routes:
        for handler in route.route_handlers if isinstance(route, HTTPRoute) else ():
            first = getclosurevars(getattr(handler.fn, "func", handler.fn)).nonlocals.get("self")
            if isinstance(first, HTTPRoute):
                first.methods |= route.methods


@get("/openapi.json", include_in_schema=False, media_type="application/vnd.oai.openapi+json")
async def openapi_document(request: Request[Any, Any, Any]) -> Response[bytes]:
    """What this API takes and gives, in OpenAPI 3.1."""
    state = request.app.state
    if "openapi" not in state:
        document = openapi.document(request.app.openapi_schema.to_schema(), ROOT, state.parts.workflows)
        state.openapi = msgspec.json.encode(document)
    return Response(state.openapi, headers={"cache-control": "no-cache"})
