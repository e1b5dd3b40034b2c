"""What a server tells about itself, and what it says to paths it does not know."""

from __future__ import annotations

import pytest

from comfyui.conformance.comfy_server import Server, recorded

KNOWN = (
    "EmptyImage",
    "SaveImage",
    "PreviewImage",
    "LoadImage",
    "KSampler",
    "CheckpointLoaderSimple",
    "VAEDecode",
)


@pytest.mark.parametrize("prefix", ["", "/api"])
async def test_system_stats_name_the_version_and_the_devices(server: Server, prefix: str) -> None:
    stats = (await server.ask("GET", f"{prefix}/system_stats")).json
    assert stats["system"]["comfyui_version"] == server.version
    assert stats["system"].keys() >= {"os", "ram_total", "ram_free", "python_version", "argv"}
    assert stats["devices"][0].keys() == recorded("run")["device"].keys()


async def test_object_info_tells_inputs_and_outputs(server: Server) -> None:
    info = (await server.ask("GET", "/object_info")).json
    for name in KNOWN:
        alone = (await server.ask("GET", f"/api/object_info/{name}")).json
        assert alone.keys() == {name}
        assert info[name].keys() >= {"input", "output", "output_node", "name"}
    assert info["SaveImage"]["output_node"] is True
    assert info["EmptyImage"]["input"]["required"]["width"][0] == "INT"
    assert (await server.ask("GET", "/object_info/NoSuchNode")).json == {}


async def test_models_are_listed_by_folder(server: Server) -> None:
    assert {"checkpoints", "loras", "vae"} <= set((await server.ask("GET", "/models")).json)
    assert isinstance((await server.ask("GET", "/models/checkpoints")).json, list)
    assert (await server.ask("GET", "/models/nope")).status == 404
    assert isinstance((await server.ask("GET", "/embeddings")).json, list)


@pytest.mark.parametrize("path", ["/nope", "/health", "/metrics", "/api/nope", "/jobs", "/api/internal/logs"])
async def test_an_unknown_path_is_404_without_a_body(server: Server, path: str) -> None:
    answer = await server.ask("GET", path)
    assert (answer.status, answer.body) == (404, b"")
    assert answer.headers["Content-Type"] == "application/octet-stream"


async def test_another_method_is_405(server: Server) -> None:
    for method, path in (("PUT", "/prompt"), ("DELETE", "/queue"), ("PUT", "/api/prompt")):
        answer = await server.ask(method, path)
        assert answer.status == 405
        assert answer.headers["Allow"] == "GET,HEAD,POST"


async def test_a_foreign_origin_is_refused(server: Server) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        if server.old and "Origin" not in headers:
            continue
        answer = await server.ask("GET", "/prompt", headers=headers)
        assert (answer.status, answer.body) == (403, b"")
    assert (await server.ask("GET", "/prompt", headers={"Origin": "null"})).status == 200


async def test_options_is_answered_everywhere(server: Server) -> None:
    answer = await server.ask("OPTIONS", "/prompt")
    assert (answer.status, answer.body) == (200, b"")
