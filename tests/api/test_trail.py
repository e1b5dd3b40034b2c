"""A request's id, and whose trace it is part of."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import httpx
import pytest

from api.making import load
from api.serving import Served
from api.test_operations import submit
from forge.telemetry.lines import JsonLines

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Lines(logging.Handler):
    """What a process would write, read again."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines("api"))
        self.lines: list[dict[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture
def lines() -> Iterator[list[dict[str, str]]]:
    handler = Lines()
    logging.getLogger("forge").addHandler(handler)
    yield handler.lines
    logging.getLogger("forge").removeHandler(handler)


@pytest.mark.parametrize("path", ["/jobs", "/queue", "/nowhere", "/jobs/no-id"])
async def test_every_answer_carries_an_id_of_its_own(mei: httpx.AsyncClient, path: str) -> None:
    first, second = await mei.get(path), await mei.head(path)
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert len(first.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize(
    ("said", "kept"),
    [(b"order-66.a:b_c", True), (b"x" * 65, False), (b"", False), (b"two words", False), (b"\xff", False)],
)
async def test_a_client_may_name_its_request(mei: httpx.AsyncClient, said: bytes, kept: bool) -> None:
    answer = await mei.get("/queue", headers={b"X-Request-Id": said})  # type: ignore[dict-item]
    assert answer.status_code == 200
    assert (answer.headers["x-request-id"].encode() == said) is kept


async def test_events_say_on_whose_behalf_and_in_which_trace(served: Served, mei: httpx.AsyncClient) -> None:
    mei.headers.update({"X-Request-Id": "order-66", "traceparent": TRACEPARENT})
    told = await load(served.parts, "mei", await submit(mei))
    assert told.requested.correlation == "order-66"
    assert told.requested.traceparent == TRACEPARENT, "handed on where nothing is collected"
    del mei.headers["X-Request-Id"], mei.headers["traceparent"]
    other = await load(served.parts, "mei", await submit(mei))
    assert len(other.requested.correlation) == 32
    assert other.requested.traceparent == ""


async def test_log_lines_say_whom_they_concern(
    served: Served, mei: httpx.AsyncClient, lines: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await submit(mei)
    monkeypatch.setattr(served.parts.jobs, "act", None)  # a mistake in forge
    said = {"X-Request-Id": "order-66", "traceparent": TRACEPARENT}
    answer = await mei.delete(f"/jobs/{job['id']}", headers=said)
    assert answer.status_code == 500
    (line,) = [line for line in lines if line["event"] == "a request failed"]
    assert line["correlation"] == answer.headers["x-request-id"] == "order-66"
    assert (line["job"], line["user"]) == (job["id"], "mei")
    assert (line["trace"], line["span"]) == (TRACEPARENT[3:35], TRACEPARENT[36:52])
