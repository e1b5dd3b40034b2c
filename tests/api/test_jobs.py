"""Jobs over HTTP: asking, looking, cancelling, asking again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from nats.aio.client import Client

from api.making import completed, failed, started
from api.serving import Serve, Served
from folding import fold
from forge.api import fresh
from forge.events.envelope import Recorded
from forge.follower import follow
from waiting import wait_until

CARD: dict[str, Any] = {"job_type": "fate_card", "params": {"prompt": "a crane above the clouds"}}

JOB_FIELDS = (
    "id status job_type params priority user_id session_id character_id batch_id attempts max_attempts "
    "position created_at started_at completed_at error cached assets regenerates seq"
)


async def submitted(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    answer = await client.post("/jobs", json=CARD | more)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


async def test_an_accepted_job_has_the_shape_of_the_contract(mei: httpx.AsyncClient) -> None:
    answer = await mei.post("/jobs", json=CARD | {"priority": 3, "session_id": "s1", "character_id": "c1"})
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/api/v1/comfyui/jobs/{job['id']}"
    assert set(job) == set(JOB_FIELDS.split())
    assert (job["status"], job["priority"], job["user_id"]) == ("pending", 3, "mei")
    assert (job["session_id"], job["character_id"], job["position"], job["seq"]) == ("s1", "c1", 1, 1)
    assert UUID(job["id"]).version == 7
    assert datetime.fromisoformat(job["created_at"]).tzinfo is not None
    assert job["params"]["prompt"] == "a crane above the clouds"
    assert isinstance(job["params"]["seed"], int), "what is left out is decided at once"


async def test_the_tables_tell_the_same_of_a_job_as_the_log(mei: httpx.AsyncClient) -> None:
    job = await submitted(mei)
    answer = await mei.get(f"/jobs/{job['id']}", params={"min_seq": job["seq"]})
    assert answer.json() == job
    assert int(answer.headers["x-forge-seq"]) >= job["seq"]


async def test_what_was_just_accepted_is_never_missing(mei: httpx.AsyncClient) -> None:
    for _ in range(10):
        job = await submitted(mei)
        assert (await mei.get(f"/jobs/{job['id']}")).status_code == 200


async def test_the_whole_life_of_a_job_is_shown(served: Served, mei: httpx.AsyncClient) -> None:
    job = await submitted(mei)
    loaded = await started(served.parts, "mei", job)
    running = (await mei.get(f"/jobs/{job['id']}", params={"min_seq": loaded.seq})).json()
    assert (running["status"], running["attempts"], running["position"]) == ("running", 1, None)
    assert running["started_at"] is not None

    other = await submitted(mei)
    loaded = await completed(served.parts, "mei", other)
    done = (await mei.get(f"/jobs/{other['id']}", params={"min_seq": loaded.seq})).json()
    assert (done["status"], done["error"], done["cached"]) == ("completed", None, False)
    assert done["completed_at"] >= done["started_at"] >= done["created_at"]
    [asset] = done["assets"]
    assert set(asset) == {"id", "url", "thumbnail_url", "content_hash"}
    async with httpx.AsyncClient(base_url=served.base_url, headers={"X-Forge-User": "mei"}) as plain:
        assert (await plain.get(asset["url"])).headers["content-type"] == "image/png"
        assert (await plain.get(asset["thumbnail_url"])).headers["content-type"] == "image/webp"


async def test_positions_follow_priority_and_move_up(mei: httpx.AsyncClient) -> None:
    late = await submitted(mei, priority=9)
    urgent = await submitted(mei, priority=1)
    assert urgent["position"] == 1
    assert (await mei.get(f"/jobs/{late['id']}", params={"min_seq": urgent["seq"]})).json()["position"] == 2
    cancelled = (await mei.delete(f"/jobs/{urgent['id']}")).json()
    read = await mei.get(f"/jobs/{late['id']}", params={"min_seq": cancelled["seq"]})
    assert read.json()["position"] == 1


# ------------------------------------------------------------ idempotency keys


async def test_the_same_key_and_body_are_the_same_job_for_ever(
    served: Served, mei: httpx.AsyncClient
) -> None:
    headers = {"Idempotency-Key": "click-1"}
    first = (await mei.post("/jobs", json=CARD, headers=headers)).json()
    turned = {key: CARD[key] for key in reversed(CARD)}
    assert (await mei.post("/jobs", json=turned, headers=headers)).json() == first
    loaded = await completed(served.parts, "mei", first)
    again = await mei.post("/jobs", json=CARD, headers=headers)
    assert again.status_code == 202
    assert again.json()["id"] == first["id"]
    assert again.json() == (await mei.get(f"/jobs/{first['id']}", params={"min_seq": loaded.seq})).json()


async def test_a_key_with_another_body_is_refused(mei: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "click-1"}
    await mei.post("/jobs", json=CARD, headers=headers)
    answer = await mei.post("/jobs", json=CARD | {"priority": 1}, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")


async def test_keys_of_two_users_have_nothing_to_do_with_each_other(
    mei: httpx.AsyncClient, lan: httpx.AsyncClient
) -> None:
    headers = {"Idempotency-Key": "click-1"}
    mine = (await mei.post("/jobs", json=CARD, headers=headers)).json()
    theirs = (await lan.post("/jobs", json=CARD, headers=headers)).json()
    assert mine["id"] != theirs["id"]


async def test_twenty_at_once_with_one_key_are_one_job(mei: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "click-1"}
    answers = await asyncio.gather(*(mei.post("/jobs", json=CARD, headers=headers) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1


# ------------------------------------------------------------ cancel and retry


async def test_a_waiting_job_is_cancelled_once(mei: httpx.AsyncClient) -> None:
    job = await submitted(mei)
    answer = await mei.delete(f"/jobs/{job['id']}")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    seq = answer.json()["seq"]
    again = await mei.delete(f"/jobs/{job['id']}")
    assert (again.status_code, again.json()["code"]) == (409, "job_over")
    assert answer.json() == (await mei.get(f"/jobs/{job['id']}", params={"min_seq": seq})).json()


async def test_a_running_job_is_cancelled(served: Served, mei: httpx.AsyncClient) -> None:
    job = await submitted(mei)
    await started(served.parts, "mei", job)
    answer = await mei.delete(f"/jobs/{job['id']}")
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    assert answer.json()["completed_at"] is not None


async def test_a_job_that_is_over_cannot_be_cancelled(served: Served, mei: httpx.AsyncClient) -> None:
    job = await submitted(mei)
    await completed(served.parts, "mei", job)
    answer = await mei.delete(f"/jobs/{job['id']}")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_over")


async def test_a_failed_job_is_asked_for_again(served: Served, mei: httpx.AsyncClient) -> None:
    job = await submitted(mei)
    loaded = await failed(served.parts, "mei", job)
    read = (await mei.get(f"/jobs/{job['id']}", params={"min_seq": loaded.seq})).json()
    assert read["error"] == {"code": "prompt_failed", "message": "out of memory"}
    answer = await mei.post(f"/jobs/{job['id']}/retry")
    assert (answer.status_code, answer.json()["status"], answer.json()["error"]) == (202, "pending", None)
    assert answer.json()["max_attempts"] == 4
    assert (await mei.get(f"/jobs/{job['id']}")).json()["status"] == "pending", "one reads what one wrote"
    assert (await mei.post(f"/jobs/{job['id']}/retry")).json()["code"] == "job_not_failed"


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_failure_that_an_api_has_not_read_yet_is_waited_for(
    served: Served,
    serve: Serve,
    mei: httpx.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: bool,
) -> None:
    job, live, reads = await submitted(mei), served.parts.live, asyncio.Event()
    take = live._take

    async def late(records: list[Recorded]) -> None:
        await reads.wait()
        await take(records)

    monkeypatch.setattr(live, "_take", late)
    await failed(served.parts, "mei", job)
    asking = asyncio.create_task(mei.post(f"/jobs/{job['id']}/retry"))
    waiters = served.parts.admissions.moved._waiters  # type: ignore[attr-defined]  # typeshed lacks it
    await wait_until(lambda: waiters or asking.done(), 10, "the request waits")
    if elsewhere:
        other = await serve(projecting=False)
        async with other.client("mei") as client:
            assert (await client.post(f"/jobs/{job['id']}/retry")).status_code == 202
    reads.set()
    # who comes second is told so, or gets the very retry that the first one got
    assert (await asking).status_code in ((202, 409) if elsewhere else (202,))
    history = (await mei.get(f"/jobs/{job['id']}/history")).json()["items"]
    assert [event["type"] for event in history].count("job.retried") == 1


@pytest.mark.parametrize("ending", [None, completed])
async def test_only_a_failed_job_can_be_retried(served: Served, mei: httpx.AsyncClient, ending: Any) -> None:
    job = await submitted(mei)
    if ending is not None:
        await ending(served.parts, "mei", job)
    answer = await mei.post(f"/jobs/{job['id']}/retry")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_not_failed")


async def test_the_history_tells_everything_in_order(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient
) -> None:
    job = await submitted(mei)
    await failed(served.parts, "mei", job)
    await submitted(mei)  # another job's events are none of this one's
    await submitted(lan)
    again = await mei.post(f"/jobs/{job['id']}/retry", headers={"X-Request-Id": "again-please"})
    assert again.status_code == 202
    await completed(served.parts, "mei", job)
    items = (await mei.get(f"/jobs/{job['id']}/history")).json()["items"]
    assert [item["type"] for item in items] == [
        "job.submitted",
        "job.started",
        "job.failed",
        "job.retried",
        "job.started",
        "job.completed",
    ]
    assert [item["seq"] for item in items] == sorted(item["seq"] for item in items)
    assert set(items[0]) == {"seq", "type", "at", "actor", "correlation", "data"}
    assert items[0]["actor"] == "operator:dev"
    assert items[3]["correlation"] == "again-please"
    assert items[-1]["data"]["job_id"] == job["id"]


# --------------------------------------------------------------------- batches


async def test_a_batch_is_admitted_read_and_cancelled(served: Served, mei: httpx.AsyncClient) -> None:
    answer = await mei.post("/batch", json={"jobs": [CARD | {"priority": n} for n in (1, 2, 3)]})
    batch = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/api/v1/comfyui/batch/{batch['batch_id']}"
    assert [job["priority"] for job in batch["jobs"]] == [1, 2, 3]
    assert batch["seq"] == max(job["seq"] for job in batch["jobs"])
    assert len({job["params"]["seed"] for job in batch["jobs"]}) == 3

    loaded = await completed(served.parts, "mei", batch["jobs"][0])
    read = await mei.get(f"/batch/{batch['batch_id']}", params={"min_seq": loaded.seq})
    assert read.json()["status"] == "running"
    assert read.json()["counts"] == {"pending": 2, "running": 0, "completed": 1, "failed": 0, "cancelled": 0}

    gone = await mei.delete(f"/batch/{batch['batch_id']}")
    assert gone.status_code == 202
    assert [job["status"] for job in gone.json()["jobs"]] == ["completed", "cancelled", "cancelled"]
    last = await mei.get(f"/batch/{batch['batch_id']}", params={"min_seq": gone.json()["seq"]})
    assert (last.json()["status"], last.json()["counts"]["cancelled"]) == ("cancelled", 2)
    assert last.json()["completed_at"] is not None


@pytest.mark.parametrize(("method", "status"), [("GET", "pending"), ("DELETE", "cancelled")])
async def test_a_batch_is_never_taken_half(
    method: str, status: str, serve: Serve, nats_client: Client
) -> None:
    served = await serve(projecting=False)
    async with served.client("mei") as mei:
        asked = (await mei.post("/batch", json={"jobs": [CARD | {"priority": n} for n in (1, 2, 3)]})).json()
        admitted = [record async for record in _log(nats_client)]
        async with served.parts.pool.acquire() as connection:
            await fold(connection, admitted[:2])
            acting = asyncio.create_task(mei.request(method, f"/batch/{asked['batch_id']}"))
            done, _ = await asyncio.wait((acting,), timeout=0.5)
            assert not done, "it waits for the rest"
            await fold(connection, admitted[2:])
        assert [job["status"] for job in (await acting).json()["jobs"]] == [status] * 3


async def _log(nc: Client) -> AsyncIterator[Recorded]:
    async with aclosing(follow(nc, 1)) as batches:
        async for batch in batches:
            for record in batch.records:
                yield record
            if batch.caught_up:
                return


async def test_one_bad_job_refuses_the_whole_batch(
    operator: httpx.AsyncClient, mei: httpx.AsyncClient
) -> None:
    bad = {"job_type": "fate_card", "params": {"steps": 0, "colour": 1}}
    answer = await mei.post("/batch", json={"jobs": [CARD, bad, {"job_type": "poem", "params": {}}]})
    assert answer.status_code == 422
    fields = {error["field"] for error in answer.json()["errors"]}
    assert fields == {"jobs[1].params.steps", "jobs[1].params.colour", "jobs[2].job_type"}
    assert (await operator.get("/queue")).json()["items"] == []


async def test_a_batch_has_one_to_a_hundred_jobs_and_fits_its_user(mei: httpx.AsyncClient) -> None:
    assert (await mei.post("/batch", json={"jobs": []})).status_code == 422
    small = {"job_type": "ui_icon", "params": {}}
    assert (await mei.post("/batch", json={"jobs": [small] * 101})).status_code == 422
    refused = await mei.post("/batch", json={"jobs": [small] * 100})
    assert (refused.status_code, refused.json()["code"]) == (429, "limit_reached")
    assert "100 at once never fit" in refused.json()["detail"]
    assert refused.headers["retry-after"] == "3600", "coming again does not help"
    answer = await mei.post("/batch", json={"jobs": [small] * 10})
    assert (answer.status_code, len(answer.json()["jobs"])) == (202, 10)


async def test_a_batch_may_be_as_large_as_its_jobs_are(mei: httpx.AsyncClient) -> None:
    wordy = {"job_type": "fate_card", "params": {"prompt": "moon " * 190}}
    assert (await mei.post("/batch", json={"jobs": [wordy] * 100})).status_code == 429
    assert (await mei.post("/batch", json={"jobs": [wordy] * 2500})).status_code == 413


async def test_a_batch_key_names_that_batch_for_ever(mei: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "sheet-1"}
    first = (await mei.post("/batch", json={"jobs": [CARD, CARD]}, headers=headers)).json()
    assert (await mei.post("/batch", json={"jobs": [CARD, CARD]}, headers=headers)).json() == first
    for longer in ([CARD], [CARD, CARD, CARD]):
        answer = await mei.post("/batch", json={"jobs": longer}, headers=headers)
        assert answer.json()["code"] == "idempotency_key_reused"
    assert (await mei.post("/jobs", json=CARD, headers=headers)).status_code == 422


# --------------------------------------------------------------------- queue


async def test_the_queue_is_paged_without_gap_or_repeat(mei: httpx.AsyncClient) -> None:
    jobs = [await submitted(mei) for _ in range(7)]
    found: list[str] = []
    params: dict[str, Any] = {"limit": 3, "min_seq": jobs[-1]["seq"]}
    while True:
        page = (await mei.get("/queue", params=params)).json()
        found += [job["id"] for job in page["items"]]
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
    assert found == [job["id"] for job in reversed(jobs)]
    assert page["counts"] == {"pending": 7, "running": 0, "completed": 0, "failed": 0, "cancelled": 0}


async def test_the_queue_is_filtered_by_status_and_type(served: Served, mei: httpx.AsyncClient) -> None:
    card, icon = await submitted(mei), await submitted(mei, job_type="ui_icon", params={})
    loaded = await completed(served.parts, "mei", card)

    async def ids(**params: Any) -> list[str]:
        page = await mei.get("/queue", params=params | {"min_seq": loaded.seq})
        return [job["id"] for job in page.json()["items"]]

    assert await ids() == [icon["id"]]
    assert await ids(status="completed") == [card["id"]]
    assert await ids(status=["completed", "pending"]) == [icon["id"], card["id"]]
    assert await ids(job_type="fate_card") == []
    assert (await mei.get("/queue", params={"status": "eaten"})).status_code == 422


async def test_a_cursor_of_another_list_is_refused(mei: httpx.AsyncClient, lan: httpx.AsyncClient) -> None:
    for _ in range(3):
        job = await submitted(mei)
    page = await mei.get("/queue", params={"limit": 1, "min_seq": job["seq"]})
    cursor = page.json()["next_cursor"]
    for client, params in ((mei, {"job_type": "ui_icon"}), (mei, {"status": "failed"}), (lan, {})):
        answer = await client.get("/queue", params={"cursor": cursor, **params})
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == "cursor"


# ------------------------------------------------------------- others' things


async def test_others_jobs_and_batches_do_not_exist(mei: httpx.AsyncClient, lan: httpx.AsyncClient) -> None:
    batch = (await mei.post("/batch", json={"jobs": [CARD, CARD]})).json()
    id_ = batch["jobs"][0]["id"]
    await mei.get(f"/jobs/{id_}", params={"min_seq": batch["seq"]})
    for method, path in (
        ("GET", f"/jobs/{id_}"),
        ("DELETE", f"/jobs/{id_}"),
        ("POST", f"/jobs/{id_}/retry"),
        ("GET", f"/jobs/{id_}/history"),
        ("GET", f"/batch/{batch['batch_id']}"),
        ("DELETE", f"/batch/{batch['batch_id']}"),
    ):
        foreign = await lan.request(method, path)
        unknown = await lan.request(
            method, path.replace(id_, str(uuid4())).replace(batch["batch_id"], str(uuid4()))
        )
        assert foreign.status_code == unknown.status_code == 404, (method, path)
    assert (await lan.get("/queue")).json()["items"] == []
    assert (await mei.get(f"/jobs/{id_}")).json()["status"] == "pending"


async def test_an_operator_sees_and_cancels_everything(
    mei: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    job = await submitted(mei)
    page = (await operator.get("/queue", params={"min_seq": job["seq"]})).json()
    assert [item["user_id"] for item in page["items"]] == ["mei"]
    assert (await operator.delete(f"/jobs/{job['id']}")).json()["status"] == "cancelled"


# ------------------------------------------------------------ when tables lag


async def test_jobs_are_accepted_and_cancelled_without_tables(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "_CHANGED_SECONDS", 0.1)
    monkeypatch.setattr(fresh, "_MISSING_SECONDS", 0.3)
    served = await serve(projecting=False)
    async with served.client("mei") as mei:
        job = await submitted(mei)
        assert (await mei.delete(f"/jobs/{job['id']}")).json()["status"] == "cancelled"
        behind = await mei.get(f"/jobs/{job['id']}")
        assert (behind.status_code, behind.json()["code"]) == (503, "unavailable")
        assert int(behind.headers["retry-after"]) > 0
