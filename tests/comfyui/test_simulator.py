"""The simulator's own life: starting, forgetting, dying, and the record that outlives it."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image

from comfyui.conformance.comfy_server import Server, flat
from forge.comfyui.simulator import Faults, Simulator, SimulatorOptions, faults_from
from forge.comfyui.simulator.pictures import Wish, draw
from forge.comfyui.simulator.worker import Worker
from forge.errors import SettingInvalid
from waiting import wait_until

Pair = tuple[Simulator, Server]


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Pair]:
    async with (
        Simulator(SimulatorOptions(**options)) as simulator,
        aiohttp.ClientSession(simulator.url) as session,
    ):
        yield simulator, Server(session, simulator.url, simulator.options.version, simulated=True)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with serving() as both:
        yield both


async def record_of(server: Server) -> dict[str, Any]:
    return dict((await server.ask("GET", "/simulator/record?events=1")).json)


# ---------------------------------------------------------------- forgetting and dying


async def test_forget_empties_memory_and_drops_sockets_without_a_close_frame(pair: Pair) -> None:
    simulator, server = pair
    done = await server.submit(flat("kept"))
    await server.over(done)
    left = simulator.folders.path("temp") / "left.png"
    left.write_bytes(b"x")
    simulator.render(60_000, 60_000)
    async with server.listen() as listener:
        running, waiting = await server.submit(flat("lost")), await server.submit(flat("lost"))
        await server.ask("POST", "/simulator/forget")
        while (await listener.socket.receive(timeout=10)).type is aiohttp.WSMsgType.TEXT:
            pass
        assert listener.socket.close_code == 1006
    assert [await server.history(prompt_id) for prompt_id in (done, running, waiting)] == [None] * 3
    assert await server.queue() == ([], [])
    simulator.render(0, 0)
    answer = await server.ask("POST", "/prompt", json={"prompt": flat("new")})
    assert answer.json["number"] == 0
    await server.over(answer.json["prompt_id"])
    assert (left.exists(), (simulator.output / "kept_00001_.png").exists()) == (False, True)


async def test_going_down_refuses_connections_for_a_while(pair: Pair) -> None:
    _, server = pair
    await server.ask("POST", "/simulator/forget", json={"down_ms": 1000})

    async def refused() -> bool:
        try:
            await server.ask("GET", "/prompt")
        except aiohttp.ClientConnectionError:
            return True
        return False

    async def answers() -> bool:
        return not await refused()

    await wait_until(refused, what="it is down")
    await wait_until(answers, what="it came back")


async def test_a_node_without_inputs_kills_the_worker_while_http_goes_on(
    pair: Pair,
) -> None:
    _, server = pair
    poison = await server.submit(flat("p") | {"99": {"class_type": "ImageInvert"}})
    behind = await server.submit(flat("p"))
    await server.interrupt(poison)
    assert (await server.ask("POST", f"/api/jobs/{poison}/cancel")).json == {"cancelled": True}
    assert await server.queue() == ([poison], [behind])
    assert (await server.ask("GET", "/system_stats")).status == 200


async def test_a_client_id_that_is_an_object_ends_the_process(pair: Pair) -> None:
    simulator, server = pair
    await server.ask("POST", "/prompt", json={"prompt": flat("p"), "client_id": {"a": 1}})
    await asyncio.wait_for(simulator.perished.wait(), 30)
    with pytest.raises(aiohttp.ClientConnectionError):
        await server.ask("GET", "/prompt")


async def test_a_socket_nobody_reads_stalls_everybody_until_it_is_gone(
    pair: Pair,
) -> None:
    _, server = pair
    chain = flat("deep")
    for step in range(3, 203):
        source = ["1" if step == 3 else str(step - 1), 0]
        chain[str(step)] = {"class_type": "ImageInvert", "inputs": {"image": source}}
    chain["2"]["inputs"]["images"] = ["202", 0]
    host, port = server.session._base_url.host, server.session._base_url.port  # type: ignore[union-attr]
    reader, writer = await asyncio.open_connection(host, port, limit=1024)
    writer.write(
        b"GET /ws?clientId=sloth HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    await reader.readline()
    async with server.listen(autoping=False) as listener:
        for prefix in ("one", "two"):  # 9 MB each: more than any kernel buffers
            chain["2"]["inputs"]["filename_prefix"] = prefix
            chain["1"]["inputs"]["color"] += 1
            await server.over(await server.submit(chain, client_id="sloth"))
        mine = await server.submit(flat("mine"), client_id=listener.client_id)
        await server.over(mine)
        assert mine not in str(await listener.heard_so_far())
        writer.transport.abort()
        await listener.until_over(mine)


# ---------------------------------------------------------------- the record


async def test_the_record_counts_what_was_present_and_executed(pair: Pair) -> None:
    _, server = pair
    async with server.busy() as blocker:
        waiting = [await server.submit(flat("w")) for _ in range(2)]
        dropped = await server.submit(flat("w"))
        await server.ask("POST", "/queue", json={"delete": [dropped]})
    for prompt_id in waiting:
        await server.over(prompt_id)
    record = await record_of(server)
    assert (record["max_present"], record["present"]) == (4, 0)
    assert record["executed"] == dict.fromkeys([blocker, *waiting], 1)
    assert record["submitted"].keys() == {blocker, *waiting, dropped}
    assert [event["event"] for event in record["events"] if event.get("prompt_id") == waiting[0]] == [
        "submitted",
        "started",
        "ended",
    ]
    ended = next(event for event in record["events"] if event["event"] == "ended" and event["outputs"])
    assert ended["outputs"]["2"]["images"][0]["filename"].startswith("w_")


def start_process(folder: Path) -> tuple[subprocess.Popen[str], str]:
    program = (
        "import sys; from pathlib import Path; from forge.comfyui.simulator import SimulatorOptions, run\n"
        "folder = Path(sys.argv[1])\n"
        "run(SimulatorOptions(output_dir=folder, record=folder / 'record.jsonl', render_ms=(60000, 60000)),\n"
        "    lambda url: print(url, flush=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


async def test_the_record_survives_kill_9(tmp_path: Path) -> None:
    process, url = await asyncio.to_thread(start_process, tmp_path)
    async with aiohttp.ClientSession(url) as session:
        server = Server(session, url, "0.27.0", simulated=True)
        ids = [await server.submit(flat("k")) for _ in range(3)]
        await wait_until(lambda: _runs(server, ids[0]), what="the first runs")
    process.kill()
    await asyncio.to_thread(process.wait)
    process.stdout.close()  # type: ignore[union-attr]
    async with serving(output_dir=tmp_path, record=tmp_path / "record.jsonl") as (_, server):
        again = await server.submit(flat("k"), prompt_id=ids[0])
        await server.over(again)
        record = await record_of(server)
    assert record["max_present"] == 3
    assert record["executed"] == {ids[0]: 2}
    assert [event["event"] for event in record["events"]].count("booted") == 2


async def _runs(server: Server, prompt_id: str) -> bool:
    return (await server.queue())[0] == [prompt_id]


async def test_a_half_written_line_at_the_end_of_a_record_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text('{"event":"submitted","at":1.0,"present":1,"prompt_id":"a"}\n{"event":"sub')
    async with serving(record=path) as (simulator, _):
        assert simulator.record.submitted == {"a": 1}
    async with serving(record=path) as (simulator, _):
        assert [event["event"] for event in simulator.record.events].count("booted") == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_run_serves_until_it_is_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    process, url = await asyncio.to_thread(start_process, tmp_path)
    async with aiohttp.ClientSession(url) as session, session.get("/prompt") as answer:
        assert answer.status == 200
    process.send_signal(number)
    assert await asyncio.to_thread(process.wait, 30) == 0
    process.stdout.close()  # type: ignore[union-attr]


# ---------------------------------------------------------------- durations and pictures


async def test_durations_lie_in_the_given_range_and_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    given, wait = list[float](), Worker._wait

    async def noted(worker: Worker, seconds: float) -> None:
        given.append(seconds)
        await wait(worker, seconds)

    monkeypatch.setattr(Worker, "_wait", noted)

    async def spent(seed: int) -> list[float]:
        given.clear()
        async with serving(render_ms=(20, 60), seed=seed) as (simulator, server):
            for number in range(3):
                await server.run(flat(f"d{number}"))
            times = {
                (e["event"], e["prompt_id"]): e["at"] for e in simulator.record.events if "prompt_id" in e
            }
            took = [times["ended", i] - times["started", i] for i in simulator.record.submitted]
        assert all(a > b - 0.001 for a, b in zip(took, given, strict=True))
        return [*given]

    first = await spent(1)
    assert all(0.02 <= seconds <= 0.06 for seconds in first)
    assert await spent(1) == first
    assert await spent(2) != first


async def test_trivial_prompts_cost_next_to_nothing(pair: Pair) -> None:
    _, server = pair
    count = 200
    async with server.listen() as listener:
        began = time.process_time()
        for number in range(count):
            last = await server.submit(flat(f"t/{number}/a"), client_id=listener.client_id)
            await listener.until_over(last)
        spent = time.process_time() - began
    assert spent / count < 0.02  # client included; 1 ms on a quiet machine, so only a disaster fails


def sampled(
    positive: str, seed: int, width: int = 256, height: int = 384, prefix: str = "s"
) -> dict[str, Any]:
    loader = {"ckpt_name": "tiny-random-sd15.safetensors"}
    sampler = {
        "seed": seed,
        "steps": 5,
        "cfg": 7.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    size = {"width": 256, "height": 384, "batch_size": 1}
    return {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": loader},
        "5": {"class_type": "EmptyLatentImage", "inputs": size},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": positive, "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
        "3": {"class_type": "KSampler", "inputs": sampler | links},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "s"}},
    }


async def test_a_sampler_graph_becomes_a_drawing_and_tells_its_steps(pair: Pair) -> None:
    simulator, server = pair
    simulator.render(600, 600)
    async with server.listen() as listener:
        prompt_id = await server.submit(sampled("fire portrait", 7), client_id=listener.client_id)
        heard = await listener.until_over(prompt_id)
    steps = [m["data"]["value"] for m in heard if m["type"] == "progress"]
    assert (steps[0], steps[-1]) == (1, 5)
    assert steps == sorted(set(steps))
    assert {m["data"]["max"] for m in heard if m["type"] == "progress"} == {5}
    picture = Image.open(io.BytesIO((simulator.output / "s_00001_.png").read_bytes()))
    assert picture.size == (256, 384)
    assert set(picture.info) == {"prompt"}


async def preview_frames(server: Server, *, flags: bool) -> list[bytes]:
    async with server.listen() as listener:
        if flags:
            told = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            await listener.socket.send_json(told)
            await listener.until("feature_flags")
        prompt_id = await server.submit(
            sampled("fire portrait", 7 + flags),
            client_id=listener.client_id,
            extra_data={"preview_method": "latent2rgb"},
        )
        await server.over(prompt_id)
        frames = []
        while (received := await listener.socket.receive(timeout=10)).data.find(
            '"executing", "data": {"node": null' if received.type is aiohttp.WSMsgType.TEXT else b"never"
        ) < 0:
            if received.type is aiohttp.WSMsgType.BINARY:
                frames.append(received.data)
        return frames


async def test_previews_come_as_type_1_or_to_those_who_can_as_type_4(pair: Pair) -> None:
    _, server = pair
    plain, modern = await preview_frames(server, flags=False), await preview_frames(server, flags=True)
    assert [len(frames) for frames in (plain, modern)] == [5, 5]
    assert {frame[:8] for frame in plain} == {struct.pack(">II", 1, 1)}
    assert Image.open(io.BytesIO(plain[0][8:])).size == (256, 384)
    kind, length = struct.unpack(">II", modern[0][:8])
    facts = json.loads(modern[0][8 : 8 + length])
    assert (kind, facts["node_id"], facts["image_type"]) == (4, "3", "image/jpeg")
    assert Image.open(io.BytesIO(modern[0][8 + length :])).format == "JPEG"


async def test_a_seed_changes_the_sampler_and_what_follows_only(pair: Pair) -> None:
    _, server = pair
    await server.run(sampled("fire portrait", 7))
    entry = await server.run(sampled("fire portrait", 8))
    assert sorted(entry["status"]["messages"][1][1]["nodes"]) == ["4", "5", "6", "7"]


async def test_another_device_draws_the_same_wish_in_other_pixels(pair: Pair) -> None:
    simulator, server = pair

    async def drawn(seed: int) -> bytes:
        image = (await server.run(sampled("fire portrait", seed)))["outputs"]["9"]["images"][0]
        return (await server.ask("GET", "/view", params=image)).body

    here = await drawn(7)
    await drawn(8)  # the cache forgets the first
    simulator.faults = Faults(other_device=True)
    there = await drawn(7)
    assert pixels(here) != pixels(there)
    await drawn(8)
    simulator.faults = Faults()
    assert pixels(await drawn(7)) == pixels(here)


def pixels(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


PROMPTS = {
    "portrait": ("portrait of a water sect maiden", 128, 192),
    "bust": ("npc bust, angry old general, metal armor", 160, 160),
    "card": ("fate card: the tower of lightning", 128, 192),
    "icon": ("ui icon, sword emblem, ice", 96, 96),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_wish_decides_every_pixel(kind: str) -> None:
    text, width, height = PROMPTS[kind]
    assert draw(Wish(text, "", 1, width, height)).size == (width, height)

    def drawing(prompt: str, seed: int) -> bytes:
        above_the_text = (0, 0, width, height * 7 // 10)
        return draw(Wish(prompt, "", seed, width, height)).crop(above_the_text).tobytes()

    first = drawing(text, 1)
    assert first == drawing(text, 1)
    assert len({first, *(drawing(text, seed) for seed in range(2, 7))}) == 6
    assert first != drawing(f"{text}, smiling", 1)


@pytest.mark.parametrize(("element", "strongest"), [("fire", 0), ("water", 2), ("wood", 1)])
def test_the_element_decides_the_colours(element: str, strongest: int) -> None:
    picture = draw(Wish(f"portrait, {element}", "", 3, 128, 192))
    means = picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert isinstance(means, tuple)
    assert max(range(3), key=means.__getitem__) == strongest


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (1536, 640)])
@pytest.mark.parametrize("text", ["", "仙 portrait of a jade immortal " * 20, "fate card", "icon", "bust"])
def test_any_size_and_text_can_be_drawn(size: tuple[int, int], text: str) -> None:
    assert draw(Wish(text, "", 0, *size)).size == size


# ---------------------------------------------------------------- options


def test_faults_are_read_as_a_command_line_names_them() -> None:
    assert faults_from(["frozen", "fail_next=3", "hostile=html", "noise=false"]) == Faults(
        frozen=True, fail_next=3, hostile="html"
    )
    for wrong in ("nonsense=1", "fail_next=many", "hostile=cake"):
        with pytest.raises(SettingInvalid):
            faults_from([wrong])


async def test_a_given_folder_is_used_and_kept(tmp_path: Path) -> None:
    async with serving(output_dir=tmp_path) as (simulator, server):
        await server.run(flat("sub/a"))
        assert simulator.output == tmp_path / "output"
    assert (tmp_path / "output" / "sub" / "a_00001_.png").is_file()
    assert all((tmp_path / kind).is_dir() for kind in ("output", "input", "temp"))


async def test_a_folder_of_its_own_is_removed_at_the_end() -> None:
    async with serving() as (simulator, _):
        base = simulator.folders.base
        assert base.is_dir()
    assert not base.is_dir()
