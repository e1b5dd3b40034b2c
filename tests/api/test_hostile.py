"""Hostile input: every operation of the document, every parameter, header and body, by hand and by machine.

Whatever is sent, the answer comes, is documented, is no 5xx, and where it refuses it is a problem.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest

from api.raw import Answer, ask
from api.serving import ROOT, Serve, Served
from forge.settings import ApiKey, Settings

pytestmark = pytest.mark.timeout(600)  # thousands of requests each

KEY = "an operator's"
JSON = (b"Content-Type", b"application/json")

VALUES: list[bytes] = [
    b"",
    b"%00",
    b"a%00b",
    b"%0d%0aX-Evil:%201",
    b"%ED%A0%80",
    b"%C0%AF",
    b"%FF",
    b"%",
    b"%zz",
    b"%F0%9F%92%A9",
    b"%E2%80%AE",
    b"-1",
    b"0x10",
    b"1_000",
    b"%D9%A1",
    b"9" * 40,
    b"9" * 5000,
    b"1e400",
    b"nan",
    b"-inf",
    b"null",
    b"true",
    b"[]",
    b"%7B%7D",
    b"'--",
    b"%25%27%20or%201=1",
    b"..%2F..%2Fetc%2Fpasswd",
    b"%5C%5Chost%5Cshare",
    b"0001-01-01T00:00:00%2B23:59",
    b"9999-12-31T23:59:59-23:59",
    b"00000000-0000-0000-0000-000000000000",
    b"a" * 4000,
]

HEADERS: list[bytes] = [
    b"",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"a" * 4000,
    b"*",
    b"null",
    b"bytes=0-18446744073709551616",
    b"bytes=-0",
    b"bytes=,,,",
    b'W/"',
    b"Bearer",
    b"Bearer " + b"\xff" * 100,
    b"multipart/form-data",
    b"application/json; charset=utf-16",
    b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-00",
]
NAMES = (
    b"X-Forge-User",
    b"Idempotency-Key",
    b"Range",
    b"If-Range",
    b"If-None-Match",
    b"Accept",
    b"Accept-Encoding",
    b"Content-Type",
    b"Content-Encoding",
    b"Cookie",
    b"Origin",
    b"traceparent",
    b"X-Forwarded-For",
    b"Forwarded",
    b"X-HTTP-Method-Override",
    b"Upgrade",
    b"Expect",
    b"Sec-WebSocket-Protocol",
)


def _job(params: bytes, more: bytes = b"") -> bytes:
    return b'{"job_type": "fate_card", "params": ' + params + more + b"}"


BODIES: list[bytes] = [
    b"",
    b"\x00",
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"{",
    b"{}",
    b"[]",
    b"null",
    b"NaN",
    b"-Infinity",
    b'"' + b"a" * 60_000 + b'"',
    b"9" * 60_000,
    b"-" * 60_000,
    b"[" * 60_000,
    b"[" * 30_000 + b"]" * 30_000,
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    b" " * 60_000 + b"{}",
    b"{" + b",".join(b'"k%d":%d' % (n, n) for n in range(4000)) + b"}",
    _job(b"{}", b', "job_type": "poem"'),
    _job(b'{"prompt": "a", "prompt": "\\u0000"}'),
    _job(b'{"prompt": "\\ud800"}'),
    _job(b'{"prompt": "\xed\xa0\x80"}'),
    _job(b'{"prompt": "' + "́".encode() * 20_000 + b'"}'),
    _job(b'{"prompt": "' + b"(" * 50_000 + b'"}'),
    _job(b'{"prompt": "' + b"__" * 3_900 + b'"}'),
    _job(b'{"prompt": "' + b"{" * 1_900 + b'"}'),
    _job(b'{"prompt": "' + b"<" * 1_900 + b'"}'),
    _job(b'{"prompt": "' + "ﷺ".encode() * 1_900 + b'"}'),
    _job(b'{"cfg": 1e999}'),
    _job(b'{"cfg": -0.0, "steps": 20.0}'),
    _job(b'{"seed": 1e2}'),
    _job(b'{"seed": ' + b"9" * 4_400 + b"}"),
    _job(b'{"' + b"a" * 60_000 + b'": 1}'),
    _job(b'{"__proto__": {}, "constructor": 1, "$ref": "x"}'),
    _job(b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}"),
    _job(b"{}", b', "priority": 5.0'),
    _job(b"{}", b', "priority": 1e999'),
    _job(b"{}", b', "ttl_seconds": 9223372036854775808'),
    _job(b"{}", b', "session_id": "\\u202e"'),
    _job(b"{}", b', "session_id": "../../etc"'),
    _job(b"{}", b', "character_id": "*.>"'),
]

METHODS = ("PUT", "PATCH", "TRACE", "PROPFIND", "M-SEARCH", "OPTIONS", "HEAD")


@pytest.fixture
async def locked(serve: Serve, settings: Settings) -> Served:
    """An API that wants a key, as the document says."""
    return await serve(
        with_settings=msgspec.structs.replace(settings, api_keys=(ApiKey("operator", "ops", KEY),))
    )


@pytest.fixture
async def document(locked: Served) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=locked.base_url) as plain:
        found: dict[str, Any] = (await plain.get("/openapi.json")).json()
        return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if path != f"{ROOT}/events":
                yield method.upper(), path, operation


def parameters(operation: dict[str, Any], place: str) -> list[str]:
    return [p["name"] for p in operation.get("parameters", []) if p.get("in") == place]


def filled(path: str, operation: dict[str, Any], value: bytes = b"") -> bytes:
    target = path.encode()
    for name in parameters(operation, "path"):
        target = target.replace(b"{%s}" % name.encode(), value or str(uuid4()).encode())
    return target


def sane(answer: Answer, operation: dict[str, Any] | None, *sent: object) -> None:
    """Answered, documented, and a problem where it refuses; ``operation`` None: there is no such route."""
    said = (*(str(s)[:200] for s in sent), answer.status, answer.body[:300])
    known = {"404", "405", "400"} if operation is None else set(operation["responses"]) | {"404"}
    assert str(answer.status) in known, said
    assert answer.status < 500, said
    if answer.status >= 400:
        assert answer.type == "application/problem+json", said
        problem = json.loads(answer.body)
        assert problem["status"] == answer.status, said
        assert problem["code"], said
        assert "Traceback" not in answer.body.decode(), said


async def test_every_parameter_survives_every_value(locked: Served, document: dict[str, Any]) -> None:
    key = (b"Authorization", b"Bearer " + KEY.encode())
    for method, path, operation in operations(document):
        for value in VALUES:
            if parameters(operation, "path") and value:
                target = filled(path, operation, value)
                sane(await ask(locked.base_url, method, target, [key, JSON]), operation, method, target)
            named = [name.encode() for name in parameters(operation, "query")]
            queries = [b"%s=%s" % (name, value) for name in named]
            queries += [b"%s=%s&%s=%s" % (name, value, name, value) for name in named[:2]]
            for query in [*queries, b"%s=%s" % (value, value), b"&&=&" + value]:
                target = filled(path, operation) + b"?" + query
                sane(await ask(locked.base_url, method, target, [key, JSON]), operation, method, target)


async def test_every_route_survives_every_header(locked: Served, document: dict[str, Any]) -> None:
    key = (b"Authorization", b"Bearer " + KEY.encode())
    for method, path, operation in operations(document):
        target, body = filled(path, operation), b'{"job_type": "ui_icon", "params": {}}'
        for name in NAMES:
            for value in HEADERS:
                more = [] if name == b"Content-Type" else [JSON]
                answer = await ask(locked.base_url, method, target, [key, (name, value), *more], body)
                sane(answer, operation, method, target, name, value)
        for value in HEADERS:
            answer = await ask(locked.base_url, method, target, [(b"Authorization", value), JSON], body)
            sane(answer, operation, method, target, value)
            assert answer.status in (401, 429) or not path.startswith(ROOT), (method, path, value)


async def test_every_body_is_refused_or_taken(locked: Served, document: dict[str, Any]) -> None:
    key = (b"Authorization", b"Bearer " + KEY.encode())
    for method, path, operation in operations(document):
        for body in BODIES if "requestBody" in operation else BODIES[:6]:
            for sent in (body, b'{"jobs": [' + body + b"]}"):
                answer = await ask(locked.base_url, method, filled(path, operation), [key, JSON], sent)
                sane(answer, operation, method, path, sent)


async def test_every_path_answers_every_method(locked: Served, document: dict[str, Any]) -> None:
    key = (b"Authorization", b"Bearer " + KEY.encode())
    for method, path, operation in operations(document):
        taken = {one for one, there, _ in operations(document) if there == path}
        for other in (method for method in METHODS if method not in taken):
            answer = await ask(locked.base_url, other, filled(path, operation), [key])
            if other == "OPTIONS":
                assert answer.status == 204, path
                assert method in answer.headers["allow"], path
            elif other == "HEAD":
                assert answer.status < 500, path
                assert answer.body == b"", path
            else:
                assert answer.status == 405, (other, path)
                assert method in answer.headers["allow"], path
                sane(answer, None, other, path)


TARGETS = [
    b"/",
    b"//",
    b"/%",
    b"/%00",
    b"/\xc3\xa9",
    b"/..%2f",
    b"/api",
    b"/api/v1/comfyui/",
    b"/api/v1/comfyui//jobs",
    b"/api/v1/comfyui/jobs/",
    b"/api/v1/comfyui/jobs;x=1",
    b"/API/V1/COMFYUI/JOBS",
    b"http://evil.example/api/v1/comfyui/queue",
    b"*",
    b"evil.example:443",
    b"?",
    b"/?%zz=%zz",
    b"/docs/../livez",
    b"/metrics/%2e%2e",
    b"/api/v1/comfyui/events",
    b"/.git/config",
    b"/x" * 3000,
]


async def test_there_is_no_place_that_breaks_it(locked: Served) -> None:
    for target in TARGETS:
        for method in ("GET", "POST", "CONNECT", "DELETE"):
            answer = await ask(locked.base_url, method, target)
            assert 0 < answer.status < 500, (method, target)
            if answer.status >= 400:
                assert answer.type == "application/problem+json", (method, target, answer.body)


async def test_schemathesis_finds_nothing(locked: Served, document: dict[str, Any], tmp_path: Path) -> None:
    """What a machine thinks of; the same each time. Run it by hand with another seed and more examples."""
    checks = [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "unsupported_method",
        "allow_header_conformance",
        "ignored_auth",
    ]
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{locked.base_url}/openapi.json",
        *("--header", f"Authorization: Bearer {KEY}"),
        *("--exclude-path", f"{ROOT}/events"),  # a socket
        *("--checks", ",".join(checks)),
        *("--phases", "examples,coverage,fuzzing"),
        *("--max-examples", "5"),
        *("--seed", "1"),
        "--generation-deterministic",
        *("--request-timeout", "20"),
        "--no-shrink",
        "--continue-on-failure",
        "--no-color",
    ]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said.decode()[-8000:]
    tested = re.search(rb"Tested: +([0-9]+)", said)
    assert tested, said.decode()
    assert int(tested[1]) == len([*operations(document)])
