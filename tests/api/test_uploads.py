"""Sending a picture of one's own: what is taken, what it becomes, who may see and use it."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest

from acceptance.job_types import write_recolour
from api.serving import ROOT, Serve, Served
from api.test_edges import is_problem
from forge.api import uploads as route
from forge.settings import Settings
from pictures import encoded, noise, with_text
from waiting import wait_until

SHAPE = "id user_id content_hash format file_size_bytes width height url created_at expires_at seq"


def form(data: bytes, name: str = "me.png", field: str = "image", kind: str = "image/png") -> dict[str, Any]:
    return {"files": {field: (name, data, kind)}}


async def sent(client: httpx.AsyncClient, data: bytes) -> dict[str, Any]:
    answer = await client.post("/uploads", **form(data))
    assert answer.status_code in (200, 201), answer.text
    upload: dict[str, Any] = answer.json()
    return upload


def files(served: Served) -> list[Path]:
    return [path for path in (served.parts.blobs.root / "uploads").rglob("*") if path.is_file()]


def left_in_tmp(served: Served) -> list[Path]:
    return list((served.parts.blobs.root / "tmp").iterdir())


async def forget(served: Served, upload: dict[str, Any]) -> None:
    """Let its time be up, and say so."""
    far = datetime.now(UTC) + timedelta(days=30)
    assert await served.parts.uploads.expire(upload["user_id"], upload["id"], far, actor="test")


# --------------------------------------------------------------------- sending


async def test_a_picture_becomes_an_upload(served: Served, mei: httpx.AsyncClient) -> None:
    answer = await mei.post("/uploads", **form(with_text(noise(80, 60), "a secret")))
    upload = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (201, f"{ROOT}/uploads/{upload['id']}")
    assert set(upload) >= set(SHAPE.split())
    assert (upload["width"], upload["height"], upload["format"], upload["user_id"]) == (80, 60, "png", "mei")

    [path] = files(served)
    digest = upload["content_hash"]
    assert path == served.parts.blobs.root / "uploads" / digest[:2] / digest[2:4] / f"{digest}.png"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert b"secret" not in path.read_bytes()
    assert left_in_tmp(served) == []

    one = await mei.get(f"/uploads/{upload['id']}", params={"min_seq": upload["seq"]})
    assert one.json() == upload
    file = await mei.get(f"/uploads/{upload['id']}/file")
    assert (file.content, file.headers["content-type"]) == (path.read_bytes(), "image/png")
    assert file.headers["etag"] == f'"{digest}"'
    assert "sandbox" in file.headers["content-security-policy"]


@pytest.mark.parametrize("fmt", ["png", "jpeg", "webp"])
async def test_the_content_decides_and_not_what_is_said_of_it(
    mei: httpx.AsyncClient, served: Served, fmt: str
) -> None:
    said = form(encoded(noise(), fmt), "../../etc/pass\\wd.exe", "file", "text/html")
    upload = await mei.post("/uploads", **said)
    assert upload.status_code == 201, upload.text
    assert upload.json()["format"] == "png"
    assert [path.suffix for path in files(served)] == [".png"]


async def test_a_life_is_as_long_as_an_assets(served: Served, mei: httpx.AsyncClient) -> None:
    upload = await sent(mei, encoded(noise()))
    life = datetime.fromisoformat(upload["expires_at"]) - datetime.fromisoformat(upload["created_at"])
    assert life.total_seconds() == served.parts.settings.asset_ttl_seconds


async def test_the_same_picture_again_is_the_same_upload(served: Served, mei: httpx.AsyncClient) -> None:
    image = noise()
    first = await mei.post("/uploads", **form(encoded(image)))
    again = await mei.post("/uploads", **form(encoded(image, "webp", lossless=True)))
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert await served.parts.store.head() == 1, "nothing happened that the log should tell"


async def test_the_same_picture_at_once_is_one_upload(served: Served, serve: Serve) -> None:
    other = await serve(projecting=False)
    async with served.client("mei") as one, other.client("mei") as two:
        answers = await asyncio.gather(
            *(c.post("/uploads", **form(encoded(noise()))) for c in (one, two) * 3)
        )
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert await served.parts.store.head() == 1
    assert len(files(served)) == 1
    assert left_in_tmp(served) == []


async def test_two_users_with_one_picture_share_the_file_only(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient
) -> None:
    mine, theirs = await sent(mei, encoded(noise())), await sent(lan, encoded(noise()))
    assert mine["id"] != theirs["id"]
    assert mine["content_hash"] == theirs["content_hash"]
    assert len(files(served)) == 1


async def test_an_upload_that_expired_can_be_sent_again(served: Served, mei: httpx.AsyncClient) -> None:
    upload = await sent(mei, encoded(noise()))
    await forget(served, upload)
    is_problem(await mei.get(f"/uploads/{upload['id']}", params={"min_seq": 2}), 404)
    again = await mei.post("/uploads", **form(encoded(noise())))
    assert (again.status_code, again.json()["id"]) == (201, upload["id"])
    assert (await mei.get(f"/uploads/{upload['id']}")).status_code == 200


async def test_another_users_upload_does_not_exist(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    upload = await sent(mei, encoded(noise()))
    for path in (f"/uploads/{upload['id']}", f"/uploads/{upload['id']}/file"):
        nobodys = is_problem(await lan.get(path.replace(upload["id"], str(uuid4()))), 404)
        another = is_problem(await lan.get(path), 404)
        assert {**another, "detail": ""} == {**nobodys, "detail": ""}
        assert (await operator.get(path)).status_code == 200


async def test_sending_needs_no_tables(serve: Serve, settings: Settings) -> None:
    served = await serve(projecting=False)
    served.parts.pool.terminate()  # Postgres is gone
    async with served.client("mei") as client:
        assert (await client.post("/uploads", **form(encoded(noise())))).status_code == 201


async def test_too_many_at_once_are_told_to_come_again(served: Served, mei: httpx.AsyncClient) -> None:
    def dribble(gate: asyncio.Event) -> Any:
        async def body() -> Any:
            yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
            await gate.wait()
            yield b"nonsense\r\n--x--\r\n"

        return {"content": body(), "headers": {"content-type": "multipart/form-data; boundary=x"}}

    gate = asyncio.Event()
    held = [asyncio.create_task(mei.post("/uploads", **dribble(gate))) for _ in range(route.MOST_OF_A_USER)]
    await wait_until(lambda: len(left_in_tmp(served)) == route.MOST_OF_A_USER, what="all are in hand")
    refused = await mei.post("/uploads", **form(encoded(noise())))
    problem = is_problem(refused, 429, "limit_reached")
    assert problem["limit"]["name"] == "concurrent_uploads"
    assert refused.headers["retry-after"]
    async with served.client("lan") as other:
        assert (await other.post("/uploads", **form(encoded(noise())))).status_code == 201
    gate.set()
    for answer in await asyncio.gather(*held):
        is_problem(answer, 422, "picture_refused")
    assert (await mei.post("/uploads", **form(encoded(noise())))).status_code == 201


# ----------------------------------------------------------------------- using


@pytest.fixture
async def with_images(serve: Serve, settings: Settings, tmp_path: Path) -> Served:
    """An API with a job type that takes a picture."""
    folder = write_recolour(tmp_path / "job types")
    return await serve(with_settings=msgspec.structs.replace(settings, workflows_dir=folder))


def recolour(upload_id: str | None) -> dict[str, Any]:
    return {"job_type": "recolour", "params": {"picture": upload_id}}


async def test_an_upload_is_what_an_image_param_takes(with_images: Served) -> None:
    async with with_images.client("mei") as mei, with_images.client("lan") as lan:
        upload = await sent(mei, encoded(noise()))
        job = await mei.post("/jobs", json=recolour(upload["id"]))
        assert (job.status_code, job.json()["params"]["picture"]) == (202, upload["id"])
        for who, what in ((mei, str(uuid4())), (lan, upload["id"])):
            problem = is_problem(await who.post("/jobs", json=recolour(what)), 422, "invalid")
            assert [error["field"] for error in problem["errors"]] == ["params.picture"]
            assert "no such upload" in problem["errors"][0]["message"]
        assert is_problem(await mei.post("/jobs", json=recolour("me.png")), 422)
        batch = {"jobs": [recolour(upload["id"]), recolour(str(uuid4()))]}
        problem = is_problem(await mei.post("/batch", json=batch), 422)
        assert [error["field"] for error in problem["errors"]] == ["jobs[1].params.picture"]
        assert with_images.parts.admissions.line.pending == 1, "all or none"


async def test_an_upload_that_expired_is_not_taken_but_a_key_still_names_its_job(with_images: Served) -> None:
    async with with_images.client("mei") as mei:
        upload = await sent(mei, encoded(noise()))
        key = {"Idempotency-Key": "once"}
        job = (await mei.post("/jobs", json=recolour(upload["id"]), headers=key)).json()
        await forget(with_images, upload)
        is_problem(await mei.post("/jobs", json=recolour(upload["id"])), 422)
        again = await mei.post("/jobs", json=recolour(upload["id"]), headers=key)
        assert (again.status_code, again.json()["id"]) == (202, job["id"])


async def test_an_upload_can_be_used_while_the_tables_are_away(
    serve: Serve, settings: Settings, tmp_path: Path
) -> None:
    folder = write_recolour(tmp_path / "job types")
    served = await serve(
        projecting=False, with_settings=msgspec.structs.replace(settings, workflows_dir=folder)
    )
    served.parts.pool.terminate()
    async with served.client("mei") as mei:
        upload = await sent(mei, encoded(noise()))
        assert (await mei.post("/jobs", json=recolour(upload["id"]))).status_code == 202
        is_problem(await mei.post("/jobs", json=recolour(str(uuid4()))), 422)


async def test_use_keeps_an_upload_alive(serve: Serve, settings: Settings, tmp_path: Path) -> None:
    folder = write_recolour(tmp_path / "job types")
    short = msgspec.structs.replace(settings, workflows_dir=folder, asset_ttl_seconds=1)
    served = await serve(with_settings=short)
    async with served.client("mei") as mei:
        upload = await sent(mei, encoded(noise()))
        until = datetime.fromisoformat(upload["expires_at"])

        async def renewed() -> bool:
            seq = (await mei.post("/jobs", json=recolour(upload["id"]))).json()["seq"]
            now = await mei.get(f"/uploads/{upload['id']}", params={"min_seq": seq})
            return datetime.fromisoformat(now.json()["expires_at"]) > until

        await wait_until(renewed, what="a use far enough from the last one lengthens its life", interval=0.15)


# ------------------------------------------------------------------- documented


async def test_sending_is_documented_as_a_form(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.base_url) as client:
        document = (await client.get("/openapi.json")).json()
    operation = document["paths"][f"{ROOT}/uploads"]["post"]
    schema = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert schema["properties"]["image"]["format"] == "binary"
    assert {"200", "201", "400", "408", "413", "415", "422", "429", "503"} <= set(operation["responses"])
    assert f"{ROOT}/uploads/{{upload_id}}" in document["paths"]
