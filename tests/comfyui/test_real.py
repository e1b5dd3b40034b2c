"""The client's whole contract, on the simulator and, where FORGE_TEST_COMFYUI_URL is set, on a real one."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from PIL import Image

from comfyui.conformance.comfy_server import HOUR_MS, PATIENCE, Server, flat, slow
from forge.comfyui.client import Comfy
from forge.comfyui.patience import Patience
from forge.comfyui.protocol import Output, Progress, Sighting
from forge.errors import (
    PictureRefused,
    PromptFailed,
    PromptInterrupted,
    PromptLost,
    PromptRejected,
    PromptTimedOut,
)
from waiting import wait_until

QUICK = Patience(poll=(0.3, 0.5), settle=0.1, unreachable=120.0, health_timeout=10.0)
SOCKET_ALONE = msgspec.structs.replace(QUICK, poll=(60.0, 60.0))
RESTART = os.environ.get("FORGE_TEST_COMFYUI_RESTART")
CHECKPOINT = os.environ.get("FORGE_TEST_COMFYUI_CHECKPOINT")


@pytest.fixture
async def comfy(server: Server) -> AsyncIterator[Comfy]:
    async with Comfy(server.url, QUICK) as client:
        yield client


async def submitted(comfy: Comfy, color: int | None = None) -> UUID:
    prompt_id = uuid4()
    await comfy.submit(prompt_id, flat(f"forge/{prompt_id}/img", color), outputs=["2"])
    return prompt_id


async def submitted_slow(server: Server, comfy: Comfy) -> UUID:
    """One that runs until it is stopped, whose preview is wanted; it runs on return."""
    await server.render(HOUR_MS)
    prompt_id = uuid4()
    await comfy.submit(prompt_id, slow(), outputs=["41"])
    await seen(comfy, prompt_id, Sighting.RUNNING)
    await server.render(0)
    return prompt_id


async def seen(comfy: Comfy, prompt_id: UUID, sighting: Sighting) -> None:
    async def found() -> bool:
        return await comfy.look(prompt_id) is sighting

    await wait_until(found, PATIENCE, f"{prompt_id} is {sighting}")


async def whole(comfy: Comfy, output: Output, max_bytes: int = 1 << 20) -> bytes:
    return b"".join([chunk async for chunk in comfy.fetch(output, max_bytes=max_bytes)])


def pixel(data: bytes) -> tuple[tuple[int, int], Any]:
    with Image.open(io.BytesIO(data)) as picture:
        return picture.size, picture.convert("RGB").getpixel((5, 5))


# Submit, wait, fetch, forget


async def test_a_submitted_prompt_becomes_a_picture_and_is_forgotten(comfy: Comfy) -> None:
    prompt_id = await submitted(comfy, 0x3366CC)
    runs: list[str] = []
    outputs = await comfy.wait(prompt_id, timeout=PATIENCE, on_running=lambda: runs.append("running"))
    assert outputs == [Output("2", "img_00001_.png", f"forge/{prompt_id}", "output")]
    assert runs == ["running"]
    data = await whole(comfy, outputs[0])
    assert pixel(data) == ((64, 64), (0x33, 0x66, 0xCC))
    with pytest.raises(PictureRefused):
        await whole(comfy, outputs[0], max_bytes=len(data) - 1)
    assert await comfy.look(prompt_id) is Sighting.SUCCEEDED
    await comfy.forget(prompt_id)
    assert await comfy.look(prompt_id) is Sighting.ABSENT
    assert await whole(comfy, outputs[0]) == data


async def test_the_socket_alone_ends_the_wait_at_once(server: Server) -> None:
    async with Comfy(server.url, SOCKET_ALONE) as comfy:
        assert await comfy.wait(await submitted(comfy), timeout=PATIENCE)  # the socket is open by now
        began = time.monotonic()
        for _ in range(5):
            assert await comfy.wait(await submitted(comfy), timeout=PATIENCE)
        assert time.monotonic() - began < SOCKET_ALONE.poll[0] / 2


async def test_many_prompts_each_get_their_own_picture(comfy: Comfy) -> None:
    colors = [0x100000 + number for number in range(12)]
    prompts = await asyncio.gather(*(submitted(comfy, color) for color in colors))
    found = await asyncio.gather(*(comfy.wait(prompt_id, timeout=PATIENCE) for prompt_id in prompts))
    assert [[file.subfolder for file in files] for files in found] == [[f"forge/{each}"] for each in prompts]
    drawn = [pixel(await whole(comfy, files[0]))[1] for files in found]
    assert drawn == [(0x10, 0, number) for number in range(12)]


async def test_a_batch_is_as_many_pictures(comfy: Comfy) -> None:
    prompt_id = uuid4()
    await comfy.submit(prompt_id, flat(f"forge/{prompt_id}/img", batch_size=3), outputs=["2"])
    outputs = await comfy.wait(prompt_id, timeout=PATIENCE)
    assert [file.filename for file in outputs] == [f"img_0000{number}_.png" for number in (1, 2, 3)]


async def test_an_uploaded_picture_can_be_drawn_from(comfy: Comfy) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), (200, 10, 90)).save(buffer, "PNG")
    name = await comfy.upload(f"{uuid4()}.png", buffer.getvalue())
    assert await comfy.upload(name.removeprefix("forge/"), buffer.getvalue()) == name
    prompt_id = uuid4()
    save = {"images": ["1", 0], "filename_prefix": f"forge/{prompt_id}/img"}
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "SaveImage", "inputs": save},
    }
    await comfy.submit(prompt_id, graph, outputs=["2"])
    outputs = await comfy.wait(prompt_id, timeout=PATIENCE)
    assert pixel(await whole(comfy, outputs[0])) == ((48, 32), (200, 10, 90))


async def test_a_sampler_tells_its_progress(server: Server) -> None:
    checkpoint = "tiny-random-sd15.safetensors" if server.simulated else CHECKPOINT
    if checkpoint is None:
        pytest.skip("needs FORGE_TEST_COMFYUI_CHECKPOINT")
    prompt_id = uuid4()
    told: list[Progress] = []
    async with Comfy(server.url, SOCKET_ALONE) as comfy:
        assert await comfy.wait(await submitted(comfy), timeout=PATIENCE)  # the socket is open by now
        await server.render(300)  # of a prompt that takes no time nobody may hear before its end
        await comfy.submit(prompt_id, sampled(checkpoint, f"forge/{prompt_id}/img"), outputs=["7"])
        outputs = await comfy.wait(prompt_id, timeout=PATIENCE * 1.5, on_progress=told.append)
        assert told == sorted(told, key=lambda progress: progress.value)
        assert told[-1] == Progress(3, 3, "5")
        assert pixel(await whole(comfy, outputs[0]))[0] == (64, 64)


def sampled(checkpoint: str, prefix: str) -> dict[str, Any]:
    """The classic graph: loader, two texts, latent, sampler, decoder, save."""
    sampler = {"seed": 1, "steps": 3, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
    links = {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a miller"}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "blurry"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "KSampler", "inputs": {"denoise": 1.0, **sampler, **links}},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": prefix}},
    }


async def test_health_tells_version_and_queue(server: Server, comfy: Comfy) -> None:
    async with server.busy() as blocker:
        health = await comfy.health()
        assert (health.reachable, health.version, health.queue_remaining) == (True, server.version, 1)
        assert await comfy.running() == [blocker]


# What cannot be drawn


async def test_a_class_the_server_lacks_is_rejected(comfy: Comfy) -> None:
    prompt_id = uuid4()
    graph = flat("forge/none")
    graph["1"]["class_type"] = "NoSuchNode"
    with pytest.raises(PromptRejected, match="NoSuchNode"):
        await comfy.submit(prompt_id, graph, outputs=["2"])
    assert await comfy.look(prompt_id) is Sighting.ABSENT


async def test_a_value_out_of_bounds_is_rejected_with_the_node(comfy: Comfy) -> None:
    with pytest.raises(PromptRejected, match=r"node 1 \(EmptyImage\): .*width") as caught:
        await comfy.submit(uuid4(), flat("forge/none", width=-1), outputs=["2"])
    assert "1" in caught.value.node_errors


async def test_half_a_graph_is_cancelled_and_rejected(server: Server, comfy: Comfy) -> None:
    prompt_id = uuid4()
    graph = flat(f"forge/{prompt_id}/img")
    graph["3"] = {"class_type": "SaveImage", "inputs": {"filename_prefix": "forge/none"}}
    async with server.busy() as blocker:
        with pytest.raises(PromptRejected, match=r"node 3 \(SaveImage\): .*images") as caught:
            await comfy.submit(prompt_id, graph, outputs=["2", "3"])
        assert list(caught.value.node_errors) == ["3"]
        assert await server.queue() == ([blocker], [])


async def test_a_node_that_raises_fails_the_prompt(comfy: Comfy) -> None:
    prompt_id = uuid4()
    await comfy.submit(prompt_id, flat("../../evil"), outputs=["2"])
    with pytest.raises(PromptFailed, match=r"node 2 \(SaveImage\): .*outside the output folder"):
        await comfy.wait(prompt_id, timeout=PATIENCE)


async def test_names_from_the_cache_are_not_results(comfy: Comfy, space: str) -> None:
    graph = flat(f"{space}/img")
    first, second = uuid4(), uuid4()
    await comfy.submit(first, graph, outputs=["2"])
    await comfy.wait(first, timeout=PATIENCE)
    await comfy.submit(second, graph, outputs=["2"])
    with pytest.raises(PromptLost, match="cache"):
        await comfy.wait(second, timeout=PATIENCE)


async def test_a_file_that_is_gone_is_lost_and_a_bad_name_refused(comfy: Comfy) -> None:
    with pytest.raises(PromptLost):
        await whole(comfy, Output("2", "gone_00001_.png", "forge", "output"))
    with pytest.raises(PictureRefused):
        await whole(comfy, Output("2", "a..b.png", "", "output"))


# Cancelling


async def test_a_pending_prompt_is_cancelled_and_nothing_else(server: Server, comfy: Comfy) -> None:
    async with server.busy() as blocker:
        pending, behind = await submitted(comfy), await submitted(comfy)
        wait = asyncio.create_task(comfy.wait(pending, timeout=PATIENCE))
        assert await comfy.look(pending) is Sighting.PENDING
        await comfy.cancel(pending)
        with pytest.raises(PromptInterrupted):
            await wait
        assert await comfy.look(pending) is Sighting.ABSENT
        assert await server.queue() == ([blocker], [str(behind)])
    assert await comfy.wait(behind, timeout=PATIENCE)


async def test_a_running_prompt_is_cancelled_and_nothing_else(server: Server, comfy: Comfy) -> None:
    running = await submitted_slow(server, comfy)
    pending = await submitted(comfy)
    wait = asyncio.create_task(comfy.wait(running, timeout=600))
    await comfy.cancel(running)
    assert await comfy.look(running) is Sighting.INTERRUPTED
    with pytest.raises(PromptInterrupted):
        await wait
    assert await comfy.wait(pending, timeout=PATIENCE)


async def test_cancelling_what_is_over_or_unknown_is_harmless(comfy: Comfy) -> None:
    prompt_id = await submitted(comfy)
    await comfy.wait(prompt_id, timeout=PATIENCE)
    await comfy.cancel(prompt_id)
    await comfy.cancel(uuid4())
    assert await comfy.look(prompt_id) is Sighting.SUCCEEDED
    assert await comfy.wait(await submitted(comfy), timeout=PATIENCE)


async def test_what_runs_too_long_times_out_and_can_be_cancelled(server: Server, comfy: Comfy) -> None:
    running = await submitted_slow(server, comfy)
    with pytest.raises(PromptTimedOut, match="running"):
        await comfy.wait(running, timeout=0.2)
    await comfy.cancel(running)
    assert await comfy.running() == []


# Adoption


async def test_somebody_elses_prompt_is_adopted_while_it_waits(server: Server, comfy: Comfy) -> None:
    async with server.busy():
        async with Comfy(server.url, QUICK) as dead:
            prompt_id = await submitted(dead)
        runs: list[str] = []
        wait = asyncio.create_task(
            comfy.wait(prompt_id, timeout=PATIENCE, on_running=lambda: runs.append("running"))
        )
        assert await comfy.look(prompt_id) is Sighting.PENDING
        assert not wait.done()
    outputs = await wait
    assert [file.subfolder for file in outputs] == [f"forge/{prompt_id}"]
    assert runs == ["running"]


async def test_somebody_elses_prompt_is_adopted_when_it_is_over(server: Server, comfy: Comfy) -> None:
    async with Comfy(server.url, QUICK) as dead:
        prompt_id = await submitted(dead)
        outputs = await dead.wait(prompt_id, timeout=PATIENCE)
    assert await comfy.wait(prompt_id, timeout=PATIENCE) == outputs


# What the server forgot


async def test_what_nobody_knows_is_lost(comfy: Comfy) -> None:
    with pytest.raises(PromptLost):
        await comfy.wait(uuid4(), timeout=PATIENCE)


async def test_what_somebody_deletes_from_the_queue_is_lost(server: Server, comfy: Comfy) -> None:
    async with server.busy():
        pending = await submitted(comfy)
        wait = asyncio.create_task(comfy.wait(pending, timeout=PATIENCE))
        await server.ask("POST", "/queue", json={"delete": [str(pending)]})
        with pytest.raises(PromptLost):
            await wait


async def test_what_a_killed_server_forgot_is_lost_and_the_client_goes_on(
    server: Server, comfy: Comfy
) -> None:
    if not server.simulated and RESTART is None:
        pytest.skip("needs FORGE_TEST_COMFYUI_RESTART")
    running = await submitted_slow(server, comfy)
    pending = await submitted(comfy)
    waits = [asyncio.create_task(comfy.wait(each, timeout=600)) for each in (running, pending)]
    await restart(server)
    for wait in waits:
        with pytest.raises(PromptLost):
            await wait
    assert await comfy.wait(await submitted(comfy), timeout=PATIENCE)


async def restart(server: Server) -> None:
    """Kill it and start it again; it need not answer yet on return."""
    if server.simulated:
        await server.ask("POST", "/simulator/forget", json={"down_ms": 300})
        return
    assert RESTART is not None
    process = await asyncio.create_subprocess_shell(RESTART)
    assert await process.wait() == 0
