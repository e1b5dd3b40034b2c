"""History and the job view of it."""

from __future__ import annotations

from typing import Any

import pytest

from comfyui.conformance.comfy_server import Server, flat, new_id, recorded, shape

RUN = recorded("run")


async def test_a_success_is_kept_as_recorded(server: Server, space: str) -> None:
    extra = {"extra_pnginfo": {"workflow": {"id": "wf-h", "version": 0.4}}}
    entry = await server.run(flat(f"{space}/h"), extra_data=extra)
    expected = recorded("run")["history"]
    if server.old:
        del expected["prompt"][3]["create_time"]
    assert shape(entry) == shape(expected)
    assert entry["status"]["messages"][0][0] == "execution_start"
    assert entry["outputs"]["2"]["images"] == [
        {"filename": "h_00001_.png", "subfolder": space, "type": "output"}
    ]


async def test_a_failure_keeps_what_was_finished_before_it(server: Server, space: str) -> None:
    graph = flat(f"{space}/good")
    # ComfyUI runs equally ready outputs in no order at all (those of a set of strings): let one wait
    graph["4"] = {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}}
    graph["3"] = {"class_type": "SaveImage", "inputs": {"images": ["4", 0], "filename_prefix": "../../evil"}}
    entry = await server.run(graph)
    last, data = entry["status"]["messages"][-1]
    assert (entry["status"]["status_str"], entry["status"]["completed"]) == ("error", False)
    assert (last, data.keys()) == ("execution_error", RUN["execution_error"].keys())
    assert (data["node_id"], data["node_type"], data["exception_type"]) == ("3", "SaveImage", "Exception")
    assert data["exception_message"].startswith("**** ERROR: Saving image outside the output folder")
    assert list(entry["outputs"]) == ["2"]


async def test_a_text_where_a_picture_belongs_fails_when_it_runs(server: Server, space: str) -> None:
    graph = flat(space)
    graph["2"]["inputs"]["images"] = "a string"
    last, data = (await server.run(graph))["status"]["messages"][-1]
    assert (last, data["exception_type"], data["executed"]) == ("execution_error", "AttributeError", [])


async def test_what_is_not_over_is_not_in_history(server: Server, space: str) -> None:
    async with server.busy() as blocker:
        waiting = await server.submit(flat(space))
        for prompt_id in (blocker, waiting, new_id()):
            answer = await server.ask("GET", f"/history/{prompt_id}")
            assert (answer.status, answer.json) == (200, {})


async def test_listing_pages_from_the_oldest_and_limits_to_the_newest(server: Server, space: str) -> None:
    ids = []
    for _ in range(5):
        ids.append(await server.submit(flat(space)))
        await server.over(ids[-1])
    for query, expected in {
        "": [0, 1, 2, 3, 4],
        "max_items=2": [3, 4],
        "max_items=2&offset=0": [0, 1],
        "max_items=2&offset=1": [1, 2],
        "offset=3": [3, 4],
        "max_items=100": [0, 1, 2, 3, 4],
        "max_items=0": [],
        "max_items=-1": [],
        "offset=99": [],
    }.items():
        listed = (await server.ask("GET", f"/api/history?{query}")).json
        assert list(listed) == [ids[index] for index in expected], query
    assert (await server.ask("GET", "/history?max_items=abc")).status == 500


async def test_history_is_deleted_by_id_and_cleared(server: Server, space: str) -> None:
    first, second = await server.submit(flat(space)), await server.submit(flat(space))
    for prompt_id in (first, second):
        await server.over(prompt_id)
    answer = await server.ask("POST", "/history", json={"delete": [first, "nobody"]})
    assert (answer.status, answer.body) == (200, b"")
    assert list((await server.ask("GET", "/history")).json) == [second]
    await server.ask("POST", "/history", json={"clear": True})
    assert (await server.ask("GET", "/history")).json == {}


async def test_jobs_exist_since_0_27_and_only_under_api(server: Server) -> None:
    assert (await server.ask("GET", "/api/jobs")).status == (404 if server.old else 200)
    bare = await server.ask("GET", "/jobs")
    assert (bare.status, bare.body) == (404, b"")


async def job(server: Server, prompt_id: str) -> Any:
    return (await server.ask("GET", f"/api/jobs/{prompt_id}")).json


async def test_a_job_is_told_in_every_state(server: Server, space: str) -> None:
    if server.old:
        assert (await server.ask("GET", f"/api/jobs/{new_id()}")).body == b""
        return
    async with server.busy() as blocker:
        waiting = await server.submit(flat(space))
        assert shape(await job(server, blocker)) == shape(RUN["job_in_progress"])
        assert shape(await job(server, waiting)) == shape(RUN["job_pending"])
        assert (await job(server, blocker))["status"] == "in_progress"
    assert (await job(server, blocker))["status"] == "cancelled"
    extra = {"extra_pnginfo": {"workflow": {"id": "wf-j"}}}
    done = await server.submit(flat(space), extra_data=extra)
    await server.over(done)
    told = await job(server, done)
    assert told.keys() == RUN["job_completed"].keys()
    assert (told["status"], told["workflow_id"], told["outputs_count"]) == ("completed", "wf-j", 1)
    assert shape(told["preview_output"]) == shape(RUN["job_completed"]["preview_output"])
    failed = await server.submit(flat("../../evil"))
    await server.over(failed)
    assert (await job(server, failed))["status"] == "failed"
    unknown = await server.ask("GET", "/api/jobs/not-a-uuid")
    assert (unknown.status, unknown.json) == (404, RUN["job_unknown"])


async def test_jobs_are_listed_newest_first_with_pages(server: Server, space: str) -> None:
    if server.old:
        assert (await server.ask("GET", "/api/jobs?limit=1")).status == 404
        return
    ids = []
    for _ in range(3):
        ids.append(await server.submit(flat(space)))
        await server.over(ids[-1])
    page = (await server.ask("GET", "/api/jobs?status=completed&limit=2&sort_order=asc&offset=1")).json
    assert [listed["id"] for listed in page["jobs"]] == ids[1:]
    assert page["pagination"] == {"offset": 1, "limit": 2, "total": 3, "has_more": False}
    newest = (await server.ask("GET", "/api/jobs?limit=1&offset=-5")).json
    assert ([listed["id"] for listed in newest["jobs"]], newest["pagination"]["has_more"]) == ([ids[2]], True)


@pytest.mark.parametrize("case", recorded("jobs_errors"), ids=lambda case: str(case["path"]))
async def test_bad_job_questions_are_refused_as_recorded(server: Server, case: dict[str, Any]) -> None:
    body = {"json": case["json"]} if "json" in case else {"data": case["text"]} if "text" in case else {}
    answer = await server.ask(case["method"], case["path"], **body)
    if server.old:
        assert answer.status in (404, 405)
    else:
        assert (answer.status, answer.json) == (case["status"], case["body"])


async def test_cancel_removes_what_waits_and_interrupts_what_runs(server: Server, space: str) -> None:
    if server.old:
        assert (await server.ask("POST", f"/api/jobs/{new_id()}/cancel")).status in (404, 405)
        return

    async def cancel(prompt_id: str) -> Any:
        return (await server.ask("POST", f"/api/jobs/{prompt_id}/cancel")).json

    async with server.busy() as blocker:
        waiting = await server.submit(flat(space))
        assert await cancel(waiting) == {"cancelled": True}
        assert await cancel(waiting) == {"cancelled": False}
        assert (await server.ask("GET", f"/api/jobs/{waiting}")).status == 404
        assert await cancel("not-a-uuid") == {"cancelled": False}
        many = await server.ask("POST", "/api/jobs/cancel", json={"job_ids": [blocker, new_id()]})
        assert (many.status, many.json) == (200, {"cancelled": True})
        await server.over(blocker)
        assert await cancel(blocker) == {"cancelled": False}


async def test_a_null_workflow_breaks_the_job_list_until_it_is_deleted(server: Server, space: str) -> None:
    if server.old:
        assert (await server.ask("GET", "/api/jobs")).status == 404
        return
    poison = await server.submit(flat(space), extra_data={"extra_pnginfo": {"workflow": None}})
    await server.over(poison)
    assert (await server.ask("GET", "/api/jobs")).status == 500
    await server.ask("POST", "/history", json={"delete": [poison]})
    assert (await server.ask("GET", "/api/jobs")).status == 200
