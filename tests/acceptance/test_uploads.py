"""A picture of a user's own, from its sending to what was made of it, through real processes that may die."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageChops

from acceptance.checker import uploads_and_rows
from acceptance.evidence import Evidence, Message, Witness
from acceptance.job_types import write_recolour
from acceptance.players import granted
from acceptance.settling import happened, settled, watching
from acceptance.system import System, running
from pictures import encoded, noise
from waiting import wait_until

LIFE = 8


@pytest.fixture(scope="module")
async def system(module_root: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    own = write_recolour(tmp_path_factory.mktemp("types") / "own")
    settings = {"FORGE_WORKFLOWS_DIR": str(own), "FORGE_ASSET_TTL_SECONDS": str(LIFE)}
    async with running(module_root, render_ms="20-50", **settings) as system:
        yield system


@pytest.fixture
async def witness(system: System) -> AsyncIterator[Witness]:
    async with watching(system) as witness:
        yield witness


@pytest.fixture
async def mei(system: System) -> AsyncIterator[httpx.AsyncClient]:
    async with system.client("mei") as client:
        yield client


async def sent(client: httpx.AsyncClient, data: bytes) -> dict[str, Any]:
    answer = await granted(client, "POST", "/uploads", files={"image": ("me.png", data)})
    assert answer.status_code in (200, 201), answer.text
    upload: dict[str, Any] = answer.json()
    return upload


async def asked(client: httpx.AsyncClient, upload: dict[str, Any]) -> str:
    body = {"job_type": "recolour", "params": {"picture": upload["id"]}, "ttl_seconds": 3600}
    answer = await granted(client, "POST", "/jobs", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def test_a_picture_comes_back_in_opposite_colours(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    image = noise(96, 64)
    job = await asked(mei, await sent(mei, encoded(image, "webp", lossless=True)))
    done = await happened(witness, "completed", job=job)
    view = (await mei.get(f"/jobs/{job}", params={"min_seq": done.seq})).json()
    made = await mei.get(view["assets"][0]["url"].removeprefix("/api/v1/comfyui"))
    with Image.open(io.BytesIO(made.content)) as found:
        assert found.convert("RGB").tobytes() == ImageChops.invert(image).tobytes()
    await settled(witness)


async def test_a_job_whose_upload_expired_while_it_waited_fails_for_good(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    system.kill("dispatcher")
    upload = await sent(mei, encoded(noise(seed=2)))
    job = await asked(mei, upload)

    async def said() -> bool:
        return any(
            e.type == "forge.upload.expired.v1" and e.data["upload_id"] == upload["id"]
            for e in await witness.events()
        )

    await wait_until(said, LIFE + 60, "the scheduler says that it expired", 0.1)
    system.start("dispatcher")
    failed = await happened(witness, "failed", job=job)
    assert (failed.data["code"], failed.data["attempt"]) == ("upload_gone", 1)
    gone = await mei.get(f"/uploads/{upload['id']}", params={"min_seq": failed.seq})
    assert gone.status_code == 404
    await settled(witness)


async def test_an_api_that_is_killed_while_it_receives_leaves_nothing_for_long(
    system: System, witness: Witness
) -> None:
    hang = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b'--cut\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        yield encoded(noise(seed=3))
        await hang.wait()
        yield b"the rest"

    before = len(await witness.events())
    async with system.client("mei") as client:
        kind = {"content-type": "multipart/form-data; boundary=cut"}
        sending = asyncio.create_task(client.post("/uploads", content=half(), headers=kind))
        await wait_until(witness.leftovers, 60, "the picture arrives")
        system.kill("api")
        hang.set()
        with contextlib.suppress(httpx.HTTPError):
            await sending
    system.start("api")
    await system.ready()
    await wait_until(lambda: not witness.leftovers(), 60, "the sweep removes its folder")
    assert [e for e in await witness.events() if e.seq > before and "stored" in e.type] == []
    await settled(witness)


async def test_an_upload_is_not_held_in_memory(system: System, mei: httpx.AsyncClient) -> None:
    """Ten mebibytes each, some at once: the API's highest mark hardly moves."""
    ten = encoded(noise()) + bytes(10 * 1024 * 1024 - 20_000)
    await asyncio.gather(sent(mei, ten), sent(mei, ten))  # whatever is there once, is there now
    pid = system.process("api").pid
    before = _reset(pid)
    async with system.client("lan") as lan:
        for _ in range(3):
            await asyncio.gather(*(sent(client, ten) for client in (mei, lan, mei, lan)))
    grown = _highest(pid) - before
    assert grown < 16 * 1024, f"{grown} KiB for 120 MiB of pictures"


def _reset(pid: int) -> int:
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _highest(pid)


def _highest(pid: int) -> int:
    """The most memory the process had at once since its mark was reset, KiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise AssertionError("the kernel does not tell")


def _evidence() -> Evidence:
    """One upload, all well."""
    digest = "ab" * 32
    path = f"uploads/ab/ab/{digest}.png"
    data = {"upload_id": "1", "file_path": path}
    stored = Message(1, "", {"ce-type": "forge.upload.stored.v1"}, data)
    return Evidence(events=[stored], uploads={"1": {"file_path": path}}, upload_files={path: digest})


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (lambda e: e.uploads.clear(), "the table"),
        (lambda e: e.upload_files.clear(), "has no file"),
        (lambda e: e.upload_files.update({next(iter(e.upload_files)): "cd" * 32}), "holds cdcd"),
        (lambda e: e.upload_files.update({"uploads/ef.png": "ef"}), "belongs to no upload"),
    ],
)
def test_the_checker_finds_what_is_planted(plant: Callable[[Evidence], None], found: str) -> None:
    evidence = _evidence()
    assert list(uploads_and_rows(evidence)) == []
    plant(evidence)
    assert any(found in wrong for wrong in uploads_and_rows(evidence))
