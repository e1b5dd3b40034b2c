"""One request on a whole system: one trace with every hop, and log lines that say whom they concern."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from acceptance.collector import Collector, Hop, collecting
from acceptance.evidence import Evidence, Witness
from acceptance.players import request
from acceptance.settling import happened, settled, watching
from acceptance.system import API, System, running
from waiting import wait_until

SECRET = "s3cret-of-the-operator"
PROMPT = "a jade hairpin nobody must read in a log"
TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BEARER = {"Authorization": f"Bearer {SECRET}"}

HOPS = {
    "forge.append": "POST /api/v1/comfyui/jobs",
    "forge.order": "POST /api/v1/comfyui/jobs",
    "forge.job.run": "forge.order",
    "forge.comfyui.submit": "forge.job.run",
    "forge.comfyui.wait": "forge.job.run",
    "forge.comfyui.fetch": "forge.job.run",
    "forge.picture.develop": "forge.job.run",
    "forge.picture.keep": "forge.job.run",
    "forge.job.conclude": "forge.job.run",
}
"""Every hop of a request that is drawn, and in which it lies; events are appended and projected in more."""


@pytest.fixture(scope="module")
async def collector() -> AsyncIterator[Collector]:
    async with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
async def system(module_root: Path, collector: Collector) -> AsyncIterator[System]:
    more = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "x-token=of-the-collector",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
        "FORGE_API_KEYS": f"operator:boss:{SECRET}",
        "FORGE_LOG_LEVEL": "DEBUG",
    }
    async with running(module_root, **more) as system:
        yield system


@pytest.fixture(scope="module")
async def client(system: System) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=system.url("api") + API, headers=BEARER, timeout=10.0) as client:
        yield client


@pytest.fixture(scope="module")
async def witness(system: System) -> AsyncIterator[Witness]:
    async with watching(system) as witness:
        yield witness


@pytest.fixture(scope="module")
async def evidence(client: httpx.AsyncClient, witness: Witness) -> Evidence:
    """After one request of a client that traces, and names its request."""
    asked = request("mei", params={"prompt": PROMPT, "width": 256, "height": 256})
    headers = {"X-Request-Id": "order-66", "traceparent": f"00-{TRACE}-{CLIENT}-01", "X-Forge-User": "mei"}
    answer = await client.post("/jobs", json=asked.body, headers=headers)
    assert answer.status_code == 202, answer.text
    assert answer.headers["x-request-id"] == "order-66"
    asked.answers.append(answer.json()["id"])
    await happened(witness, "completed", job=asked.answers[0])
    return await settled(witness, [asked])


async def test_one_request_is_one_trace_with_every_hop(collector: Collector, evidence: Evidence) -> None:
    def told() -> bool:
        found = [hop.name for hop in collector.of(TRACE)]
        return set(HOPS) <= set(found) and found.count("forge.project") == len(evidence.events)

    await wait_until(told, what=f"every hop is collected: {[h.name for h in collector.hops]}")
    hops = {hop.id: hop for hop in collector.of(TRACE)}
    root = next(hop for hop in hops.values() if hop.parent not in hops)
    assert (root.name, root.parent) == ("POST /api/v1/comfyui/jobs", CLIENT)
    assert root.attributes["http.response.status_code"] == 202

    lies_in = {(hop.name, hops[hop.parent].name) for hop in hops.values() if hop is not root}
    assert set(HOPS.items()) <= lies_in, lies_in
    assert ("forge.append", "forge.job.conclude") in lies_in
    assert {parent for name, parent in lies_in if name == "forge.project"} == {
        "POST /api/v1/comfyui/jobs",
        "forge.job.run",
        "forge.job.conclude",
    }
    assert {hop.service for hop in hops.values()} == {"forge-api", "forge-worker"}
    for hop in hops.values():
        assert hop.ended >= hop.began >= root.began, hop
        assert not hop.error, hop


async def test_events_and_what_other_services_read_are_part_of_it(
    collector: Collector, evidence: Evidence
) -> None:
    concluding = await _hop(collector, "forge.job.conclude")
    (ready,) = evidence.public
    assert ready.headers["traceparent"] == f"00-{TRACE}-{concluding.id}-01"
    assert {event.headers["traceparent"][:35] for event in evidence.events} == {f"00-{TRACE}"}
    assert {event.headers["ce-correlationid"] for event in evidence.events} == {"order-66"}


async def test_the_collector_is_asked_as_the_environment_says(
    collector: Collector, evidence: Evidence
) -> None:
    assert {headers.get("x-token") for headers in collector.headers} == {"of-the-collector"}
    assert {headers.get("Content-Encoding") for headers in collector.headers} == {"gzip"}


async def _hop(collector: Collector, name: str) -> Hop:
    def find() -> list[Hop]:
        return [hop for hop in collector.of(TRACE) if hop.name == name]

    return (await wait_until(find, what=name))[0]


def _lines(system: System) -> Iterator[dict[str, Any]]:
    for log in (system.root / "log").glob("*.log"):
        if log.stem not in ("nats", "postgres", "sim"):
            for line in log.read_text().splitlines():
                yield json.loads(line)
