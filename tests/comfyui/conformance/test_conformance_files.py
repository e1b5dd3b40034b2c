"""File names, /view and uploads."""

from __future__ import annotations

import io
import json
import os
from typing import Any

import aiohttp
import pytest
from PIL import Image

from comfyui.conformance.comfy_server import Server, flat, recorded

VIEWS = recorded("view")


def png(mode: str, colour: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (16, 16), colour).save(buffer, "PNG")
    return buffer.getvalue()


BYTES = {"A": png("RGBA", (1, 2, 3, 40)), "B": png("RGBA", (9, 9, 9, 90)), "C": png("RGBA", (5, 6, 7, 80))}
VIEWED = {
    "top.png": png("RGB", "red"),
    "vw/rgba.png": BYTES["A"],
    "vw/page.html": b"<b>page</b>",
    "vw/doc.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "vw/note.txt": b"hello",
    "vw/data.bin": b"0123456789",
    "vw/notimage.png": b"no picture at all",
    "vw/sp ace é.png": BYTES["B"],
}


def form(fields: dict[str, str], file: tuple[str, str, bytes] | None) -> aiohttp.FormData:
    data = aiohttp.FormData(quote_fields=False, default_to_multipart=True)
    for name, text in fields.items():
        data.add_field(name, text)
    if file is not None:
        data.add_field(file[0], file[2], filename=file[1], content_type="image/png")
    return data


@pytest.mark.parametrize("case", recorded("filenames"), ids=lambda case: str(case["prefix"]))
async def test_a_prefix_becomes_folder_and_numbered_name(
    server: Server, space: str, case: dict[str, Any]
) -> None:
    prefix = case["prefix"]
    if prefix.startswith("/"):
        entry = await server.run(flat(prefix))
        assert (entry["status"]["status_str"], entry["outputs"]) == (case["status"], {})
        return
    entry = await server.run(flat(f"{space}/{prefix}"))
    found = [[image["subfolder"], image["filename"]] for image in entry["outputs"]["2"]["images"]]
    assert found == [[f"{space}/{subfolder}".rstrip("/"), name] for subfolder, name in case["images"]]


async def test_numbers_go_on_after_the_highest_and_batches_are_consecutive(
    server: Server, space: str
) -> None:
    names = []
    for batch in (1, 2, 1):
        entry = await server.run(flat(f"{space}/n", batch_size=batch))
        names.append([image["filename"] for image in entry["outputs"]["2"]["images"]])
    assert names == [["n_00001_.png"], ["n_00002_.png", "n_00003_.png"], ["n_00004_.png"]]


async def test_previews_go_to_temp(server: Server) -> None:
    graph = flat("unused")
    graph["2"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    (image,) = (await server.run(graph))["outputs"]["2"]["images"]
    assert (image["type"], image["subfolder"]) == ("temp", "")
    assert image["filename"].startswith("ComfyUI_temp_")
    viewed = await server.ask("GET", "/view", params=image)
    assert Image.open(io.BytesIO(viewed.body)).size == (64, 64)


async def test_a_saved_picture_has_its_colour_and_carries_its_graph(server: Server, space: str) -> None:
    graph = flat(f"{space}/meta", color=0x336699, width=80)
    extra = {"extra_pnginfo": {"workflow": {"id": "wf"}, "forge": {"job": "j1"}}}
    (image,) = (await server.run(graph, extra_data=extra))["outputs"]["2"]["images"]
    picture = Image.open(io.BytesIO((await server.ask("GET", "/view", params=image)).body))
    assert (picture.size, picture.getpixel((40, 40))) == ((80, 64), (0x33, 0x66, 0x99))
    chunks = {key: json.loads(text) for key, text in picture.info.items()}
    if "--disable-metadata" in (await server.ask("GET", "/system_stats")).json["system"]["argv"]:
        assert chunks == {}
    else:
        assert chunks == {"prompt": graph, "workflow": {"id": "wf"}, "forge": {"job": "j1"}}


@pytest.mark.parametrize("case", VIEWS, ids=[f"{case['method']} {case['path']}" for case in VIEWS])
async def test_files_are_served_as_recorded(server: Server, case: dict[str, Any]) -> None:
    for name, content in VIEWED.items():
        folder, _, plain = name.rpartition("/")
        fields = {"type": "output", "subfolder": folder, "overwrite": "true"}
        stored = await server.ask("POST", "/upload/image", data=form(fields, ("image", plain, content)))
        assert stored.status == 200
    answer = await server.ask(case["method"], case["path"], headers=case.get("headers"))
    assert answer.status == case["status"]
    for header in ("content-type", "content-disposition"):
        if header in case:
            assert answer.headers[header] == case[header]
    if "content-range" in case:
        assert answer.headers["Content-Range"].partition("/")[0] == case["content-range"].partition("/")[0]
        assert len(answer.body) == 10


async def test_a_known_etag_is_304(server: Server, space: str) -> None:
    (image,) = (await server.run(flat(space)))["outputs"]["2"]["images"]
    etag = (await server.ask("GET", "/view", params=image)).headers["ETag"]
    again = await server.ask("GET", "/view", params=image, headers={"If-None-Match": etag})
    assert (again.status, again.body) == (304, b"")


async def test_uploads_are_answered_as_recorded(server: Server) -> None:
    token = os.urandom(4).hex()
    for text in (json.dumps(case) for case in recorded("uploads")):
        case = json.loads(text.replace("{token}", token))
        if "text" in case:
            body: Any = case["text"]
        else:
            file = (*case["file"], BYTES[case["bytes"]]) if "file" in case else None
            body = form(case["fields"], file)
        answer = await server.ask("POST", case["path"], data=body)
        assert answer.status == case["status"], case["label"]
        if "json" in case:
            assert answer.json == case["json"], case["label"]
        elif answer.status == 400:
            assert answer.body == b"", case["label"]


async def test_an_upload_is_what_load_image_loads(server: Server) -> None:
    folder = f"forge/{os.urandom(4).hex()}"
    fields = {"subfolder": folder}
    await server.ask("POST", "/upload/image", data=form(fields, ("image", "s.png", png("RGB", (7, 8, 9)))))
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": f"{folder}/s.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    (image,) = (await server.run(graph))["outputs"]["2"]["images"]
    picture = Image.open(io.BytesIO((await server.ask("GET", "/view", params=image)).body))
    assert (picture.size, picture.getpixel((3, 3))) == ((16, 16), (7, 8, 9))


async def test_an_overwritten_upload_is_loaded_anew(server: Server) -> None:
    folder = f"forge/{os.urandom(4).hex()}"
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": f"{folder}/s.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    seen = []
    for colour in ((1, 1, 1), (2, 2, 2)):
        fields = {"subfolder": folder, "overwrite": "true"}
        await server.ask("POST", "/upload/image", data=form(fields, ("image", "s.png", png("RGB", colour))))
        entry = await server.run(graph)
        seen.append(entry["status"]["messages"][1][1]["nodes"])
    assert seen == [[], []]


async def test_an_upload_that_is_no_picture_fails_when_it_is_loaded(server: Server) -> None:
    name = f"evil{os.urandom(4).hex()}.txt"
    await server.ask("POST", "/upload/image", data=form({}, ("image", name, b"evil!")))
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    last, data = (await server.run(graph))["status"]["messages"][-1]
    assert (last, data["node_id"], data["node_type"]) == ("execution_error", "1", "LoadImage")


async def test_a_mask_over_a_missing_original_is_200_but_writes_nothing(server: Server) -> None:
    name = f"m{os.urandom(4).hex()}.png"
    fields = {"type": "input", "original_ref": json.dumps({"filename": "nope.png", "type": "input"})}
    answer = await server.ask("POST", "/upload/mask", data=form(fields, ("image", name, BYTES["A"])))
    assert answer.status == 200
    assert (await server.ask("GET", "/view", params={"filename": name, "type": "input"})).status == 404
