"""An asset is asked for again from its record, and every asset's history outlives it."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest

from api.making import completed, failed, picture
from api.serving import Serve, Served
from forge.events.assets import AssetExpired, AssetLost
from forge.events.jobs import JobSubmitted
from forge.settings import Settings

ICON = {"job_type": "ui_icon", "params": {"seed": 7}, "session_id": "s-1", "character_id": "c-1"}


async def drawn(served: Served, client: httpx.AsyncClient, user: str = "mei", **more: Any) -> dict[str, Any]:
    """An asset that was really drawn for a user."""
    job = (await client.post("/jobs", json=ICON | more)).json()
    loaded = await completed(served.parts, user, job)
    served.parts.live.wrote(loaded.seq)
    [asset] = (await client.get("/assets", params={"min_seq": loaded.seq})).json()["items"]
    return asset  # type: ignore[no-any-return]


async def gone(served: Served, client: httpx.AsyncClient, asset: dict[str, Any]) -> None:
    """Given up by its owner, row and file."""
    answer = await client.delete(f"/assets/{asset['id']}")
    assert answer.status_code == 204
    served.parts.blobs.path(asset["content_hash"], "png").unlink()
    await client.get("/queue", params={"min_seq": answer.headers["x-forge-seq"]})


async def test_what_is_gone_is_asked_for_again_as_it_was(served: Served, mei: httpx.AsyncClient) -> None:
    asset = await drawn(served, mei, ttl_seconds=600, priority=3)
    before = (await mei.get(f"/jobs/{asset['job_id']}")).json()
    await gone(served, mei, asset)
    assert (await mei.get(f"/assets/{asset['id']}")).status_code == 404
    answer = await mei.post(f"/assets/{asset['id']}/regenerate")
    job = answer.json()
    assert (answer.status_code, job["status"], job["cached"]) == (202, "pending", False), answer.text
    assert answer.headers["location"] == f"/api/v1/comfyui/jobs/{job['id']}"
    assert job["regenerates"] == {"asset_id": asset["id"], "result": None, "reason": None}
    for name in ("job_type", "params", "priority", "user_id", "session_id", "character_id"):
        assert job[name] == before[name], name
    assert (await mei.get(f"/jobs/{job['id']}", params={"min_seq": job["seq"]})).json() == job
    asked = await served.parts.store.at(job["seq"])
    assert asked is not None
    assert isinstance(asked.event, JobSubmitted)
    assert asked.event.ttl_seconds == 600


async def test_a_live_one_is_answered_from_the_shelf(served: Served, mei: httpx.AsyncClient) -> None:
    asset = await drawn(served, mei)
    job = (await mei.post(f"/assets/{asset['id']}/regenerate")).json()
    assert (job["status"], job["cached"]) == ("completed", True)
    assert job["regenerates"]["result"] == "identical"
    assert (await mei.get(f"/jobs/{job['id']}", params={"min_seq": job["seq"]})).json() == job


async def test_the_shelf_answers_with_that_very_picture_only(served: Served, mei: httpx.AsyncClient) -> None:
    """Its recipe drew another one since, which is there: that would not even try."""
    asset = await drawn(served, mei)
    await gone(served, mei, asset)
    again = (await mei.post(f"/assets/{asset['id']}/regenerate")).json()
    done = await completed(served.parts, "mei", again, color="#ff0000")
    view = (await mei.get(f"/jobs/{again['id']}", params={"min_seq": done.seq})).json()
    assert (view["status"], view["regenerates"]["result"]) == ("completed", "other_pixels")
    third = (await mei.post(f"/assets/{asset['id']}/regenerate")).json()
    assert (third["status"], third["cached"]) == ("pending", False)


async def test_a_failure_says_that_it_cannot_be(served: Served, mei: httpx.AsyncClient) -> None:
    asset = await drawn(served, mei)
    await gone(served, mei, asset)
    job = (await mei.post(f"/assets/{asset['id']}/regenerate")).json()
    loaded = await failed(served.parts, "mei", job)
    view = (await mei.get(f"/jobs/{job['id']}", params={"min_seq": loaded.seq})).json()
    assert view["regenerates"]["result"] == "cannot"
    assert "out of memory" in view["regenerates"]["reason"]
    history = (await mei.get(f"/assets/{asset['id']}/history")).json()["items"]
    assert [item["type"] for item in history] == [
        "asset.stored",
        "asset.ready",
        "asset.deleted",
        "session.released",
        "job.submitted",
        "job.failed",
    ]
    assert history[4]["data"]["regenerates"]["asset_id"] == asset["id"]


async def test_a_key_stands_for_one_regeneration_for_ever(served: Served, mei: httpx.AsyncClient) -> None:
    asset = await drawn(served, mei)
    await gone(served, mei, asset)
    key = {"Idempotency-Key": "again"}
    first = await mei.post(f"/assets/{asset['id']}/regenerate", headers=key)
    served.parts.workflows["ui_icon"] = msgspec.structs.replace(
        served.parts.workflows["ui_icon"], version="another"
    )
    second = await mei.post(f"/assets/{asset['id']}/regenerate", headers=key)
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] == second.json()["id"]
    other = await mei.post("/jobs", json=ICON, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize("change", ["type", "version", "params"])
async def test_what_cannot_be_is_said_at_once(served: Served, mei: httpx.AsyncClient, change: str) -> None:
    asset = await drawn(served, mei)
    workflows = served.parts.workflows
    icon = workflows["ui_icon"]
    if change == "type":
        del workflows["ui_icon"]
    elif change == "version":
        workflows["ui_icon"] = msgspec.structs.replace(icon, version="another")
    else:
        without = {name: param for name, param in icon.params.items() if name != "seed"}
        workflows["ui_icon"] = msgspec.structs.replace(icon, params=without)
    head = await served.parts.store.head()
    answer = await mei.post(f"/assets/{asset['id']}/regenerate")
    assert (answer.status_code, answer.json()["code"]) == (409, "cannot_regenerate"), answer.text
    words = {"type": "no job type", "version": "has changed", "params": "params"}
    assert words[change] in answer.json()["detail"]
    assert await served.parts.store.head() == head


async def test_limits_count_as_for_any_job(serve: Serve, settings: Settings) -> None:
    served = await serve(with_settings=msgspec.structs.replace(settings, rate_per_hour=2))
    async with served.client("mei") as mei:
        asset = await drawn(served, mei)
        await gone(served, mei, asset)
        assert (await mei.post(f"/assets/{asset['id']}/regenerate")).status_code == 202
        answer = await mei.post(f"/assets/{asset['id']}/regenerate")
        assert (answer.status_code, answer.json()["limit"]["name"]) == (429, "generations_per_hour")


async def test_an_operator_gives_it_back_to_its_owner(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    asset = await drawn(served, mei)
    await gone(served, mei, asset)
    for id_ in (asset["id"], str(uuid4())):
        answer = await lan.post(f"/assets/{id_}/regenerate")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
        assert (await lan.get(f"/assets/{id_}/history")).status_code == 404
    job = (await operator.post(f"/assets/{asset['id']}/regenerate")).json()
    assert job["user_id"] == "mei"


# -------------------------------------------------------------------- history


async def test_a_history_tells_of_pins_faults_fetches_and_the_end(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    asset = await drawn(served, mei)
    path = f"/assets/{asset['id']}"
    for method in ("PUT", "DELETE", "PUT", "DELETE"):
        assert (await mei.request(method, f"{path}/pin")).status_code == 204
    assert (await mei.get(f"{path}/file")).status_code == 200
    await served.parts.reads.flush()
    lost = AssetLost(
        asset_id=asset["id"],
        asset_type="ui_icon",
        content_hash=asset["content_hash"],
        format="png",
        file_size_bytes=asset["file_size_bytes"],
        found="there is no file",
        stored_seq=asset["seq"],
    )
    await served.parts.retention.report(lost, actor="scheduler")
    over = AssetExpired(
        asset_id=asset["id"],
        asset_type="ui_icon",
        job_id=asset["job_id"],
        user_id="mei",
        content_hash=asset["content_hash"],
        format="png",
        reason="expired",
        file_size_bytes=asset["file_size_bytes"],
        session_id="s-1",
        character_id="c-1",
    )
    seq = await served.parts.library.give_up(over, actor="scheduler")
    await mei.get("/queue", params={"min_seq": seq})
    assert (await mei.get(path)).status_code == 404
    wanted = ["asset.stored", "asset.ready", "asset.pinned", "asset.unpinned", "asset.pinned"]
    wanted += ["asset.unpinned", "asset.lost", "asset.expired", "session.released"]
    for client in (mei, operator):
        items = (await client.get(f"{path}/history")).json()["items"]
        assert [item["type"] for item in items] == wanted
        assert [item["seq"] for item in items] == sorted(item["seq"] for item in items)
        assert [items[n]["actor"] for n in (0, 2, 6)] == ["worker", "operator:dev", "scheduler"]
    items = (await mei.get(f"{path}/history", params={"accesses": "true"})).json()["items"]
    [fetched] = [item for item in items if item["type"] == "asset.accessed"]
    [read] = fetched["data"]["reads"]
    assert (read["user_id"], read["count"], read["asset_id"]) == ("mei", 1, asset["id"])
    assert (await lan.get(f"{path}/history")).status_code == 404


async def test_a_history_tells_nobody_of_what_was_found_before_they_came(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient
) -> None:
    asset = await drawn(served, mei)
    lost = AssetLost(
        asset_id=asset["id"],
        asset_type="ui_icon",
        content_hash=asset["content_hash"],
        format="png",
        file_size_bytes=len(picture("#336699", 600)),
        found="there is no file",
        stored_seq=asset["seq"],
    )
    await served.parts.retention.report(lost, actor="scheduler")
    await drawn(served, lan, "lan", params={"seed": 8})
    theirs = (await lan.get(f"/assets/{asset['id']}/history")).json()["items"]
    assert [item["type"] for item in theirs] == ["asset.stored", "asset.ready"]
