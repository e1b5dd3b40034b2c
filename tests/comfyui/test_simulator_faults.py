"""Every fault that can be switched on does what it says, and ends when it is switched off."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from PIL import Image

from comfyui.conformance.comfy_server import Server, flat, new_id
from forge.comfyui.simulator import Faults, Simulator, SimulatorOptions
from waiting import wait_until


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator() as running:
        yield running


@pytest.fixture
async def server(simulator: Simulator) -> AsyncIterator[Server]:
    async with aiohttp.ClientSession(simulator.url) as session:
        yield Server(session, simulator.url, "0.27.0", simulated=True)


async def switch(server: Server, **faults: Any) -> None:
    answer = await server.ask("POST", "/simulator/faults", json=faults)
    assert answer.status == 200, answer


async def only_image(server: Server, prefix: str = "f") -> dict[str, Any]:
    images = (await server.run(flat(prefix)))["outputs"]["2"]["images"]
    return dict(images[0])


async def test_faults_are_changed_one_by_one_and_reset(server: Server) -> None:
    await switch(server, fail_next=2)
    await switch(server, noise=True)
    shown = (await server.ask("GET", "/simulator/faults")).json
    assert (shown["fail_next"], shown["noise"], shown["frozen"]) == (2, True, False)
    assert (await server.ask("POST", "/simulator/faults", json={"nonsense": 1})).status == 400
    assert (await server.ask("DELETE", "/simulator/faults")).json["fail_next"] == 0


async def test_faults_can_be_on_from_the_start() -> None:
    async with (
        Simulator(SimulatorOptions(faults=Faults(fail_next=1))) as simulator,
        aiohttp.ClientSession(simulator.url) as session,
    ):
        entry = await Server(session, simulator.url, "0.27.0", simulated=True).run(flat("f"))
    assert entry["status"]["status_str"] == "error"


async def test_history_comes_later_than_success(server: Server) -> None:
    await switch(server, history_delay_ms=1500)
    async with server.listen() as listener:
        prompt_id = await server.submit(flat("f"), client_id=listener.client_id)
        await listener.until("execution_success", prompt_id=prompt_id)
        assert await server.history(prompt_id) is None
        assert (await server.queue())[0] == [prompt_id]
        await listener.until_over(prompt_id)
        assert await server.history(prompt_id) is not None


async def test_node_errors_come_with_a_200(server: Server) -> None:
    await switch(server, node_errors_next=1)
    answers = [await server.ask("POST", "/prompt", json={"prompt": flat("f")}) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 200]
    assert [bool(answer.json["node_errors"]) for answer in answers] == [True, False]


async def test_a_cached_result_names_a_file_that_is_gone(server: Server) -> None:
    await switch(server, stale_next=1)
    entry = await server.run(flat("f"))
    assert sorted(entry["status"]["messages"][1][1]["nodes"]) == ["1", "2"]
    (image,) = entry["outputs"]["2"]["images"]
    assert (await server.ask("GET", "/view", params=image)).status == 404
    assert (await server.ask("GET", "/view", params=await only_image(server))).status == 200


async def test_a_success_without_outputs(server: Server) -> None:
    await switch(server, empty_outputs_next=1)
    entry = await server.run(flat("f"))
    assert (entry["status"]["status_str"], entry["outputs"]) == ("success", {})
    assert await only_image(server)


async def test_a_frozen_worker_takes_a_prompt_and_never_ends_it(server: Server) -> None:
    await switch(server, frozen=True)
    prompt_id = await server.submit(flat("f"))
    behind = await server.submit(flat("f"))

    async def taken() -> bool:
        return await server.queue() == ([prompt_id], [behind])

    await wait_until(taken, what="the worker took it")
    assert (await server.ask("POST", f"/api/jobs/{prompt_id}/cancel")).json == {"cancelled": True}
    assert await taken()
    await switch(server, frozen=False)
    assert (await server.over(prompt_id))["status"]["messages"][-1][0] == "execution_interrupted"
    assert (await server.over(behind))["status"]["status_str"] == "success"


async def test_freezing_catches_a_prompt_that_runs(server: Server) -> None:
    async with server.busy() as blocker:
        await switch(server, frozen=True)
        await server.interrupt(blocker)
        assert (await server.queue())[0] == [blocker]
        assert await server.history(blocker) is None
        await switch(server, frozen=False)


async def test_a_blocked_publisher_tells_nobody_anything_until_it_is_free(server: Server) -> None:
    async with server.listen(autoping=False) as listener:
        await listener.message()
        await switch(server, blocked=True)
        prompt_id = await server.submit(flat("f"), client_id=listener.client_id)
        await server.over(prompt_id)
        assert await listener.heard_so_far() == []
        await switch(server, blocked=False)
        await listener.until_over(prompt_id)


async def test_messages_overtake_a_delayed_answer(server: Server) -> None:
    await switch(server, answer_delay_ms=1500)
    async with server.listen() as listener:
        prompt_id = new_id()
        answer = asyncio.create_task(
            server.submit(flat("f"), client_id=listener.client_id, prompt_id=prompt_id)
        )
        await listener.until_over(prompt_id)
        assert not answer.done()
        assert await answer == prompt_id


@pytest.mark.parametrize("fault", ["queue_and_refuse_next", "hang_up_next"])
async def test_a_prompt_without_a_good_answer_runs_all_the_same(server: Server, fault: str) -> None:
    await switch(server, **{fault: 1})
    body = {"prompt": flat("f"), "client_id": "c", "prompt_id": new_id()}
    if fault == "hang_up_next":
        with pytest.raises(aiohttp.ClientConnectionError):
            await server.ask("POST", "/prompt", json=body)
    else:
        assert (await server.ask("POST", "/prompt", json=body)).status == 500
    assert (await server.over(body["prompt_id"]))["status"]["status_str"] == "success"
    await server.submit(flat("f"))


async def test_a_refused_prompt_is_forgotten(server: Server, simulator: Simulator) -> None:
    await switch(server, refuse_next=1)
    body = {"prompt": flat("f"), "prompt_id": new_id()}
    assert (await server.ask("POST", "/prompt", json=body)).status == 500
    await server.run(flat("f"))
    assert await server.history(body["prompt_id"]) is None
    assert body["prompt_id"] not in simulator.record.submitted


async def test_slow_http_holds_every_answer_but_the_controls(server: Server) -> None:
    await switch(server, slow_http_ms=60_000)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(server.ask("GET", "/prompt"), 0.1)
    await server.ask("DELETE", "/simulator/faults")
    assert (await server.ask("GET", "/prompt")).status == 200


async def test_noise_adds_what_no_client_knows_and_hides_nothing(server: Server) -> None:
    await switch(server, noise=True)
    async with server.listen() as listener:
        prompt_id = await server.submit(flat("f"), client_id=listener.client_id)
        heard = await listener.until_over(prompt_id)
    types = [message["type"] for message in heard]
    assert "forge.unheard_of" in types
    assert {"execution_start", "executed", "execution_success"} <= set(types)
    entry = await server.over(prompt_id)
    assert "unheard_of" in entry
    assert entry["outputs"]["2"]["images"][0].keys() > {"filename", "subfolder", "type"}


async def test_the_next_prompts_fail_at_a_node_and_then_no_more(server: Server) -> None:
    await switch(server, fail_next=2)
    ends = [(await server.run(flat("f")))["status"]["messages"][-1] for _ in range(3)]
    assert [end[0] for end in ends] == ["execution_error", "execution_error", "execution_success"]
    assert (ends[0][1]["exception_type"], ends[0][1]["node_type"]) == ("RuntimeError", "EmptyImage")


async def test_sockets_are_cut_without_a_close_frame(server: Server) -> None:
    async with server.listen() as listener:
        await listener.message()
        await server.ask("POST", "/simulator/drop-sockets")
        await listener.socket.receive(timeout=10)
        assert listener.socket.close_code == 1006


@pytest.mark.parametrize("kind", ["bytes", "html", "truncated", "bomb"])
async def test_what_is_saved_is_no_whole_picture(server: Server, kind: str) -> None:
    await switch(server, hostile=kind)
    image = await only_image(server)
    answer = await server.ask("GET", "/view", params=image)
    assert answer.status == 200
    with pytest.raises((OSError, Image.DecompressionBombError)):
        Image.open(io.BytesIO(answer.body)).load()


async def test_names_lead_out_of_the_folder_and_are_not_served(server: Server) -> None:
    await switch(server, hostile="names")
    images = (await server.run(flat("f")))["outputs"]["2"]["images"]
    assert "../../../etc/passwd" in [image["filename"] for image in images]
    for image in images:
        assert (await server.ask("GET", "/view", params=image)).status in (400, 403, 404)


async def test_a_huge_file_never_ends(server: Server) -> None:
    await switch(server, hostile="huge")
    image = await only_image(server)
    async with server.session.get("/view", params=image) as answer:
        assert "Content-Length" not in answer.headers
        assert len(await answer.content.readexactly(8_000_000)) == 8_000_000
        answer.close()
