"""Log lines, numbers as OTLP has them, what ``OTEL_*`` switches on, and a collector that does not answer."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import textwrap
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from forge.telemetry import about
from forge.telemetry.export import data
from forge.telemetry.lines import JsonLines
from forge.telemetry.otlp import misset, resource, wanted

TOKEN = "s3cret"


def line_of(text: str, error: Exception | None = None, **extra: object) -> dict[str, Any]:
    record = logging.LogRecord("forge", logging.ERROR, "", 1, text, None, None)
    record.__dict__.update(extra)
    if error is not None:
        record.exc_info = (type(error), error, None)
    line: dict[str, Any] = json.loads(JsonLines("worker").format(record))
    return line


@pytest.mark.parametrize(
    "address",
    [f"nats://forge:{TOKEN}@nats:4222", f"nats://{TOKEN}@nats", f"postgresql://f:{TOKEN}%40@db/forge"],
)
def test_an_address_is_told_without_who_may_go_there(address: str) -> None:
    line = line_of(f"NATS at {address} does not answer", ValueError(f"bad: '{address}'\n"), where=[address])
    assert TOKEN not in json.dumps(line)
    assert "://…@" in line["event"]
    plain = line_of("see http://docs/@page and mei@example.org")
    assert plain["event"] == "see http://docs/@page and mei@example.org"


async def test_what_a_task_is_about_stands_in_its_lines_and_no_others() -> None:
    async def run(job: str) -> dict[str, Any]:
        about(job=job, correlation=f"of-{job}")
        await asyncio.sleep(0)
        return line_of("drawn", code=f"code-{job}")

    for job, line in zip("ab", await asyncio.gather(run("a"), run("b")), strict=True):
        assert (line["job"], line["correlation"], line["code"]) == (job, f"of-{job}", f"code-{job}")
    assert "job" not in line_of("drawn")


def test_what_is_tried_again_and_again_is_told_once_a_minute_for_each_reason() -> None:
    body = """
        import logging
        from forge.telemetry import lines, start
        start("test")
        loop = logging.getLogger("forge.loop")
        for nth in range(3):
            loop.warning("following %s is interrupted: %s", "S", f"no answer on follow-{nth:032x}")
            loop.warning("copying is interrupted", extra={"reason": "no answer"})
            loop.warning("an attempt failed")
            loop.warning("pulling failed", extra={"consumer": "cleanup", "error": "gone"})
        loop.warning("copying is interrupted", extra={"reason": "refused"})
        lines.time.monotonic = lambda now=lines.time.monotonic: now() + 61
        loop.warning("copying is interrupted", extra={"reason": "no answer"})
    """
    told = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, check=True, timeout=100
    )
    written = [json.loads(line) for line in told.stderr.splitlines()]
    assert [line["event"].split()[0] + line.get("reason", "") for line in written] == [
        *("following", "copyingno answer", "an", "pulling", "an", "an"),
        *("copyingrefused", "copyingno answer"),
    ]


AT = "http://collector:4318"


def test_counters_gauges_and_histograms_keep_their_values() -> None:
    registry = CollectorRegistry()
    Gauge("disk", "Bytes.", registry=registry).set(2.5)
    jobs = Counter("jobs", "Jobs.", ("type",), registry=registry)
    seconds = Histogram("seconds", "Seconds.", ("type",), buckets=(1, 10), registry=registry)
    for type_, took in (("icon", 0.5), ("bust", 5), ("bust", 50), ("bust", 0.25)):
        jobs.labels(type_).inc()
        seconds.labels(type_).observe(took)
    request = encode_metrics(data(registry.collect(), Resource({"service.name": "forge"}), 7))
    metrics = {m.name: m for m in request.resource_metrics[0].scope_metrics[0].metrics}
    assert list(metrics) == ["disk", "jobs_total", "seconds"]
    (disk,) = metrics["disk"].gauge.data_points
    assert disk.as_double == 2.5
    total = metrics["jobs_total"].sum
    assert (total.is_monotonic, total.aggregation_temporality) == (True, 2)
    assert {(p.attributes[0].value.string_value, p.as_double) for p in total.data_points} == {
        ("icon", 1),
        ("bust", 3),
    }
    icon, bust = metrics["seconds"].histogram.data_points
    assert icon.attributes[0].value.string_value == "icon"
    assert (list(bust.bucket_counts), list(bust.explicit_bounds)) == ([1, 1, 1], [1, 10])
    assert (bust.count, bust.sum, bust.start_time_unix_nano) == (3, 55.25, 7)
    assert not bust.HasField("min")


@pytest.mark.parametrize(
    ("environ", "exported"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": AT}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": AT}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": AT}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": AT, "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": AT, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": AT, "OTEL_METRICS_EXPORTER": "none"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": AT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
    ],
)
def test_traces_go_where_the_environment_says(environ: dict[str, str], exported: bool) -> None:
    assert wanted("TRACES", environ) is exported


def test_another_protocol_and_what_is_no_address_are_refused_with_a_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    address = "OTEL_EXPORTER_OTLP_ENDPOINT=collector:4318: not an http:// or https:// address"
    protocol = "OTEL_EXPORTER_OTLP_PROTOCOL=grpc: forge speaks http/protobuf (port 4318) only"
    assert misset(environ) == [address, protocol]
    for given, why in (({}, address), ({"OTEL_EXPORTER_OTLP_ENDPOINT": AT}, protocol)):
        caplog.clear()
        assert not wanted("TRACES", environ | given)
        assert caplog.messages == [f"nothing is exported: {why}"]
    assert misset({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}) == [], "nobody asked"


def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resource("api").attributes["service.name"] == "forge-api"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine,deployment.environment=test")
    assert resource("api").attributes["service.name"] == "mine"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    named = resource("api").attributes
    assert (named["service.name"], named["deployment.environment"]) == ("ours", "test")


def test_a_collector_that_never_answers_holds_up_nobodys_end() -> None:
    """An hour it would take, as the exporter is told here."""
    body = "from forge.telemetry import span, start; start('test')\nwith span('work'): print('done')"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "3600",
        }
        ended = subprocess.run(
            [sys.executable, "-c", body], env=environ, capture_output=True, text=True, timeout=100
        )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
