"""One request on a whole system: one trace with every hop, and log lines that say whom they concern."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from acceptance.collector import Collector, Hop, collecting, plain_labels
from acceptance.evidence import Evidence, Witness
from acceptance.players import request
from acceptance.settling import happened, settled
from acceptance.system import API, PATIENCE, System, running
from waiting import wait_until

SECRET = "s3cret-of-the-operator"
PROMPT = "a jade hairpin nobody must read in a log"
TRACE, OTHER = "0af7651916cd43dd8448eb211c80319c", "1bf7651916cd43dd8448eb211c80319d"
OPENING = "4ef7651916cd43dd8448eb211c8031a0"
UNSAMPLED, LAST = "2cf7651916cd43dd8448eb211c80319e", "3df7651916cd43dd8448eb211c80319f"
CLIENT = "b7ad6b7169203331"
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
    "forge.picture.thumbnails": "forge.job.run",
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
        "OTEL_EXPORTER_OTLP_TIMEOUT": "3",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
        "FORGE_API_KEYS": f"operator:boss:{SECRET}",
        "FORGE_LOG_LEVEL": "DEBUG",
        "FORGE_WORKER_PORT": "0",
    }
    async with running(module_root, **more) as system:
        yield system


@pytest.fixture(scope="module")
async def client(system: System) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=system.url("api") + API, headers=BEARER, timeout=PATIENCE
    ) as client:
        yield client


@pytest.fixture(scope="module")
async def evidence(system: System, client: httpx.AsyncClient, witness: Witness) -> Evidence:
    """After one request of a client that traces, and names its request, while somebody listens."""
    wide = {"prompt": PROMPT, "width": 640, "height": 640}  # enough for thumbnails
    asked = request("mei", params=wide)
    headers = {"X-Request-Id": "order-66", "traceparent": f"00-{TRACE}-{CLIENT}-01", "X-Forge-User": "mei"}
    async with _listening(system, OPENING):
        answer = await client.post("/jobs", json=asked.body, headers=headers)
        assert answer.status_code == 202, answer.text
        assert answer.headers["x-request-id"] == "order-66"
        asked.answers.append(answer.json()["id"])
        await happened(witness, "completed", job=asked.answers[0])
        return await settled(witness, [asked])


async def test_one_request_is_one_trace_with_every_hop(collector: Collector, evidence: Evidence) -> None:
    def told() -> bool:
        found = [hop.name for hop in collector.of(TRACE)]
        count = len(evidence.events)
        return set(HOPS) <= set(found) and found.count("forge.project") == found.count("forge.tell") == count

    await wait_until(told, 60, f"every hop is collected: {[h.name for h in collector.hops]}")
    hops = {hop.id: hop for hop in collector.of(TRACE)}
    root = next(hop for hop in hops.values() if hop.parent not in hops)
    assert (root.name, root.parent) == ("POST /api/v1/comfyui/jobs", CLIENT)
    assert root.attributes["http.response.status_code"] == 202

    lies_in = {(hop.name, hops[hop.parent].name) for hop in hops.values() if hop is not root}
    assert set(HOPS.items()) <= lies_in, lies_in
    assert ("forge.append", "forge.job.conclude") in lies_in
    for reader in ("forge.project", "forge.tell"):
        assert {parent for name, parent in lies_in if name == reader} == {
            "POST /api/v1/comfyui/jobs",
            "forge.job.run",
            "forge.job.conclude",
        }
    assert {hop.service for hop in hops.values()} == {"forge-api", "forge-worker"}
    for hop in hops.values():
        assert hop.ended >= hop.began >= root.began, hop
        assert not hop.error, hop


async def test_a_socket_that_is_opened_is_a_hop_and_one_that_is_turned_away_says_why(
    system: System, collector: Collector, evidence: Evidence
) -> None:
    async with _listening(system, OPENING, "nobody's") as socket:
        with pytest.raises(ConnectionClosed, match="4401"):
            await socket.recv()
    await wait_until(lambda: len(collector.of(OPENING)) == 2, 60, "both are collected")
    opened, refused = collector.of(OPENING)
    assert {(hop.name, hop.parent) for hop in (opened, refused)} == {("GET /api/v1/comfyui/events", CLIENT)}
    assert (opened.error, refused.error, refused.attributes["error.type"]) == (False, True, "4401")


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


async def test_numbers_go_to_the_collector_too(
    system: System, collector: Collector, evidence: Evidence
) -> None:
    def told() -> bool:
        ended = collector.numbers.get("forge-api", {}).get("forge_jobs_ended_total")
        return ended is not None and ended.sum.data_points[0].as_double == 1

    await wait_until(told, 60, "the job that ended is exported")

    async def all_of_them() -> bool:
        async with httpx.AsyncClient(base_url=system.url("api")) as plain:
            shown = _series((await plain.get("/metrics")).text)
        names = {f"{f.name}_total" if f.type == "counter" else f.name for f in shown if f.samples}
        return {name for name in names if not name.endswith("_created")} <= set(
            collector.numbers["forge-api"]
        )

    await wait_until(
        all_of_them, 60, "what /metrics shows is exported, too"
    )  # some only while a worker is heard
    numbers = collector.numbers["forge-api"]
    (ended,) = numbers["forge_jobs_ended_total"].sum.data_points
    assert plain_labels(ended) == {"job_type": "ui_icon", "outcome": "completed"}
    (took,) = numbers["forge_job_run_seconds"].histogram.data_points
    assert (took.count, sum(took.bucket_counts), len(took.bucket_counts)) == (
        1,
        1,
        len(took.explicit_bounds) + 1,
    )

    def parts() -> set[str]:
        found = collector.numbers.get("forge-worker", {}).get("forge_part_seconds")
        return {plain_labels(p)["part"] for p in found.histogram.data_points if p.count} if found else set()

    await wait_until(lambda: parts() & {"forge.comfyui.wait", "forge.append"}, 60, "a worker exports")


async def test_a_worker_with_a_port_says_how_it_is(system: System, evidence: Evidence) -> None:
    wanted = {
        "projector": "forge_projector_position",
        "dispatcher": "forge_places",
        "generation": "forge_orders_in_hand",
        "housekeeping": "forge_build_info",
    }
    for name, number in wanted.items():
        (working,) = [line for line in _lines(system, name) if line["event"] == "working"]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{working['port']}") as plain:
            assert (await plain.get("/livez")).text == "ok\n"
            ready = await plain.get("/readyz")
            assert (ready.status_code, ready.json()["ready"]) == (200, True), ready.text
            shown = {family.name: family for family in _series((await plain.get("/metrics")).text)}
        assert "process_resident_memory_bytes" in shown
        assert shown[number].samples, name
        if name == "dispatcher":
            assert shown["forge_places"].samples[0].value == 3
            assert shown["forge_orders"].samples[0].value == 1


async def test_a_job_is_found_by_what_its_client_was_told(
    system: System, client: httpx.AsyncClient, witness: Witness, evidence: Evidence
) -> None:
    """Whatever became of it, at a worker long after the request too."""
    await system.faults(fail_next=1)
    body = {"job_type": "ui_icon", "params": {"prompt": PROMPT, "width": 256, "height": 256}}
    headers = {"traceparent": f"00-{OTHER}-{CLIENT}-01"}
    answer = await client.post("/jobs", json=body, headers=headers)
    job, told = answer.json()["id"], answer.headers["x-request-id"]
    await happened(witness, "completed", job=job)

    def written() -> list[dict[str, Any]]:
        lines = [line for line in _lines(system) if line.get("correlation") == told]
        return lines if any(line["event"] == "completed" for line in lines) else []

    lines = await wait_until(written, 60, "the worker has written its last line, which comes after the event")
    assert {line["job"] for line in lines} == {job}
    assert {line["trace"] for line in lines} == {OTHER}
    accepted, failed, completed = sorted(lines, key=lambda line: line["at"])
    assert (accepted["event"], accepted["role"]) == ("accepted", "api")
    assert (failed["event"], failed["attempt"], failed["code"]) == ("an attempt failed", "1", "prompt_failed")
    assert (completed["event"], completed["attempt"], completed["role"]) == ("completed", "2", "worker")


async def test_a_client_that_does_not_sample_is_heeded(
    collector: Collector, client: httpx.AsyncClient, witness: Witness, evidence: Evidence
) -> None:
    unsampled, sampled = f"00-{UNSAMPLED}-{CLIENT}-00", f"00-{LAST}-{CLIENT}-01"
    asked = request("lan")
    answer = await client.post("/jobs", json=asked.body, headers={"traceparent": unsampled})
    await happened(witness, "completed", job=answer.json()["id"])
    await client.get("/queue", headers={"traceparent": sampled})
    await wait_until(lambda: collector.of(LAST), 60, "what came later is collected")
    assert collector.of(UNSAMPLED) == []
    mine = [e for e in await witness.events() if e.data.get("job_id") == answer.json()["id"]]
    kept = {event.headers["traceparent"][3:35] + event.headers["traceparent"][-3:] for event in mine}
    assert kept == {f"{UNSAMPLED}-00"}, "the trace is handed on all the same"


async def test_no_line_and_no_span_holds_a_secret_or_a_prompt(
    system: System, collector: Collector, client: httpx.AsyncClient, evidence: Evidence
) -> None:
    guessed = {"Authorization": "Bearer forge_guess_" + SECRET[::-1]}
    assert (await client.get("/queue", headers=guessed)).status_code == 401
    assert (
        await client.post("/jobs", json={"job_type": PROMPT, "params": {"prompt": PROMPT}})
    ).status_code == 422
    written = [log.read_text() for log in (system.root / "log").glob("*.log") if log.stem != "sim"]
    for secret in (SECRET, SECRET[::-1], PROMPT, "of-the-collector"):
        assert not [text for text in written if secret in text]
        assert not [text for text in collector.text if secret.encode() in text]


async def test_work_goes_on_without_the_collector(
    collector: Collector, client: httpx.AsyncClient, witness: Witness, system: System, evidence: Evidence
) -> None:
    await collector.stop()
    asked = request("lan")
    asked.answers.append((await client.post("/jobs", json=asked.body)).json()["id"])
    await happened(witness, "completed", job=asked.answers[0])

    def complaints() -> list[dict[str, Any]]:
        return [line for line in _lines(system, "api") if line["logger"].startswith("opentelemetry")]

    (said,) = await wait_until(complaints, 60, "it is said")
    assert said["level"] == "error"
    assert system.deaths == []


@asynccontextmanager
async def _listening(system: System, trace: str, secret: str = SECRET) -> AsyncIterator[ClientConnection]:
    """A socket of somebody who traces, from its welcome on."""
    headers = {"Authorization": f"Bearer {secret}", "traceparent": f"00-{trace}-{CLIENT}-01"}
    address = system.url("api").replace("http", "ws", 1) + f"{API}/events"
    async with connect(address, additional_headers=headers) as socket:
        await socket.recv()
        yield socket


async def _hop(collector: Collector, name: str) -> Hop:
    def find() -> list[Hop]:
        return [hop for hop in collector.of(TRACE) if hop.name == name]

    return (await wait_until(find, 60, name))[0]


def _series(text: str) -> list[Metric]:
    return list(text_string_to_metric_families(text))


def _lines(system: System, name: str = "*") -> Iterator[dict[str, Any]]:
    for log in (system.root / "log").glob(f"{name}.log"):
        if log.stem not in ("nats", "postgres", "sim"):
            for line in log.read_text().splitlines():
                yield json.loads(line)
