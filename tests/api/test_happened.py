"""What the log says has happened, counted for Prometheus."""

from __future__ import annotations

import httpx

import factories as f
from api.making import failed
from api.serving import Served
from api.test_operations import submit
from forge.api.happened import Happened
from forge.events.catalogue import Event
from forge.events.envelope import Recorded
from waiting import wait_until


def value(happened: Happened, name: str, **labels: str) -> float | None:
    return happened.registry.get_sample_value(name, labels)


def log(*events: Event) -> list[Recorded]:
    there = f.Log()
    return [there.add(event) for event in events]


def test_a_job_is_counted_from_its_admission_to_its_end() -> None:
    happened = Happened()
    happened.count(log(f.submitted(), f.started(), f.adopted(), f.attempt_failed(), f.started(attempt=2)))
    assert value(happened, "forge_jobs_admitted_total", job_type="npc_bust") == 1
    assert value(happened, "forge_attempts_total", fact="started") == 2
    assert value(happened, "forge_attempts_total", fact="adopted") == 1
    assert value(happened, "forge_attempts_total", fact="failed") == 1
    happened.count(log(f.completed(waited_ms=1500, run_ms=30_000)))
    assert value(happened, "forge_jobs_ended_total", job_type="npc_bust", outcome="completed") == 1
    assert value(happened, "forge_job_wait_seconds_sum", job_type="npc_bust") == 1.5
    assert value(happened, "forge_job_run_seconds_sum", job_type="npc_bust") == 30


def test_what_was_lent_again_took_no_time_at_comfyui() -> None:
    happened = Happened()
    happened.count(log(f.completed(cached=True)))
    assert value(happened, "forge_jobs_ended_total", job_type="npc_bust", outcome="cached") == 1
    assert value(happened, "forge_job_run_seconds_count", job_type="npc_bust") is None


def test_rates_that_are_watched_begin_at_nothing() -> None:
    happened = Happened()
    assert value(happened, "forge_asset_faults_total", fact="lost") == 0
    assert value(happened, "forge_cleanups_total", fact="held") == 0
    happened.count(log(f.lost()))
    assert value(happened, "forge_asset_faults_total", fact="lost") == 1


async def test_an_api_counts_what_happens_while_it_serves(served: Served, mei: httpx.AsyncClient) -> None:
    await failed(served.parts, "mei", await submit(mei))

    async def told() -> bool:
        async with httpx.AsyncClient(base_url=served.base_url) as plain:
            text = (await plain.get("/metrics")).text
        return (
            'forge_jobs_ended_total{job_type="ui_icon",outcome="failed"} 1.0' in text
            and "forge_backend_healthy" in text
        )

    await wait_until(told, what="the failure is counted")
