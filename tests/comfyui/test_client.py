"""The client against a simulated ComfyUI that misbehaves as real ones were seen to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from aiohttp import web
from websockets.asyncio.client import connect

from forge.comfyui.client import Comfy
from forge.comfyui.patience import Patience
from forge.comfyui.protocol import Output, Progress, Sighting
from forge.comfyui.simulator import Faults, Simulator, SimulatorOptions
from forge.errors import (
    BackendUnreachable,
    BackendWedged,
    PictureRefused,
    PromptFailed,
    PromptInterrupted,
    PromptLost,
    PromptRejected,
    PromptTimedOut,
)
from waiting import wait_until

HURRY = Patience(
    connect=5.0,
    read=10.0,
    fetch=20.0,
    poll=(0.15, 0.2),
    poll_deaf=(0.03, 0.06),
    poll_first=0.005,
    settle=0.02,
    history=0.3,
    lost_answer=0.5,
    unreachable=0.4,
    cancel=20.0,
    queue_factor=3.0,
    first_socket=1.0,
    silence=0.1,
    reconnect=(0.01, 0.05),
    health_timeout=5.0,
)
NO_POLLS = msgspec.structs.replace(HURRY, poll=(60.0, 60.0))
"""For what the socket must do alone."""


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator() as running:
        yield running


@pytest.fixture
async def comfy(simulator: Simulator) -> AsyncIterator[Comfy]:
    async with Comfy(simulator.url, HURRY) as client:
        yield client


def swatch(prompt_id: UUID, color: int = 0x3366CC) -> dict[str, Any]:
    image = {"width": 64, "height": 64, "batch_size": 1, "color": color}
    save = {"images": ["1", 0], "filename_prefix": f"forge/{prompt_id}/img"}
    return {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": "SaveImage", "inputs": save},
    }


def portrait(prompt_id: UUID, steps: int = 8) -> dict[str, Any]:
    sampler = {
        "seed": 1,
        "steps": steps,
        "cfg": 7.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    save = {"images": ["6", 0], "filename_prefix": f"forge/{prompt_id}/img"}
    return {
        "1": {
            "class_type": "CheckpointLoaderSimple",
            "inputs": {"ckpt_name": "v1-5-pruned-emaonly.safetensors"},
        },
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a miller"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "blurry"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": sampler | links},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": save},
    }


async def submitted(comfy: Comfy) -> UUID:
    prompt_id = uuid4()
    await comfy.submit(prompt_id, swatch(prompt_id), outputs=["2"])
    return prompt_id


async def seen(comfy: Comfy, prompt_id: UUID, sighting: Sighting) -> None:
    async def found() -> bool:
        return await comfy.look(prompt_id) is sighting

    await wait_until(found, what=f"{prompt_id} is {sighting}")


async def whole(comfy: Comfy, output: Output, max_bytes: int = 1 << 20) -> bytes:
    return b"".join([chunk async for chunk in comfy.fetch(output, max_bytes=max_bytes)])


def owner(simulator: Simulator, prompt_id: UUID) -> str:
    return str(simulator.memory.queue.history[str(prompt_id)]["prompt"][3]["client_id"])


# The happy path


async def test_a_submitted_prompt_becomes_a_picture(simulator: Simulator, comfy: Comfy) -> None:
    prompt_id = await submitted(comfy)
    runs: list[str] = []
    outputs = await comfy.wait(prompt_id, timeout=60, on_running=lambda: runs.append("running"))
    assert [(file.node, file.subfolder, file.type) for file in outputs] == [
        ("2", f"forge/{prompt_id}", "output")
    ]
    assert (await whole(comfy, outputs[0])).startswith(b"\x89PNG\r\n\x1a\n")
    assert runs == ["running"]
    assert await comfy.look(prompt_id) is Sighting.SUCCEEDED
    await comfy.forget(prompt_id)
    assert await comfy.look(prompt_id) is Sighting.ABSENT


async def test_the_socket_alone_ends_the_wait_at_once(simulator: Simulator) -> None:
    async with Comfy(simulator.url, NO_POLLS) as comfy:
        simulator.render(80, 80)
        prompt_id = await submitted(comfy)
        async with asyncio.timeout(30):
            assert await comfy.wait(prompt_id, timeout=60)


async def test_progress_is_told_while_it_runs(simulator: Simulator, comfy: Comfy) -> None:
    simulator.render(1200, 1200)
    prompt_id = uuid4()
    told: list[Progress] = []
    await comfy.submit(prompt_id, portrait(prompt_id), outputs=["7"])
    assert await comfy.wait(prompt_id, timeout=60, on_progress=told.append)
    assert len(told) >= 3
    assert told == sorted(told, key=lambda progress: progress.value)
    assert told[-1] == Progress(8, 8, "5")


async def test_only_what_the_wanted_outputs_need_is_submitted(simulator: Simulator, comfy: Comfy) -> None:
    prompt_id = uuid4()
    graph = swatch(prompt_id) | {"3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}
    await comfy.submit(prompt_id, graph, outputs=["2"])
    outputs = await comfy.wait(prompt_id, timeout=60)
    assert [file.node for file in outputs] == ["2"]
    assert set(simulator.memory.queue.history[str(prompt_id)]["prompt"][2]) == {"1", "2"}


async def test_many_prompts_share_one_socket(simulator: Simulator, comfy: Comfy) -> None:
    simulator.render(5, 20)
    prompts = await asyncio.gather(*(submitted(comfy) for _ in range(12)))
    found = await asyncio.gather(*(comfy.wait(prompt_id, timeout=60) for prompt_id in prompts))
    assert [files[0].subfolder for files in found] == [f"forge/{prompt_id}" for prompt_id in prompts]
    assert len({owner(simulator, prompt_id) for prompt_id in prompts}) == 1
    assert all(count == 1 for count in simulator.record.executed.values())


async def test_messages_may_come_before_the_answer(simulator: Simulator) -> None:
    simulator.faults = Faults(answer_delay_ms=100)
    async with Comfy(simulator.url, NO_POLLS) as comfy:
        prompt_id = await submitted(comfy)
        async with asyncio.timeout(30):
            assert await comfy.wait(prompt_id, timeout=60)


async def test_unknown_messages_and_keys_are_tolerated(simulator: Simulator) -> None:
    simulator.faults = Faults(noise=True)
    async with Comfy(simulator.url, NO_POLLS) as comfy:
        prompt_id = uuid4()
        graph = portrait(prompt_id)
        await comfy.submit(prompt_id, graph, outputs=["7"])
        async with asyncio.timeout(30):
            assert await comfy.wait(prompt_id, timeout=60)


# The ten facts that cost the most


async def test_fact_1_names_from_the_cache_are_not_results(simulator: Simulator, comfy: Comfy) -> None:
    first, second = uuid4(), uuid4()
    await comfy.submit(first, swatch(first), outputs=["2"])
    await comfy.wait(first, timeout=60)
    await comfy.submit(second, swatch(first), outputs=["2"])  # the very same prefix
    with pytest.raises(PromptLost, match="cache"):
        await comfy.wait(second, timeout=60)
    simulator.faults = Faults(stale_next=1)
    with pytest.raises(PromptLost):
        await comfy.wait(await submitted(comfy), timeout=60)


async def test_fact_2_every_prompt_has_an_owner(simulator: Simulator, comfy: Comfy) -> None:
    prompt_id = await submitted(comfy)
    await comfy.wait(prompt_id, timeout=60)
    assert owner(simulator, prompt_id)


async def test_fact_2_success_without_outputs_is_not_done(simulator: Simulator, comfy: Comfy) -> None:
    simulator.faults = Faults(empty_outputs_next=1)
    with pytest.raises(PromptLost):
        await comfy.wait(await submitted(comfy), timeout=60)


async def test_fact_3_success_is_believed_only_once_history_has_it(
    simulator: Simulator, comfy: Comfy
) -> None:
    simulator.faults = Faults(history_delay_ms=250)
    assert await comfy.wait(await submitted(comfy), timeout=60)


@pytest.mark.parametrize("fault", ["hang_up_next", "queue_and_refuse_next"])
async def test_fact_4_a_lost_answer_does_not_run_it_twice(
    simulator: Simulator, comfy: Comfy, fault: str
) -> None:
    simulator.faults = Faults(**{fault: 1})
    prompt_id = await submitted(comfy)
    assert await comfy.wait(prompt_id, timeout=60)
    assert simulator.record.submitted[str(prompt_id)] == 1


async def test_fact_4_an_answer_that_never_comes_does_not_run_it_twice(
    simulator: Simulator, comfy: Comfy
) -> None:
    simulator.faults = Faults(answer_delay_ms=60_000)
    prompt_id = await submitted_impatiently(simulator)
    assert await comfy.wait(prompt_id, timeout=60)
    assert simulator.record.submitted[str(prompt_id)] == 1


async def submitted_impatiently(simulator: Simulator) -> UUID:
    async with Comfy(simulator.url, msgspec.structs.replace(HURRY, read=0.5, lost_answer=20.0)) as comfy:
        return await submitted(comfy)


async def test_fact_5_half_a_graph_is_cancelled_and_rejected(simulator: Simulator, comfy: Comfy) -> None:
    simulator.render(60_000, 60_000)
    simulator.faults = Faults(node_errors_next=1)
    prompt_id = uuid4()
    with pytest.raises(PromptRejected) as caught:
        await comfy.submit(prompt_id, portrait(prompt_id), outputs=["7"])
    assert "0" in caught.value.node_errors
    assert simulator.memory.queue.remaining == 0


async def test_fact_6_what_a_restart_forgot_is_lost(simulator: Simulator, comfy: Comfy) -> None:
    simulator.render(60_000, 60_000)
    running, pending = await submitted(comfy), await submitted(comfy)
    waits = [asyncio.create_task(comfy.wait(prompt_id, timeout=60)) for prompt_id in (running, pending)]
    await seen(comfy, running, Sighting.RUNNING)
    await simulator.forget()
    for wait in waits:
        with pytest.raises(PromptLost):
            await wait


async def test_fact_6_a_restart_behind_a_pause_is_noticed_too(simulator: Simulator, comfy: Comfy) -> None:
    simulator.render(60_000, 60_000)
    prompt_id = await submitted(comfy)
    await seen(comfy, prompt_id, Sighting.RUNNING)
    wait = asyncio.create_task(comfy.wait(prompt_id, timeout=60))
    await simulator.go_down(0.2)
    with pytest.raises(PromptLost):
        await wait


async def test_fact_6_a_smaller_number_proves_a_restart(simulator: Simulator) -> None:
    never = (60.0, 60.0)  # neither polls nor the socket's return must be what tells
    patient = msgspec.structs.replace(
        HURRY, poll=never, poll_deaf=never, poll_first=60.0, settle=60.0, reconnect=never
    )
    async with Comfy(simulator.url, patient) as comfy:
        for _ in range(3):
            await comfy.wait(await submitted(comfy), timeout=60)
        simulator.render(60_000, 60_000)
        forgotten = await submitted(comfy)
        wait = asyncio.create_task(comfy.wait(forgotten, timeout=60))
        await seen(comfy, forgotten, Sighting.RUNNING)
        await simulator.forget()
        await submitted(comfy)
        async with asyncio.timeout(30):
            with pytest.raises(PromptLost):
                await wait


async def test_fact_7_a_poison_graph_never_leaves_the_house(simulator: Simulator, comfy: Comfy) -> None:
    poison = swatch(uuid4()) | {"99": {"class_type": "ImageInvert"}}
    with pytest.raises(PromptRejected):
        await comfy.submit(uuid4(), poison, outputs=["2"])
    assert simulator.memory.queue.number == 0


async def test_fact_8_every_connection_has_its_own_id(simulator: Simulator, comfy: Comfy) -> None:
    first = await submitted(comfy)
    await comfy.wait(first, timeout=60)
    simulator.drop_sockets()

    async def renewed() -> bool:
        again = await submitted(comfy)
        await comfy.wait(again, timeout=60)
        return owner(simulator, again) != owner(simulator, first)

    await wait_until(renewed, what="a new client id")


async def test_fact_8_a_deaf_socket_is_replaced(simulator: Simulator) -> None:
    async with Comfy(simulator.url, HURRY) as comfy:
        first = await submitted(comfy)
        await comfy.wait(first, timeout=60)
        deaf = owner(simulator, first)
        url = simulator.url.replace("http", "ws") + f"/ws?clientId={deaf}"
        async with connect(url) as usurper:
            await usurper.recv()

        async def replaced() -> bool:
            again = await submitted(comfy)
            assert await comfy.wait(again, timeout=60)
            return owner(simulator, again) != deaf

        await wait_until(replaced, what="another socket")


async def test_fact_9_a_blocked_publisher_does_not_hold_up_results(
    simulator: Simulator, comfy: Comfy
) -> None:
    await comfy.wait(await submitted(comfy), timeout=60)
    simulator.faults = Faults(blocked=True)
    assert await comfy.wait(await submitted(comfy), timeout=60)
    assert await comfy.wait(await submitted(comfy), timeout=60)


async def test_fact_10_a_500_is_looked_at_and_tried_once_more(simulator: Simulator, comfy: Comfy) -> None:
    simulator.faults = Faults(refuse_next=1)
    prompt_id = await submitted(comfy)
    assert await comfy.wait(prompt_id, timeout=60)
    assert simulator.record.submitted[str(prompt_id)] == 1


async def test_fact_10_a_500_twice_is_the_end_of_this_attempt(simulator: Simulator, comfy: Comfy) -> None:
    simulator.faults = Faults(refuse_next=2)
    with pytest.raises(PromptLost, match="twice"):
        await submitted(comfy)
    assert not simulator.record.submitted


# Refusals and failures


async def test_a_graph_comfyui_does_not_accept_is_rejected(simulator: Simulator, comfy: Comfy) -> None:
    prompt_id = uuid4()
    graph = portrait(prompt_id)
    graph["1"]["inputs"]["ckpt_name"] = "missing.safetensors"
    with pytest.raises(PromptRejected) as caught:
        await comfy.submit(prompt_id, graph, outputs=["7"])
    assert "1" in caught.value.node_errors


async def test_a_graph_that_is_too_large_is_rejected() -> None:
    async with (
        Simulator(SimulatorOptions(max_upload_bytes=2000)) as simulator,
        Comfy(simulator.url, HURRY) as comfy,
    ):
        prompt_id = uuid4()
        graph = portrait(prompt_id)
        graph["2"]["inputs"]["text"] = "miller " * 1000
        with pytest.raises(PromptRejected, match="413"):
            await comfy.submit(prompt_id, graph, outputs=["7"])


async def test_a_node_that_raises_fails_the_prompt(simulator: Simulator, comfy: Comfy) -> None:
    simulator.faults = Faults(fail_next=1)
    with pytest.raises(PromptFailed, match=r"node 1 \(EmptyImage\): CUDA error: out of memory"):
        await comfy.wait(await submitted(comfy), timeout=60)


async def test_a_prompt_that_runs_too_long_times_out(simulator: Simulator, comfy: Comfy) -> None:
    simulator.render(60_000, 60_000)
    prompt_id = await submitted(comfy)
    await seen(comfy, prompt_id, Sighting.RUNNING)
    with pytest.raises(PromptTimedOut, match="running"):
        await comfy.wait(prompt_id, timeout=0.2)


async def test_the_time_out_counts_from_when_it_runs(simulator: Simulator) -> None:
    simulator.render(1500, 1500)
    async with Comfy(simulator.url, msgspec.structs.replace(HURRY, queue_factor=60.0)) as comfy:
        await seen(comfy, await submitted(comfy), Sighting.RUNNING)
        simulator.render(0, 0)
        assert await comfy.wait(await submitted(comfy), timeout=1.0), "it waited longer than it may run"


async def test_waiting_behind_others_is_bounded(simulator: Simulator, comfy: Comfy) -> None:
    simulator.faults = Faults(frozen=True)
    await submitted(comfy)
    behind = await submitted(comfy)
    with pytest.raises(PromptTimedOut, match="behind"):
        await comfy.wait(behind, timeout=0.1)


# Cancelling


async def test_a_pending_prompt_is_cancelled_and_nothing_else(simulator: Simulator, comfy: Comfy) -> None:
    simulator.faults = Faults(frozen=True)
    running, pending = await submitted(comfy), await submitted(comfy)
    wait = asyncio.create_task(comfy.wait(pending, timeout=60))
    await seen(comfy, running, Sighting.RUNNING)
    await comfy.cancel(pending)
    assert await comfy.look(pending) is Sighting.ABSENT
    with pytest.raises(PromptInterrupted):
        await wait
    simulator.faults = Faults()
    assert await comfy.wait(running, timeout=60)


async def test_a_running_prompt_is_cancelled_and_nothing_else(simulator: Simulator, comfy: Comfy) -> None:
    simulator.render(60_000, 60_000)
    running, pending = await submitted(comfy), await submitted(comfy)
    await seen(comfy, running, Sighting.RUNNING)
    wait = asyncio.create_task(comfy.wait(running, timeout=60))
    simulator.render(0, 0)
    await comfy.cancel(running)
    assert await comfy.look(running) is Sighting.INTERRUPTED
    with pytest.raises(PromptInterrupted):
        await wait
    assert await comfy.wait(pending, timeout=60)


async def test_cancelling_what_is_over_or_unknown_is_harmless(simulator: Simulator, comfy: Comfy) -> None:
    prompt_id = await submitted(comfy)
    await comfy.wait(prompt_id, timeout=60)
    await comfy.cancel(prompt_id)
    assert await comfy.look(prompt_id) is Sighting.SUCCEEDED
    await comfy.cancel(uuid4())


async def test_a_prompt_that_cannot_be_cancelled_proves_the_server_wedged(
    simulator: Simulator,
) -> None:
    simulator.faults = Faults(frozen=True)
    async with Comfy(simulator.url, msgspec.structs.replace(HURRY, cancel=0.4)) as comfy:
        stuck = await submitted(comfy)
        await seen(comfy, stuck, Sighting.RUNNING)
        with pytest.raises(BackendWedged, match=str(stuck)):
            await comfy.cancel(stuck)


async def test_cancelling_at_a_dead_server_is_unknown(nowhere: str) -> None:
    async with Comfy(nowhere, HURRY) as comfy:
        with pytest.raises(BackendUnreachable):
            await comfy.cancel(uuid4())


# Adoption


@pytest.mark.parametrize("version", ["0.27.0", "0.3.64"])
async def test_somebody_elses_prompt_can_be_adopted(version: Any) -> None:
    async with Simulator(SimulatorOptions(version=version, render_ms=(200, 200))) as simulator:
        async with Comfy(simulator.url, HURRY) as dead:
            prompt_id = await submitted(dead)
        async with Comfy(simulator.url, HURRY) as comfy:
            runs: list[int] = []
            outputs = await comfy.wait(prompt_id, timeout=60, on_running=lambda: runs.append(1))
            assert [file.node for file in outputs] == ["2"]
            assert runs == [1]
            assert await comfy.wait(prompt_id, timeout=60) == outputs
            assert simulator.record.executed[str(prompt_id)] == 1


async def test_adopting_what_nobody_knows_is_lost(comfy: Comfy) -> None:
    with pytest.raises(PromptLost):
        await comfy.wait(uuid4(), timeout=60)


# The older server


async def test_the_whole_path_on_the_older_server() -> None:
    async with (
        Simulator(SimulatorOptions(version="0.3.64", render_ms=(30_000, 30_000))) as simulator,
        Comfy(simulator.url, HURRY) as comfy,
    ):
        running, pending = await submitted(comfy), await submitted(comfy)
        await seen(comfy, running, Sighting.RUNNING)
        assert await comfy.look(pending) is Sighting.PENDING
        await comfy.cancel(pending)
        assert await comfy.look(pending) is Sighting.ABSENT
        await comfy.cancel(running)
        assert await comfy.look(running) is Sighting.INTERRUPTED
        simulator.render(0, 0)
        prompt_id = await submitted(comfy)
        assert await comfy.wait(prompt_id, timeout=60)
        assert await comfy.look(prompt_id) is Sighting.SUCCEEDED
        assert (await comfy.health()).reachable


# A server that does not answer


async def test_a_dead_server_is_unreachable_at_once(nowhere: str) -> None:
    async with Comfy(nowhere, HURRY) as comfy:
        for ask in (comfy.look(uuid4()), submitted(comfy), comfy.upload("a.png", b"x"), comfy.running()):
            with pytest.raises(BackendUnreachable):
                await ask
        await comfy.forget(uuid4())
        health = await comfy.health()
        assert not health.reachable
        assert health.detail


async def test_waiting_at_a_server_that_died_ends(simulator: Simulator, comfy: Comfy) -> None:
    simulator.render(60_000, 60_000)
    prompt_id = await submitted(comfy)
    await simulator.leave()
    with pytest.raises(BackendUnreachable, match="no answer for"):
        await comfy.wait(prompt_id, timeout=60)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 502 Bad Gateway", b"HTTP/1.1 200 OK", b"HTTP/1.1 404 Not Found"]
)
async def test_a_proxy_that_answers_is_no_comfyui(answer: bytes) -> None:
    async with stranger(answer + b"\r\nContent-Length: 5\r\n\r\nhello") as url, Comfy(url, HURRY) as comfy:
        for ask in (comfy.look(uuid4()), submitted(comfy), comfy.upload("a.png", b"x")):
            with pytest.raises(BackendUnreachable):
                await ask
        assert not (await comfy.health()).reachable


@pytest.mark.fault("N2")
async def test_a_black_hole_is_unreachable_in_bounded_time() -> None:
    impatient = msgspec.structs.replace(HURRY, read=0.1, health_timeout=0.1)
    async with stranger(None) as url, Comfy(url, impatient) as comfy, asyncio.timeout(30):
        with pytest.raises(BackendUnreachable):
            await submitted(comfy)
        assert not (await comfy.health()).reachable


@asynccontextmanager
async def stranger(answer: bytes | None) -> AsyncIterator[str]:
    """A server that says the same to everybody and hangs up; None: says nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            if answer is not None:
                writer.write(answer)
                await writer.drain()
            else:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_what_was_not_answered_in_time_is_not_sent_again() -> None:
    async with scripted([]) as (url, posts), Comfy(url, msgspec.structs.replace(HURRY, read=0.5)) as comfy:
        with pytest.raises(BackendUnreachable):
            await submitted(comfy)
    assert len(posts) == 1


async def test_absent_once_is_not_lost() -> None:
    async with (
        scripted(["in_progress", None, "in_progress", None, None]) as (url, _),
        Comfy(url, HURRY) as comfy,
    ):
        runs: list[str] = []
        with pytest.raises(PromptLost):
            await comfy.wait(uuid4(), timeout=60, on_running=lambda: runs.append("running"))
    assert runs == ["running"]


@asynccontextmanager
async def scripted(statuses: list[str | None]) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A ComfyUI that never answers a POST and shows a job in these states, one a look, then no more."""
    posts: list[bytes] = []

    async def never(request: web.Request) -> web.Response:
        posts.append(await request.read())
        await asyncio.sleep(60)
        return web.Response()

    async def job(request: web.Request) -> web.Response:
        status = statuses.pop(0) if statuses else None
        if status is None:
            return web.json_response({"error": "Job not found"}, status=404)
        return web.json_response({"id": request.match_info["id"], "status": status})

    application = web.Application()
    application.add_routes([web.post("/prompt", never), web.get("/api/jobs/{id}", job)])
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", posts
    finally:
        await runner.cleanup()
    assert not statuses


async def test_leaving_ends_everything(simulator: Simulator) -> None:
    before = asyncio.all_tasks()
    simulator.render(60_000, 60_000)
    async with Comfy(simulator.url, HURRY) as comfy:
        prompt_id = await submitted(comfy)
        wait = asyncio.create_task(comfy.wait(prompt_id, timeout=60))
        await seen(comfy, prompt_id, Sighting.RUNNING)
    with pytest.raises(BackendUnreachable, match="closed"):
        await wait
    with pytest.raises(BackendUnreachable, match="closed"):
        await comfy.look(prompt_id)
    names = {task.get_name() for task in asyncio.all_tasks() - before}
    assert not any(name.startswith("socket of") for name in names)


# Files


@pytest.mark.fault("X1")
async def test_hostile_names_are_refused(simulator: Simulator, comfy: Comfy) -> None:
    simulator.faults = Faults(hostile="names")
    prompt_id = await submitted(comfy)
    with pytest.raises(PictureRefused):
        await comfy.wait(prompt_id, timeout=60)


@pytest.mark.fault("X1")
async def test_a_file_without_end_is_refused(simulator: Simulator, comfy: Comfy) -> None:
    simulator.faults = Faults(hostile="huge")
    outputs = await comfy.wait(await submitted(comfy), timeout=60)
    with pytest.raises(PictureRefused, match="more than"):
        await whole(comfy, outputs[0])


async def test_a_file_larger_than_allowed_is_refused(comfy: Comfy) -> None:
    outputs = await comfy.wait(await submitted(comfy), timeout=60)
    size = len(await whole(comfy, outputs[0]))
    assert len(await whole(comfy, outputs[0], max_bytes=size)) == size
    with pytest.raises(PictureRefused, match=f"more than {size - 1}"):
        await whole(comfy, outputs[0], max_bytes=size - 1)


async def test_a_file_that_is_gone_is_lost(comfy: Comfy) -> None:
    with pytest.raises(PromptLost):
        await whole(comfy, Output("2", "gone_00001_.png", "forge", "output"))


async def test_a_name_that_comfyui_refuses_is_refused(comfy: Comfy) -> None:
    with pytest.raises(PictureRefused, match="400"):
        await whole(comfy, Output("2", "a..b.png", "", "output"))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n",
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["length", "chunked", "500"],
)
@pytest.mark.fault("N1")
async def test_a_file_that_breaks_off_is_not_taken_for_whole(answer: bytes) -> None:
    async with stranger(answer) as url, Comfy(url, HURRY) as comfy:
        with pytest.raises(BackendUnreachable):
            await whole(comfy, Output("2", "a.png", "", "output"))


async def test_an_upload_is_named_as_comfyui_names_it(simulator: Simulator, comfy: Comfy) -> None:
    assert await comfy.upload("face.png", b"one") == "forge/face.png"
    assert await comfy.upload("face.png", b"one") == "forge/face.png"
    assert await comfy.upload("face.png", b"two") == "forge/face (1).png"


async def test_an_open_file_is_uploaded_into_a_folder(
    simulator: Simulator, comfy: Comfy, tmp_path: Path
) -> None:
    (tmp_path / "me").write_bytes(content := bytes(range(256)) * 5000)
    for nth in (1, 2):
        with (tmp_path / "me").open("rb") as file:
            name = await comfy.upload("face.png", file, folder=f"forge/job/{nth}")
        assert name == f"forge/job/{nth}/face.png"
        assert (simulator.folders.path("input") / name).read_bytes() == content


async def test_an_upload_comfyui_does_not_take_is_refused() -> None:
    async with (
        Simulator(SimulatorOptions(max_upload_bytes=1000)) as simulator,
        Comfy(simulator.url, HURRY) as comfy,
    ):
        with pytest.raises(PictureRefused, match="413"):
            await comfy.upload("face.png", bytes(5000))


async def test_health_tells_version_and_queue(simulator: Simulator, comfy: Comfy) -> None:
    simulator.render(60_000, 60_000)
    await submitted(comfy)
    health = await comfy.health()
    assert (health.reachable, health.version, health.queue_remaining) == (True, "0.27.0", 1)


# The socket


async def test_what_the_socket_does_not_tell_about_is_asked_for(simulator: Simulator) -> None:
    simulator.render(200, 200)
    async with Comfy(simulator.url, NO_POLLS) as dead:
        adopted = await submitted(dead)
    async with Comfy(simulator.url, NO_POLLS) as comfy, asyncio.timeout(30):
        assert await comfy.wait(adopted, timeout=60)
        simulator.faults = Faults(frozen=True)
        prompt_id = await submitted(comfy)
        wait = asyncio.create_task(comfy.wait(prompt_id, timeout=60))
        await seen(comfy, prompt_id, Sighting.RUNNING)
        simulator.drop_sockets()
        simulator.faults = Faults()
        assert await wait


async def test_abandoning_a_server_ends_its_waits(simulator: Simulator, comfy: Comfy) -> None:
    simulator.render(60_000, 60_000)
    prompt_id = await submitted(comfy)
    wait = asyncio.create_task(comfy.wait(prompt_id, timeout=60))
    await seen(comfy, prompt_id, Sighting.RUNNING)
    comfy.abandon("it does not execute")
    with pytest.raises(BackendWedged, match="does not execute"):
        await wait


async def test_a_cancelled_wait_leaves_the_prompt_to_be_waited_for_again(
    simulator: Simulator, comfy: Comfy
) -> None:
    simulator.faults = Faults(frozen=True)
    prompt_id = await submitted(comfy)
    wait = asyncio.create_task(comfy.wait(prompt_id, timeout=60))
    await seen(comfy, prompt_id, Sighting.RUNNING)
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait
    simulator.faults = Faults()
    assert await comfy.wait(prompt_id, timeout=60)
