"""Catalogue, statistics, usage, health, metrics; and what is said while a server is away."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest

from api.making import completed, failed
from api.serving import Serve, Served
from forge import admissions
from forge.api import operations
from forge.embedded import EmbeddedNats, EmbeddedPostgres
from forge.events.catalogue import encode
from forge.events.envelope import Meta, headers
from forge.events.system import MetricSampled
from forge.projections import reading
from forge.projections.stats import bucket, percentile
from forge.settings import Settings
from forge.topology import subject
from processes import freeze, thaw
from waiting import wait_until

ICON = {"job_type": "ui_icon", "params": {}}


async def submit(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.post("/jobs", json=ICON)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


async def test_the_catalogue_says_what_can_be_asked_for(mei: httpx.AsyncClient) -> None:
    items = (await mei.get("/catalogue")).json()["items"]
    by_name = {item["job_type"]: item for item in items}
    assert {"character_portrait", "npc_bust", "fate_card", "ui_icon"} <= set(by_name)
    card = by_name["fate_card"]
    assert card["timeout_seconds"] > 0
    assert card["asset_type"] == "fate_card"
    assert card["params"]["additionalProperties"] is False


async def test_statistics_count_what_came_of_jobs(served: Served, mei: httpx.AsyncClient) -> None:
    done = await completed(served.parts, "mei", await submit(mei))
    gone = await failed(served.parts, "mei", await submit(mei))
    cancelled = (await mei.delete(f"/jobs/{(await submit(mei))['id']}")).json()
    waiting = await submit(mei)
    stats = (await mei.get("/stats", params={"min_seq": waiting["seq"]})).json()
    assert max(done.seq, gone.seq, cancelled["seq"]) < waiting["seq"]
    icons = stats["by_type"]["ui_icon"]
    counts = {key: icons[key] for key in ("submitted", "completed", "cached", "failed", "cancelled")}
    assert counts == {"submitted": 4, "completed": 1, "cached": 0, "failed": 1, "cancelled": 1}
    assert icons["p50_ms"] is not None
    assert icons["p95_ms"] >= icons["p50_ms"]
    assert stats["total"] == icons
    assert stats["throughput_per_hour"] > 0
    assert stats["bytes_by_type"]["ui_icon"]["assets"] == 1
    assert stats["bytes_by_type"]["ui_icon"]["bytes"] > 0
    assert stats["cache"] == {"hits": 0, "ratio": 0.0}
    assert (stats["queue"]["pending"], stats["queue"]["running"]) == (1, 0)
    assert stats["queue"]["oldest_seconds"] >= 0


async def test_statistics_of_nothing(mei: httpx.AsyncClient) -> None:
    stats = (await mei.get("/stats")).json()
    assert stats["total"]["p50_ms"] is None
    assert stats["cache"] == {"hits": 0, "ratio": None}
    assert stats["queue"] == {"pending": 0, "running": 0, "oldest_seconds": None}


def test_percentiles_are_read_back_closely() -> None:
    buckets: dict[int, int] = {}
    for milliseconds in range(1, 1001):
        buckets[bucket(milliseconds)] = buckets.get(bucket(milliseconds), 0) + 1
    assert percentile(sorted(buckets.items()), 0.5) == pytest.approx(500, rel=0.04)
    assert percentile(sorted(buckets.items()), 0.95) == pytest.approx(950, rel=0.04)
    assert percentile([], 0.5) is None
    assert percentile([(bucket(7), 1)], 0.95) == pytest.approx(7, rel=0.04)


async def test_usage_is_listed_newest_first_and_paged(served: Served, mei: httpx.AsyncClient) -> None:
    for value in range(5):
        event = MetricSampled(metric_type="disk_usage", value=value, unit="bytes", details={"n": value})
        meta = Meta(id=uuid4(), at=datetime.now(UTC), actor="scheduler", correlation="sample")
        place = subject(event)
        await served.parts.nc.request(place, encode(event), headers=headers(event, meta, place), timeout=10)

    async def page(**params: Any) -> dict[str, Any]:
        found: dict[str, Any] = (await mei.get("/usage", params=params)).json()
        return found

    async def everything() -> bool:
        return len((await page())["items"]) == 5

    await wait_until(everything, what="five samples")
    first = await page(limit=3, metric_type="disk_usage")
    rest = await page(limit=3, metric_type="disk_usage", cursor=first["next_cursor"])
    items = first["items"] + rest["items"]
    assert [item["metric_value"] for item in items] == [4, 3, 2, 1, 0]
    assert set(items[0]) == {"timestamp", "metric_type", "metric_value", "metric_unit", "details"}
    assert rest["next_cursor"] is None
    assert (await page(metric_type="memory_usage"))["items"] == []
    assert len((await page(since=items[2]["timestamp"]))["items"]) == 3
    assert len((await page(until=items[2]["timestamp"]))["items"]) == 2


async def test_metrics_are_for_prometheus_and_do_not_grow_with_ids(
    served: Served, mei: httpx.AsyncClient
) -> None:
    await submit(mei)
    for _ in range(3):
        await mei.get(f"/jobs/{uuid4()}")
    async with httpx.AsyncClient(base_url=served.base_url) as plain:
        await plain.get(f"/{uuid4()}")
        text = (await plain.get("/metrics")).text
    assert "forge_jobs_pending 1.0" in text
    assert "forge_jobs_running 0.0" in text
    root = "/api/v1/comfyui"
    assert f'forge_http_requests_total{{method="POST",path="{root}/jobs",status="202"}} 1.0' in text
    assert f'forge_http_requests_total{{method="GET",path="{root}/jobs/{{job_id}}",status="404"}} 3.0' in text
    assert 'path="unmatched",status="404"' in text
    assert 'forge_http_refusals_total{code="not_found",limit=""} 4.0' in text


# ------------------------------------------------------------------ disk, memory


async def sampled(served: Served, value: int, *, minutes_ago: float, type_: str = "disk_usage") -> None:
    details = {"limit": 1000, "free": 1000 - value, "by_type": {"ui_icon": value, "thumbnails": 5}}
    event = MetricSampled(metric_type=type_, value=value, unit="bytes", details=details)
    at = datetime.now(UTC) - timedelta(minutes=minutes_ago)
    place = subject(event)
    envelope = headers(event, Meta(id=uuid4(), at=at, actor="scheduler", correlation=""), place)
    await served.parts.nc.request(place, encode(event), headers=envelope, timeout=10)


async def usage_of(client: httpx.AsyncClient, count: int, **params: Any) -> dict[str, Any]:
    async def there() -> dict[str, Any] | None:
        answer = await client.get("/usage", params={"limit": 1000} | params)
        assert answer.status_code == 200, answer.text
        page: dict[str, Any] = answer.json()
        return page if len(page["items"]) == count else None

    page = await wait_until(there, what=f"{count} samples")
    assert page is not None
    return page


async def test_statistics_tell_how_the_disk_fills_up(served: Served, mei: httpx.AsyncClient) -> None:
    assert (await mei.get("/stats")).json()["disk"] is None
    for minutes in range(60, -1, -5):  # 5 bytes a minute, up to 600
        await sampled(served, 600 - minutes * 5, minutes_ago=minutes)
    await usage_of(mei, 13)
    disk = (await mei.get("/stats")).json()["disk"]
    assert (disk["used_bytes"], disk["limit_bytes"], disk["free_bytes"]) == (600, 1000, 400)
    assert (disk["level"], disk["bytes_by_type"]) == ("ok", {"ui_icon": 600, "thumbnails": 5})
    assert disk["growth_bytes_per_hour"] == pytest.approx(300, rel=0.1)
    now = datetime.now(UTC)
    assert (datetime.fromisoformat(disk["warn_at"]) - now).total_seconds() == pytest.approx(2400, rel=0.15)
    assert (datetime.fromisoformat(disk["clean_at"]) - now).total_seconds() == pytest.approx(3600, rel=0.15)


async def test_a_disk_that_does_not_grow_reaches_nothing(served: Served, mei: httpx.AsyncClient) -> None:
    for minutes in range(60, -1, -10):
        await sampled(served, 850, minutes_ago=minutes)
    await usage_of(mei, 7)
    disk = (await mei.get("/stats")).json()["disk"]
    assert (disk["level"], disk["growth_bytes_per_hour"], disk["clean_at"]) == ("warn", 0.0, None)
    assert datetime.fromisoformat(disk["warn_at"]) <= datetime.now(UTC), "it is there already"


async def test_usage_is_told_in_steps(served: Served, mei: httpx.AsyncClient) -> None:
    for minutes, value in ((150, 10), (149, 30), (90, 100), (30, 500)):
        await sampled(served, value, minutes_ago=minutes)
    await sampled(served, 7, minutes_ago=30, type_="memory_usage")
    await usage_of(mei, 5)
    day = await usage_of(mei, 1, step=30 * 86400, metric_type="disk_usage")
    assert day["items"][0]["metric_value"] == 160
    assert day["items"][0]["details"] == {"min": 10, "max": 500, "samples": 4}
    whole = (await mei.get("/usage", params={"step": 600})).json()["items"]
    assert [item["metric_type"] for item in whole[:2]] == ["memory_usage", "disk_usage"]
    assert [item["metric_value"] for item in whole if item["details"]["samples"] == 1][:3] == [7, 500, 100]
    pages, cursor = [], None
    while True:
        params = {"step": 600, "limit": 2} | ({"cursor": cursor} if cursor else {})
        page = (await mei.get("/usage", params=params)).json()
        pages += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert pages == whole
    for wrong in ({"step": 0}, {"step": "x"}, {"step": 60, "cursor": "abc"}):
        assert (await mei.get("/usage", params=wrong)).status_code == 422


async def test_a_full_disk_is_said_before_it_costs_anything(serve: Serve, settings: Settings) -> None:
    small = msgspec.structs.replace(settings, disk_limit_bytes=100_000)
    served = await serve(with_settings=small)
    async with served.client("mei") as mei:
        known = await mei.post("/jobs", json=ICON, headers={"Idempotency-Key": "before"})
        lost = await failed(served.parts, "mei", await submit(mei))
        large = served.parts.blobs.root / "assets" / "large"
        large.write_bytes(bytes(99_000))

        async def seen() -> bool:
            return not (await ready(served))[1]["disk"]

        await wait_until(seen, what="the disk is seen to be full")
        answer = await mei.post("/jobs", json=ICON)
        assert (answer.status_code, answer.json()["code"]) == (503, "disk_full")
        assert int(answer.headers["retry-after"]) > 0
        for path, body in (("/batch", {"jobs": [ICON]}), (f"/jobs/{lost.job.id}/retry", None)):
            answer = await mei.post(path, json=body)
            assert (answer.status_code, answer.json()["code"]) == (503, "disk_full"), path
        again = await mei.post("/jobs", json=ICON, headers={"Idempotency-Key": "before"})
        assert again.json()["id"] == known.json()["id"], "what was accepted stays accepted"
        assert (await mei.get("/queue")).status_code == 200
        status, checks = await ready(served)
        assert (status, checks["disk"], checks["store"]) == (503, False, True)
        async with httpx.AsyncClient(base_url=served.base_url) as plain:
            text = (await plain.get("/metrics")).text
        assert "forge_disk_level 3.0" in text
        assert "forge_disk_limit_bytes 100000.0" in text
        large.unlink()
        await wait_until(lambda: _accepted(mei), what="there is room again")


async def test_short_memory_refuses_work_and_answers_readers(serve: Serve, settings: Settings) -> None:
    served = await serve(with_settings=msgspec.structs.replace(settings, memory_limit_bytes=1024**2))
    async with served.client("mei") as mei:
        for path, body in (("/jobs", ICON), ("/batch", {"jobs": [ICON]}), (f"/jobs/{uuid4()}/retry", None)):
            answer = await mei.post(path, json=body)
            assert (answer.status_code, answer.json()["code"]) == (503, "overloaded"), path
            assert int(answer.headers["retry-after"]) > 0
        for path in ("/queue", "/assets", "/stats", "/usage", "/catalogue"):
            assert (await mei.get(path)).status_code == 200, path
        assert (await ready(served))[1]["memory"] is False
        async with httpx.AsyncClient(base_url=served.base_url) as plain:
            assert "forge_memory_short 1.0" in (await plain.get("/metrics")).text


async def test_metrics_tell_bytes_by_type(served: Served, mei: httpx.AsyncClient) -> None:
    await sampled(served, 300, minutes_ago=0)
    await usage_of(mei, 1)
    async with httpx.AsyncClient(base_url=served.base_url) as plain:
        text = (await plain.get("/metrics")).text
    assert 'forge_disk_bytes{type="ui_icon"} 300.0' in text
    assert 'forge_disk_bytes{type="thumbnails"} 5.0' in text
    assert 'forge_memory_used_bytes{bound="process"}' in text
    assert "forge_disk_level 0.0" in text


async def _accepted(client: httpx.AsyncClient) -> bool:
    return (await client.post("/jobs", json=ICON)).status_code == 202


# --------------------------------------------------------------- read own writes


async def test_a_read_waits_for_what_it_must_tell_of(serve: Serve) -> None:
    served = await serve(projecting=False)
    async with served.client("mei") as mei:
        job = await submit(mei)
        reading = asyncio.create_task(mei.get("/queue", params={"min_seq": job["seq"]}))
        late = await serve()
        answer = await reading
        assert answer.status_code == 200
        assert [item["id"] for item in answer.json()["items"]] == [job["id"]]
        assert int(answer.headers["x-forge-seq"]) >= job["seq"]
        assert late.parts.live.checkpoint.seq >= 0


async def test_what_has_not_happened_is_not_waited_for(mei: httpx.AsyncClient) -> None:
    for path in ("/queue", "/assets", "/stats", f"/jobs/{uuid4()}", f"/assets/{uuid4()}"):
        answer = await mei.get(path, params={"min_seq": 10**12})
        assert answer.status_code == 422, path
        assert [error["field"] for error in answer.json()["errors"]] == ["min_seq"], path


async def test_waiting_for_the_tables_is_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.api.checkpoint.WAIT_SECONDS", 0.3)
    late = await serve(projecting=False)
    async with late.client("mei") as mei:
        job = (await mei.post("/jobs", json={"job_type": "ui_icon", "params": {}})).json()
        for path in ("/queue", "/assets", "/stats", f"/jobs/{uuid4()}", f"/assets/{uuid4()}"):
            answer = await mei.get(path, params={"min_seq": job["seq"]})
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable"), path
            assert int(answer.headers["retry-after"]) > 0


# ----------------------------------------------------------------- servers away


async def ready(served: Served) -> tuple[int, dict[str, bool]]:
    async with httpx.AsyncClient(base_url=served.base_url, timeout=30) as plain:
        answer = await plain.get("/readyz")
        return answer.status_code, {name: check["ok"] for name, check in answer.json()["checks"].items()}


async def unready(served: Served, check: str) -> str:
    """Why."""
    async with httpx.AsyncClient(base_url=served.base_url, timeout=30) as plain:
        found = (await plain.get("/readyz")).json()["checks"][check]
        assert not found["ok"]
        return str(found["detail"])


async def test_ready_when_everything_is_there(served: Served) -> None:
    names = ("log", "log_whole", "database", "store", "disk", "memory", "caught_up", "staying")
    assert await ready(served) == (200, dict.fromkeys(names, True))
    async with httpx.AsyncClient(base_url=served.base_url) as plain:
        assert (await plain.get("/livez")).status_code == 200


async def test_an_api_that_starts_in_a_quiet_hour_does_not_take_the_tables_for_behind(
    served: Served, mei: httpx.AsyncClient, serve: Serve
) -> None:
    job = await submit(mei)
    assert (await mei.get(f"/jobs/{job['id']}", params={"min_seq": job["seq"]})).status_code == 200
    started = await serve(projecting=False)
    async with httpx.AsyncClient(base_url=started.base_url) as plain:
        text = (await plain.get("/metrics")).text
    assert f"forge_log_head {job['seq']}.0" in text
    assert "forge_projection_lag 0.0" in text


async def test_one_that_was_told_to_stop_says_so_and_serves_on(
    served: Served, mei: httpx.AsyncClient
) -> None:
    assert "connection" not in (await mei.get("/queue")).headers
    served.gate.leave()
    status, checks = await ready(served)
    assert (status, checks["staying"], checks["log"]) == (503, False, True)
    job = await mei.post("/jobs", json={"job_type": "ui_icon", "params": {}})
    assert (job.status_code, job.headers["connection"]) == (202, "close"), "the next one goes elsewhere"


async def test_not_ready_without_the_asset_volume_and_the_log_tells_when_that_changes(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "forge.api")
    marker = served.parts.blobs.root / ".forge-store"
    marker.rename(elsewhere := marker.with_name("elsewhere"))
    for _ in range(2):
        status, checks = await ready(served)
        assert (status, checks["store"], checks["database"]) == (503, False, True)
    elsewhere.rename(marker)
    for _ in range(2):
        assert (await ready(served))[0] == 200
    told = [record for record in caplog.records if record.name == "forge.api"]
    assert [record.getMessage() for record in told] == ["not ready", "ready again"]
    assert told[0].__dict__["checks"].keys() == {"store"}


async def test_a_frozen_database_costs_readers_a_second_and_submitters_nothing(
    served: Served,
    mei: httpx.AsyncClient,
    postgres_server: EmbeddedPostgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "SECONDS", 0.9)
    monkeypatch.setattr(operations, "_CHECK_SECONDS", 1.0)
    job = await submit(mei)
    assert (await mei.get(f"/jobs/{job['id']}", params={"min_seq": job["seq"]})).status_code == 200
    postgres = postgres_server.process.pid  # type: ignore[union-attr]
    await freeze(postgres)
    try:
        for path in (f"/jobs/{job['id']}", "/queue", "/assets", "/stats"):
            began = time.monotonic()
            answer = await mei.get(path)
            assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable"), path
            assert int(answer.headers["retry-after"]) > 0
            assert time.monotonic() - began < 2.0, f"{path} waits as a reader and not for the pool's own time"
        status, checks = await ready(served)
        assert (status, checks["database"], checks["log"]) == (503, False, True)
        monkeypatch.setattr(reading, "SECONDS", 60.0)  # who asks Postgres in vain is not answered by then
        async with asyncio.timeout(30):
            later = await submit(mei)
            assert (await mei.delete(f"/jobs/{later['id']}")).json()["status"] == "cancelled"
    finally:
        thaw(postgres)

    async def back() -> bool:
        answer = await mei.get(f"/jobs/{later['id']}")
        return answer.status_code == 200 and answer.json()["status"] == "cancelled"

    await wait_until(back, timeout=60, what="reading works again")


async def test_a_log_that_is_away_is_said_within_a_second_and_heals(
    served: Served, mei: httpx.AsyncClient, nats_server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await submit(mei)
    assert (await mei.get(f"/jobs/{job['id']}", params={"min_seq": job["seq"]})).status_code == 200
    monkeypatch.setattr(admissions, "SUBMIT_SECONDS", 0.8)
    monkeypatch.setattr(operations, "_CHECK_SECONDS", 1.0)
    await freeze(nats_server.process.pid)  # type: ignore[union-attr]
    assert "Postgres" not in await unready(served, "log_whole"), "whose fault it is not"
    nats_server.kill()

    async def told() -> bool:
        return await unready(served, "log_whole") == "not looked at: not connected to NATS"

    await wait_until(told, what="the connection is known to be gone")
    began = time.monotonic()
    answer = await mei.post("/jobs", json=ICON, headers={"Idempotency-Key": "again"})
    assert (answer.status_code, answer.json()["code"]) == (503, "log_unavailable")
    assert time.monotonic() - began < 2.0, "it waits as a submitter, and not as a worker would"
    assert (await mei.get(f"/jobs/{job['id']}")).status_code == 200, "reading still works"
    status, checks = await ready(served)
    assert (status, checks["log"], checks["database"]) == (503, False, True)
    nats_server.start()
    monkeypatch.setattr(admissions, "SUBMIT_SECONDS", 10.0)

    async def accepted() -> httpx.Response | None:
        answer = await mei.post("/jobs", json=ICON, headers={"Idempotency-Key": "again"})
        return answer if answer.status_code == 202 else None

    again = await wait_until(accepted, timeout=60, what="submitting works again")
    assert again is not None
    read = await mei.get(f"/jobs/{again.json()['id']}", params={"min_seq": again.json()["seq"]})
    assert read.status_code == 200
    page = (await mei.get("/queue")).json()
    assert page["counts"]["pending"] == 2, "asking again and again with one key was one job"
