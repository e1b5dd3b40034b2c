"""Reading and uploading files: `/view`, `/upload/image`, `/upload/mask`."""

from __future__ import annotations

import asyncio
import io
import json
import mimetypes
from os.path import basename, normpath
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from PIL import Image

from forge.comfyui.simulator.folders import KINDS, annotated
from forge.comfyui.simulator.hostile import HUGE_NAME

if TYPE_CHECKING:
    from forge.comfyui.simulator.server import Simulator

SCRIPTABLE = {"text/html", "text/html-sandboxed", "application/xhtml+xml", "text/javascript", "text/css"}
HUGE_CHUNK = bytes(1024 * 1024)


def file_routes(simulator: Simulator) -> list[web.RouteDef]:
    """The routes about files."""
    files = _Files(simulator)
    return [
        web.get("/view", files.view),
        web.post("/upload/image", files.upload_image),
        web.post("/upload/mask", files.upload_mask),
    ]


class _Files:
    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator

    async def view(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        if "filename" not in query:
            return web.Response(status=404)
        name, kind = annotated(query["filename"], query.get("type", "output"))
        if not name or name.startswith("/") or ".." in name or kind not in KINDS:
            return web.Response(status=400)
        if name == HUGE_NAME and self._simulator.faults.hostile == "huge":
            return await _endless(request)
        root = self._simulator.folders.path(kind)
        folder = _joined(root, query.get("subfolder", ""))
        if not folder.is_relative_to(root):
            return web.Response(status=403)
        path = folder / basename(name)
        if not path.is_file():
            return web.Response(status=404)
        disposition = {"Content-Disposition": f'filename="{path.name}"'}
        if "preview" in query:
            content, mime = await asyncio.to_thread(
                _preview, path, query["preview"], query.get("channel", "")
            )
        elif query.get("channel") in ("rgb", "a"):
            content, mime = await asyncio.to_thread(_channel, path, query["channel"])
        else:
            mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            mime = "application/octet-stream" if mime in SCRIPTABLE else mime
            return web.FileResponse(path, headers=disposition | {"Content-Type": mime})
        return web.Response(body=content, content_type=mime, headers=disposition)

    async def upload_image(self, request: web.Request) -> web.Response:
        post = await request.post()
        return self._store(post, None)

    async def upload_mask(self, request: web.Request) -> web.Response:
        post = await request.post()
        original = json.loads(str(post["original_ref"]))
        return self._store(post, original)

    def _store(self, post: object, original: dict[str, str] | None) -> web.Response:
        assert hasattr(post, "get")
        image = post.get("image")
        if not image:
            return web.Response(status=400)
        name, content = image.filename, image.file.read()  # a plain text field has neither: 500, as served
        kind, subfolder = post.get("type") or "input", post.get("subfolder") or ""
        if kind not in KINDS:
            raise ValueError(kind)
        root = self._simulator.folders.path(kind)
        folder = Path(normpath(root / normpath(subfolder)))
        path = Path(normpath(folder / name))
        if not name or not folder.is_relative_to(root) or not _inside(path, folder, name):
            return web.Response(status=400)
        if name.startswith("/") or (path.parent != folder and not path.parent.is_dir()):
            raise FileNotFoundError(path)
        folder.mkdir(parents=True, exist_ok=True)
        if post.get("overwrite") not in ("true", "1"):
            path = _free_name(path, content)
        self._write(path, content, original)
        return web.json_response({"name": path.name, "subfolder": subfolder, "type": kind})

    def _write(self, path: Path, content: bytes, original: dict[str, str] | None) -> None:
        if original is None:
            path.write_bytes(content)
            return
        root = self._simulator.folders.path(original.get("type", "output"))
        source = Path(normpath(root / original.get("subfolder", "") / original["filename"]))
        if not source.is_relative_to(root) or not source.is_file():
            return  # answered with 200 all the same
        with Image.open(source) as first, Image.open(io.BytesIO(content)) as second:
            masked = first.convert("RGBA")
            masked.putalpha(second.convert("RGBA").getchannel("A"))
        masked.save(path, "PNG", compress_level=4)


def _joined(root: Path, relative: str) -> Path:
    return Path(normpath(root / relative))


def _inside(path: Path, folder: Path, name: str) -> bool:
    return name.startswith("/") or (path.is_relative_to(folder) and path != folder)


def _free_name(path: Path, content: bytes) -> Path:
    """The name itself when unused or holding the same bytes, else `name (1).png` and so on."""
    candidate, number = path, 1
    while candidate.exists() and candidate.read_bytes() != content:
        candidate = path.with_name(f"{path.stem} ({number}){path.suffix}")
        number += 1
    return candidate


def _preview(path: Path, wanted: str, channel: str) -> tuple[bytes, str]:
    kind, _, quality = wanted.partition(";")
    kind = kind if kind in ("webp", "jpeg") else "webp"
    with Image.open(path) as image:
        flat = image.convert("RGB") if kind == "jpeg" or channel == "rgb" else image.copy()
    buffer = io.BytesIO()
    flat.save(buffer, kind, quality=int(quality) if quality.isdigit() else 90)
    return buffer.getvalue(), f"image/{kind}"


def _channel(path: Path, channel: str) -> tuple[bytes, str]:
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    if channel == "rgb":
        result = rgba.convert("RGB")
    else:
        result = Image.new("RGBA", rgba.size)
        result.putalpha(rgba.getchannel("A"))
    buffer = io.BytesIO()
    result.save(buffer, "PNG")
    return buffer.getvalue(), "image/png"


async def _endless(request: web.Request) -> web.StreamResponse:
    """A body without length that ends only when the reader hangs up."""
    response = web.StreamResponse(headers={"Content-Type": "image/png"})
    await response.prepare(request)
    try:
        while True:
            await response.write(HUGE_CHUNK)
    except ConnectionError:
        return response
