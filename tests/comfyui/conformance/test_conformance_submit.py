"""POST /prompt: what is taken, what is refused and in which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from comfyui.conformance.comfy_server import Server, flat, new_id, recorded, shape

CASES = recorded("validation")
BLANKED = ("traceback", "input_config")


def lean(value: Any) -> Any:
    """Without what was blanked in the recordings."""
    if isinstance(value, list):
        return [lean(item) for item in value]
    if isinstance(value, dict):
        return {key: lean(item) for key, item in value.items() if key not in BLANKED}
    return value


async def test_a_prompt_is_answered_with_its_id_and_place(server: Server, space: str) -> None:
    prompt_id = new_id()
    answer = await server.ask("POST", "/prompt", json={"prompt": flat(space), "prompt_id": prompt_id})
    assert shape(answer.json) == shape(recorded("run")["submitted"])
    assert (answer.status, answer.json["prompt_id"]) == (200, prompt_id)


async def test_numbers_count_up_with_every_prompt_even_a_refused_one(server: Server, space: str) -> None:
    first = (await server.ask("POST", "/prompt", json={"prompt": flat(space)})).json["number"]
    assert (await server.ask("POST", "/prompt", json={"prompt": {}})).status == 400
    assert (await server.ask("POST", "/prompt", json={"prompt": flat(space)})).json["number"] == first + 2


@pytest.mark.parametrize("case", CASES, ids=[case["label"] for case in CASES])
async def test_graphs_are_judged_as_recorded(server: Server, case: dict[str, Any]) -> None:
    body = case["text"] if "text" in case else json.dumps(case["json"])
    expected = case | (case.get("0.3.64", {}) if server.old else {})
    answer = await server.ask("POST", "/prompt", data=body, headers={"Content-Type": "application/json"})
    assert answer.status == expected["status"]
    if answer.status == 500:
        assert answer.headers["Content-Type"].startswith("text/plain")
    elif answer.status == 400:
        assert lean(answer.json) == expected["body"]
    else:
        assert lean(answer.json["node_errors"]) == expected["body"]["node_errors"]


@pytest.mark.parametrize("case", recorded("invalid_prompt_ids"), ids=lambda case: str(case["label"]))
async def test_a_prompt_id_is_a_canonical_uuid_since_0_27(
    server: Server, space: str, case: dict[str, Any]
) -> None:
    body = {"prompt": flat(space), "prompt_id": case["prompt_id"]}
    answer = await server.ask("POST", "/prompt", json=body)
    if server.old:
        assert (answer.status, answer.json["prompt_id"]) == (200, str(case["prompt_id"]))
    else:
        assert (answer.status, answer.json) == (400, case["body"])


async def test_without_an_id_the_server_makes_one(server: Server, space: str) -> None:
    for body in ({}, {"prompt_id": None}):
        answer = await server.ask("POST", "/prompt", json={"prompt": flat(space)} | body)
        made = "None" if server.old and body else answer.json["prompt_id"]
        assert answer.json["prompt_id"] == made
        assert len(made) in (4, 36)


async def test_the_same_id_twice_runs_twice(server: Server, space: str) -> None:
    prompt_id = new_id()
    async with server.listen() as listener:
        for name in ("first", "second"):
            graph = flat(f"{space}/{name}")
            await server.submit(graph, prompt_id=prompt_id, client_id=listener.client_id)
        for _ in range(2):
            await listener.until_over(prompt_id)
    entry = await server.over(prompt_id)
    assert [image["filename"] for image in entry["outputs"]["2"]["images"]] == ["second_00001_.png"]


async def test_an_equal_number_and_id_is_answered_500_yet_runs(server: Server, space: str) -> None:
    prompt_id = new_id()
    async with server.busy():
        statuses = [
            (
                await server.ask(
                    "POST", "/prompt", json={"prompt": flat(space), "prompt_id": prompt_id, "number": 7}
                )
            ).status
            for _ in range(2)
        ]
        _, waiting = await server.queue()
    assert statuses == [200, 500]
    assert waiting == [prompt_id, prompt_id]


async def test_one_valid_output_is_enough_and_ends_as_success(server: Server, space: str) -> None:
    graph = flat(space) | {"3": {"class_type": "SaveImage", "inputs": {"filename_prefix": space}}}
    answer = await server.ask("POST", "/prompt", json={"prompt": graph, "client_id": "x"})
    assert answer.status == 200
    assert list(answer.json["node_errors"]) == ["3"]
    entry = await server.over(answer.json["prompt_id"])
    assert (entry["status"]["status_str"], list(entry["outputs"])) == ("success", ["2"])


async def test_secrets_are_not_shown_and_other_extra_data_is(server: Server, space: str) -> None:
    extra = {"api_key_comfy_org": "s", "auth_token_comfy_org": "s", "mine": {"a": 1}}
    entry = await server.run(flat(space), extra_data=extra)
    shown = entry["prompt"][3]
    assert shown["mine"] == {"a": 1}
    assert ("api_key_comfy_org" in shown, "auth_token_comfy_org" in shown) == (False, False)
    assert ("create_time" in shown) is not server.old
