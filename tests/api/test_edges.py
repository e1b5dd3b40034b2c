"""What clients send that nobody meant: always a problem with the right status, never a 500."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest

from api.serving import ROOT, Served
from forge import broker, errors
from forge.api.problems import KINDS, kind_of
from forge.errors import ForgeError

JSON = {"Content-Type": "application/json"}
NOBODYS = "0198f3a0-0000-7000-8000-000000000000"


def is_problem(answer: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail", "code"} <= set(problem)
    assert problem["status"] == status
    assert code is None or problem["code"] == code
    return problem


def leaves(cls: type[ForgeError]) -> list[type[ForgeError]]:
    below = [leaf for child in cls.__subclasses__() for leaf in leaves(child)]
    return below or [cls]


def test_every_error_has_a_status() -> None:
    assert broker.BrokerRefused in leaves(errors.ForgeError)
    for leaf in leaves(ForgeError):
        if leaf.__module__.startswith("forge"):
            assert kind_of(leaf) is not None, f"{leaf.__name__} is missing in problems.KINDS"
    assert ForgeError not in KINDS, "the root would hide what is missing"


def test_what_is_temporary_says_when_to_come_again() -> None:
    assert [cls for cls, kind in KINDS.items() if kind.status in (429, 503) and not kind.retry_after] == []


# ---------------------------------------------------------------------- bodies

BODIES: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "half": (b'{"job_type": "fate_card"', 400),
    "not UTF-8": (b'{"job_type": "fate_card", "params": {"prompt": "\xff\xfe"}}', 400),
    "NaN": (b'{"job_type": "fate_card", "params": {"cfg": NaN}}', 400),
    "a lone surrogate": (b'{"job_type": "fate_card", "params": {"prompt": "\\ud800"}}', 400),
    "deep": (b'{"job_type": "fate_card", "params": {"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}}", 400),
    "an array": (b"[]", 422),
    "null": (b"null", 422),
    "text": (b'"fate_card"', 422),
    "no params": (b'{"job_type": "fate_card"}', 422),
    "no job type": (b'{"params": {}}', 422),
    "an unknown job type": (b'{"job_type": "poem", "params": {}}', 422),
    "an unknown field": (b'{"job_type": "fate_card", "params": {}, "colour": 1}', 422),
    "NUL in a prompt": (b'{"job_type": "fate_card", "params": {"prompt": "a\\u0000b"}}', 422),
    "NUL in an id": (b'{"job_type": "fate_card", "params": {}, "session_id": "a\\u0000b"}', 422),
    "NUL in the job type": (b'{"job_type": "fate\\u0000card", "params": {}}', 422),
    "NUL in a name": (b'{"job_type": "fate_card", "params": {"a\\u0000": 1}}', 422),
    "an endless number": (b'{"job_type": "fate_card", "params": {"steps": ' + b"9" * 6000 + b"}}", 422),
    "an infinite number": (b'{"job_type": "fate_card", "params": {"cfg": 1e999}}', 422),
    "a big number": (b'{"job_type": "fate_card", "params": {"seed": 18446744073709551616}}', 422),
    "priority 0": (b'{"job_type": "fate_card", "params": {}, "priority": 0}', 422),
    "priority as text": (b'{"job_type": "fate_card", "params": {}, "priority": "5"}', 422),
    "priority true": (b'{"job_type": "fate_card", "params": {}, "priority": true}', 422),
    "an empty id": (b'{"job_type": "fate_card", "params": {}, "character_id": ""}', 422),
    "a long id": (b'{"job_type": "fate_card", "params": {}, "character_id": "' + b"x" * 129 + b'"}', 422),
    "a negative life": (b'{"job_type": "fate_card", "params": {}, "ttl_seconds": -1}', 422),
    "params as a list": (b'{"job_type": "fate_card", "params": []}', 422),
    "an array for a prompt": (b'{"job_type": "fate_card", "params": {"prompt": [["x"]]}}', 422),
    "syntax": (b'{"job_type": "fate_card", "params": {"prompt": "<lora:x:1>"}}', 422),
    "too large": (b'{"job_type": "fate_card", "params": {"prompt": "' + b"x" * 70_000 + b'"}}', 413),
}


async def test_bad_bodies_are_refused_with_a_reason(mei: httpx.AsyncClient) -> None:
    for name, (body, status) in BODIES.items():
        for path, sent in (("/jobs", body), ("/batch", b'{"jobs": [' + body + b"]}")):
            answer = await mei.post(path, content=sent, headers=JSON)
            if path == "/jobs":
                problem = is_problem(answer, status)
                assert status != 422 or problem["errors"][0]["message"], name
                assert not problem["detail"].startswith(":"), name
            else:
                assert 400 <= answer.status_code < 500, (name, answer.text)


async def test_the_wrong_field_is_named(mei: httpx.AsyncClient) -> None:
    async def fields(**body: Any) -> set[str]:
        answer = await mei.post("/jobs", json={"job_type": "fate_card", "params": {}} | body)
        return {error["field"] for error in is_problem(answer, 422, "invalid")["errors"]}

    assert await fields(priority=11) == {"priority"}
    assert await fields(colour=1) == {"colour"}
    assert await fields(session_id="\x7f") == {"session_id"}
    assert await fields(params={"steps": 0, "sampler": "dice", "x": 1}) == {
        "params.steps",
        "params.sampler",
        "params.x",
    }
    batch = await mei.post("/batch", json={"jobs": [{"job_type": "fate_card", "params": {}, "priority": 99}]})
    assert is_problem(batch, 422)["errors"][0]["field"] == "jobs[0].priority"


@pytest.mark.parametrize(
    "declared", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
async def test_a_body_must_be_declared_as_json(mei: httpx.AsyncClient, declared: str | None) -> None:
    headers = {} if declared is None else {"Content-Type": declared}
    body = b'{"job_type": "fate_card", "params": {}}'
    is_problem(await mei.post("/jobs", content=body, headers=headers), 415, "unsupported_media_type")


async def test_a_body_of_unknown_length_is_bounded_too(mei: httpx.AsyncClient) -> None:
    async def endless() -> Any:
        for _ in range(40):
            yield b" " * 4096

    is_problem(await mei.post("/jobs", content=endless(), headers=JSON), 413, "too_large")


# --------------------------------------------------------- paths and parameters


async def test_unknown_places_and_methods(served: Served, mei: httpx.AsyncClient) -> None:
    is_problem(await mei.get("/nowhere"), 404, "not_found")
    is_problem(await mei.get("/jobs/not-a-uuid"), 404, "not_found")
    is_problem(await mei.get(f"/jobs/{uuid4()}%00"), 404)
    is_problem(await mei.get("/assets/..%2f..%2fetc/file"), 404)
    not_allowed = await mei.put("/jobs")
    is_problem(not_allowed, 405, "method_not_allowed")
    assert "POST" in not_allowed.headers["allow"]
    async with httpx.AsyncClient(base_url=served.base_url) as plain:
        is_problem(await plain.get("/nowhere"), 404)


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/queue", "limit=0"),
        ("/queue", "limit=-1"),
        ("/queue", "limit=201"),
        ("/queue", "limit=x"),
        ("/queue", "limit=99999999999999999999999"),
        ("/queue", "status=eaten"),
        ("/queue", "job_type=a%00b"),
        ("/queue", "cursor=!!"),
        ("/queue", "cursor=" + "A" * 400),
        ("/queue", "min_seq=-1"),
        ("/queue", "min_seq=9223372036854775808"),
        ("/assets", "asset_type=a%00b"),
        ("/assets", "variant_key=%ED%A0%80%00"),
        ("/assets", "q=ab"),
        ("/assets", "q=a+b+c"),
        ("/assets", "q=abc%00"),
        ("/assets", "sort=price"),
        ("/assets", "created_after=yesterday"),
        ("/assets", "created_after=0001-01-01T00:00:00%2B14:00"),
        ("/assets", "created_before=99999-01-01"),
        ("/assets", "cursor=%00"),
        ("/assets", "cursor=e30"),
        ("/stats", "hours=0"),
        ("/usage", "since=now"),
        (f"/assets/{NOBODYS}/thumbnail", "width=15"),
        (f"/assets/{NOBODYS}/thumbnail", "width=2049"),
        (f"/assets/{NOBODYS}/thumbnail", "width=wide"),
    ],
)
async def test_bad_parameters_are_refused_by_name(mei: httpx.AsyncClient, path: str, query: str) -> None:
    problem = is_problem(await mei.get(f"{path}?{query}"), 422, "invalid")
    assert problem["errors"][0]["field"] == query.partition("=")[0]


async def test_forged_cursors_are_refused(mei: httpx.AsyncClient) -> None:
    from forge.api import cursors

    mark = cursors.tag("queue", "mei", ["pending", "running"], None)
    forged: list[Any] = [
        (-1, uuid4()),
        (2**70, uuid4()),
        ("2026-01-01", uuid4()),
        (1, "x"),
        (1,),
        (1, uuid4(), 2),
        (None, None),
    ]
    for key in forged:
        answer = await mei.get("/queue", params={"cursor": cursors.write(mark, *key)})
        assert is_problem(answer, 422)["errors"][0]["field"] == "cursor", key
    good = await mei.get("/queue", params={"cursor": cursors.write(mark, 10**15, uuid4())})
    assert good.status_code == 200


async def test_strange_headers_are_refused_or_ignored(served: Served) -> None:
    body = {"job_type": "ui_icon", "params": {}}
    async with served.client() as client:
        for value in (b"", b"x" * 129, b"a\x01b", b"\xff\xfe"):
            answer = await client.post("/jobs", json=body, headers={b"X-Forge-User": value})  # type: ignore[dict-item]
            assert answer.status_code in (400, 422), value
        for value in (b"", b"x" * 256, b"a\x01b", b"\xff\xfe"):
            answer = await client.post("/jobs", json=body, headers={b"Idempotency-Key": value})  # type: ignore[dict-item]
            assert answer.status_code in (400, 422), value
        named = await client.post("/jobs", json=body, headers={"X-Forge-User": "梅 *.> 王".encode()})  # type: ignore[dict-item]
        assert named.json()["user_id"] == "梅 *.> 王"
        traced = await client.post("/jobs", json=body, headers={"traceparent": "nonsense"})
        assert traced.status_code == 202


async def test_the_openapi_document_describes_every_route(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.base_url) as plain:
        document = (await plain.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    text = json.dumps(document)
    for name in set(_references(document)):
        kind, _, found = name.removeprefix("#/components/").partition("/")
        assert found in document["components"][kind], name
    assert {"SubmitJob", "SubmitBatch", "JobView", "Problem"} <= set(document["components"]["schemas"])
    submit = document["paths"][f"{ROOT}/jobs"]["post"]
    everywhere = {"400", "401", "403", "408", "414", "422", "429", "431", "503"}
    assert set(submit["responses"]) == everywhere | {"202", "413", "415"}
    body = submit["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/SubmitJob"}
    assert {"Idempotency-Key"} <= {p.get("name") for p in submit["parameters"]}
    ids = [o["operationId"] for operations in document["paths"].values() for o in operations.values()]
    assert len(ids) == len(set(ids))
    assert "submitJob" in ids
    assert "application/problem+json" in submit["responses"]["422"]["content"]
    assert "Retry-After" in submit["responses"]["503"]["headers"]
    assert f"{ROOT}/events" in document["paths"]
    assert "status_code" not in text, "Litestar's own shape of errors is never sent"


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [ref for value in node.values() for ref in _references(value)]
    if isinstance(node, list):
        return [ref for value in node for ref in _references(value)]
    return []


async def test_pages_load_nothing_from_outside(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.base_url) as plain:
        for path in ("/", "/docs", "/docs/docs.js", "/docs/docs.css"):
            page = await plain.get(path)
            assert page.status_code == 200, path
            assert "default-src 'none'" in page.headers["content-security-policy"]
            assert "//" not in page.text.replace("http://localhost", "").replace("// ", ""), path


def test_a_problem_is_small_json() -> None:
    from forge.api.problems import problem_of

    problem, headers = problem_of(errors.QueueFull())
    assert headers["retry-after"] == "30"
    assert msgspec.to_builtins(problem) == {
        "type": "/docs#queue_full",
        "title": "The queue is full",
        "status": 503,
        "detail": "forge's queue is full; try again later.",
        "code": "queue_full",
    }


def test_what_is_our_own_fault_tells_clients_nothing() -> None:
    from forge.api.problems import problem_of

    for error in (errors.LogUnreadable("message 7 on forge.evt"), RuntimeError("secret")):
        problem, _ = problem_of(error)
        assert problem.status == 500
        assert "secret" not in problem.detail
        assert "forge.evt" not in problem.detail
