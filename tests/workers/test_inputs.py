"""A picture of a user's own on its way to ComfyUI: our names, the attempt's folder, one slot of the graph."""

from __future__ import annotations

import copy
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from acceptance.job_types import write_recolour
from factories import submitted
from forge.comfyui import workflows
from forge.comfyui.client import Comfy
from forge.comfyui.simulator import Simulator, SimulatorOptions
from forge.comfyui.workflows import Workflow
from forge.domain.uploads import Upload
from forge.errors import StoreFailed, UploadGone
from forge.eventstore import EventStore
from forge.store import Store
from forge.uploads import Uploads
from forge.workers import inputs
from workers.test_uploads import file, sent, soon

FOLDER = "forge/0199c0de-0000-7000-8000-000000000001/2"


@pytest.fixture
async def simulator() -> AsyncIterator[Simulator]:
    async with Simulator(SimulatorOptions()) as running:
        yield running


@pytest.fixture
async def comfy(simulator: Simulator) -> AsyncIterator[Comfy]:
    async with Comfy(simulator.url) as client:
        yield client


@pytest.fixture
def uploads(events: EventStore) -> Uploads:
    return Uploads(events)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = Store(tmp_path / "store")
    opened.open()
    return opened


@pytest.fixture
def recolour(tmp_path: Path) -> Workflow:
    return workflows.load(write_recolour(tmp_path / "own"))["recolour"]


def asking(upload: Upload, user: str = "mei") -> Any:
    return submitted(user=user, job_type="recolour", params={"picture": str(upload.id)})


async def test_only_the_declared_slot_of_the_graph_changes(
    simulator: Simulator, comfy: Comfy, uploads: Uploads, store: Store, recolour: Workflow
) -> None:
    upload = await sent(uploads, store)
    request = asking(upload)
    images = await inputs.send(comfy, uploads, store, recolour, request, FOLDER)
    assert images == {"picture": f"{FOLDER}/picture.png"}
    at_comfyui = simulator.folders.path("input") / FOLDER / "picture.png"
    assert at_comfyui.read_bytes() == file(store, upload).read_bytes()

    expected = copy.deepcopy(recolour.graph)
    expected["1"]["inputs"]["image"] = f"{FOLDER}/picture.png"
    expected["3"]["inputs"]["filename_prefix"] = "x"
    assert workflows.render(recolour, request.params, filename_prefix="x", images=images) == expected


async def test_the_name_is_the_one_comfyui_gives(
    simulator: Simulator, comfy: Comfy, uploads: Uploads, store: Store, recolour: Workflow
) -> None:
    taken = simulator.folders.path("input") / FOLDER / "picture.png"
    taken.parent.mkdir(parents=True)
    taken.write_bytes(b"another")
    images = await inputs.send(comfy, uploads, store, recolour, asking(await sent(uploads, store)), FOLDER)
    assert images == {"picture": f"{FOLDER}/picture (1).png"}


async def test_an_upload_that_is_gone_is_not_sent(
    simulator: Simulator, comfy: Comfy, uploads: Uploads, store: Store, recolour: Workflow
) -> None:
    upload = await sent(uploads, store)
    with pytest.raises(UploadGone):  # lan has no such upload, whatever the request was checked for
        await inputs.send(comfy, uploads, store, recolour, asking(upload, "lan"), FOLDER)
    assert await uploads.expire("mei", upload.id, soon(10**6), actor="scheduler")
    with pytest.raises(UploadGone):
        await inputs.send(comfy, uploads, store, recolour, asking(upload), FOLDER)
    assert list(simulator.folders.path("input").rglob("*.png")) == []


async def test_a_file_that_is_missing_is_the_volumes_fault(
    comfy: Comfy, uploads: Uploads, store: Store, recolour: Workflow
) -> None:
    upload = await sent(uploads, store)
    shutil.rmtree(store.root / "uploads")
    with pytest.raises(StoreFailed):
        await inputs.send(comfy, uploads, store, recolour, asking(upload), FOLDER)
