"""What a server tells about itself: `/system_stats`, `/features`, `/object_info`, `/models`."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import psutil
from aiohttp import web

from forge.comfyui.simulator.catalogue import Catalogue
from forge.comfyui.simulator.folders import KINDS
from forge.comfyui.simulator.options import SimulatorOptions

if TYPE_CHECKING:
    from forge.comfyui.simulator.server import Simulator


def features(options: SimulatorOptions) -> dict[str, Any]:
    """The feature flags of that version."""
    shared = {"supports_preview_metadata": True, "max_upload_size": options.max_upload_bytes}
    if options.version == "0.3.64":
        return shared
    newer = {"extension": {"manager": {"supports_v4": True}}, "node_replacements": True, "assets": False}
    return shared | newer


def info_routes(simulator: Simulator, catalogue: Catalogue) -> list[web.RouteDef]:
    """The routes that only tell."""

    async def system_stats(request: web.Request) -> web.Response:
        return web.json_response(_system_stats(simulator.options.version))

    async def feature_flags(request: web.Request) -> web.Response:
        return web.json_response(features(simulator.options))

    async def object_info(request: web.Request) -> web.Response:
        return web.json_response(catalogue.info)

    async def one_object_info(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        return web.json_response({name: catalogue.info[name]} if name in catalogue.info else {})

    async def models(request: web.Request) -> web.Response:
        return web.json_response(list(catalogue.models))

    async def model_files(request: web.Request) -> web.Response:
        files = catalogue.models.get(request.match_info["folder"])
        return web.Response(status=404) if files is None else web.json_response(files)

    async def embeddings(request: web.Request) -> web.Response:
        return web.json_response([])

    return [
        web.get("/system_stats", system_stats),
        web.get("/features", feature_flags),
        web.get("/object_info", object_info),
        web.get("/object_info/{name}", one_object_info),
        web.get("/models", models),
        web.get("/models/{folder}", model_files),
        web.get("/embeddings", embeddings),
    ]


def internal_routes(simulator: Simulator) -> list[web.RouteDef]:
    """Routes that exist bare only, not under /api."""

    async def files(request: web.Request) -> web.Response:
        kind = request.match_info["kind"]
        if kind not in KINDS:
            return web.json_response({"error": "Invalid directory type"}, status=400)
        found = [path for path in simulator.folders.path(kind).iterdir() if path.is_file()]
        found.sort(key=lambda path: -path.stat().st_mtime_ns)
        return web.json_response([f"{path.name} [{kind}]" for path in found])

    return [web.get("/internal/files/{kind}", files)]


def _system_stats(version: str) -> dict[str, Any]:
    memory = psutil.virtual_memory()
    system = {
        "os": "posix" if version == "0.3.64" else "linux",
        "ram_total": memory.total,
        "ram_free": memory.available,
        "comfyui_version": version,
        "python_version": platform.python_version(),
        "pytorch_version": "none (simulated)",
        "embedded_python": False,
        "argv": ["main.py", "--cpu"],
    }
    device = {
        "name": "cpu",
        "type": "cpu",
        "index": None,
        "vram_total": memory.total,
        "vram_free": memory.available,
        "torch_vram_total": memory.total,
        "torch_vram_free": memory.available,
    }
    return {"system": system, "devices": [device]}
