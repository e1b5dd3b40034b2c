"""The OpenAPI document: what Litestar finds in the routes, and what it cannot know."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPMethod
from importlib.metadata import version
from typing import Any

import msgspec
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import (
    OpenAPIFormat,
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
)
from litestar.types import OperationIDCreator

from forge.api.docs import DocsPage, docs_router
from forge.api.problems import KINDS, MEDIA_TYPE

_VISIBLE = "^[^\\x00-\\x1f\\x7f-\\x9f]*$"
_REF = "#/components/schemas/{name}"

IDEMPOTENCY = Parameter(
    name="Idempotency-Key",
    param_in="header",
    description="Any text of up to 255 characters; same key, same body: the same request for ever.",
    schema=Schema(type=OpenAPIType.STRING, min_length=1, max_length=255, pattern=_VISIBLE),
)

_USER = {
    "name": "X-Forge-User",
    "in": "header",
    "description": "Whom a service or an operator acts for; 1 to 128 characters of UTF-8.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 128, "pattern": _VISIBLE},
}

_EVENTS = {
    "get": {
        "tags": ["live"],
        "operationId": "events",
        "summary": "Live events",
        "description": (
            "WebSocket: live job and asset events, resumable by sequence. With the sub-protocol `forge.v1` "
            'the client begins with `{"t": "sub", "after": SEQ}`; without it events come at once. Web pages '
            "send a ticket as a second sub-protocol, `ticket.T`. Closed with 4401 (no key or ticket, or no "
            "longer good), 4403 (not for this user or page), 4408 (too slow), 4429 (too many sockets or "
            "messages), 1008, 1009, 1012 or 1013 (come again)."
        ),
        "parameters": [
            {
                "name": "after",
                "in": "query",
                "required": False,
                "description": "Begin behind this sequence; default: from now on.",
                "schema": {"type": "integer", "minimum": 0},
            }
        ],
        "responses": {"101": {"description": "The socket is open."}},
    }
}

_bodies: dict[str, type[msgspec.Struct]] = {}


def taking(body: type[msgspec.Struct], *headers: Parameter) -> dict[str, Any]:
    """How to declare a body that the route decodes itself, and headers that it reads itself."""
    _bodies[body.__name__] = body

    @dataclass
    class Taking(Operation):
        def __post_init__(self) -> None:
            reference = Reference(ref=_REF.format(name=body.__name__))
            self.request_body = RequestBody(
                content={"application/json": OpenAPIMediaType(schema=reference)}, required=True
            )
            self.parameters = [*(self.parameters or []), *headers]

    return {"operation_class": Taking}


def with_headers(*headers: Parameter) -> dict[str, Any]:
    """How to declare headers that a route without a body reads itself."""

    @dataclass
    class Heading(Operation):
        def __post_init__(self) -> None:
            self.parameters = [*(self.parameters or []), *headers]

    return {"operation_class": Heading}


def taking_picture() -> dict[str, Any]:
    """How to declare a form with one picture, which the route reads itself."""

    @dataclass
    class Taking(Operation):
        def __post_init__(self) -> None:
            image = Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY)
            form = Schema(type=OpenAPIType.OBJECT, properties={"image": image}, required=["image"])
            self.request_body = RequestBody(
                content={"multipart/form-data": OpenAPIMediaType(schema=form)}, required=True
            )

    return {"operation_class": Taking}


def for_each_method(name: str) -> OperationIDCreator:
    """Ids of a route that answers to GET and HEAD."""
    return lambda _handler, method, _path: f"{method.lower()}{name}"


PARTIAL = {
    206: ResponseSpec(None, description="The part that Range asked for.", generate_examples=False),
    304: ResponseSpec(None, description="If-None-Match names it: nothing new.", generate_examples=False),
}
"""What a file may be answered with besides itself."""


def config() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="forge",
        version=version("forge"),
        description=(
            "Pictures for the game, drawn by ComfyUI. Ask with `POST /jobs`, look with `GET /jobs/{id}`, "
            "fetch what came of it under `/assets`. Every reply to a write carries `seq`; a read given "
            "`?min_seq=` waits until it tells of that event. Errors are problem details (RFC 9457). "
            "Every answer has an `X-Request-Id`, the one that came with the request if it has one: name it "
            "when you ask the operator what went wrong."
        ),
        use_handler_docstrings=True,
        path="/docs",
        render_plugins=[DocsPage()],
        openapi_router=docs_router(),
    )


def document(found: dict[str, Any], root: str, job_types: Iterable[str]) -> dict[str, Any]:
    """The finished document, from the one that Litestar made of the routes."""
    _, bodies = msgspec.json.schema_components(list(_bodies.values()), ref_template=_REF)
    bodies["SubmitJob"]["properties"]["job_type"]["enum"] = sorted(job_types)
    components = found.setdefault("components", {})
    components.setdefault("schemas", {}).update(bodies)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    components["parameters"] = {"ForgeUser": _USER}
    components["headers"] = {
        "RetryAfter": {"description": "Seconds after which to come again.", "schema": {"type": "integer"}}
    }
    paths = found["paths"]
    for path, operations in paths.items():
        operations.pop("head", None)  # goes without saying where there is a GET
        for method, operation in operations.items():
            if method.upper() in HTTPMethod.__members__:
                operation["responses"].get("204", {}).pop("content", None)
                operation["summary"] = operation["description"].split(". ")[0].rstrip(".")
                _come_again(operation["responses"])
                if path.startswith(root):
                    _behind_the_door(operation)
    paths[f"{root}/events"] = _EVENTS
    found["x-forge-problems"] = {
        kind.code: {"status": told.status, "title": told.title, "detail": (kind.__doc__ or "").split("\n")[0]}
        for kind, told in KINDS.items()
        if told.status != 500
    }
    return found


def _behind_the_door(operation: dict[str, Any]) -> None:
    operation["security"] = [{"key": []}]
    operation.setdefault("parameters", []).append({"$ref": "#/components/parameters/ForgeUser"})
    answers = operation["responses"]
    if MEDIA_TYPE not in answers.get("400", {}).get("content", {MEDIA_TYPE: None}):
        del answers["400"]  # Litestar's own form of errors, which never leaves


def _come_again(answers: dict[str, Any]) -> None:
    for status in ("429", "503"):
        if status in answers:
            answers[status]["headers"] = {"Retry-After": {"$ref": "#/components/headers/RetryAfter"}}
