"""The result cache: what is not run again, and what is said instead."""

from __future__ import annotations

from typing import Any

from comfyui.conformance.comfy_server import Server, flat, new_id


def cached(entry: dict[str, Any]) -> list[str]:
    return sorted(entry["status"]["messages"][1][1]["nodes"])


async def test_an_identical_graph_reports_the_old_file(server: Server, space: str) -> None:
    graph = flat(f"{space}/once")
    first, second = await server.run(graph), await server.run(graph)
    assert (cached(first), cached(second)) == ([], ["1", "2"])
    assert second["outputs"] == first["outputs"]


async def test_other_node_ids_do_not_matter(server: Server, space: str) -> None:
    graph = flat(f"{space}/once")
    first = await server.run(graph)
    renamed = {
        "a": graph["1"],
        "b": {"class_type": "SaveImage", "inputs": dict(graph["2"]["inputs"], images=["a", 0])},
    }
    second = await server.run(renamed)
    assert (cached(second), second["outputs"]["b"]) == (["a", "b"], first["outputs"]["2"])


async def test_another_prefix_runs_the_save_alone(server: Server, space: str) -> None:
    graph = flat(f"{space}/one")
    await server.run(graph)
    graph["2"]["inputs"]["filename_prefix"] = f"{space}/two"
    entry = await server.run(graph)
    assert cached(entry) == ["1"]
    assert entry["outputs"]["2"]["images"][0]["filename"] == "two_00001_.png"


async def test_an_unrelated_prompt_in_between_empties_the_cache(server: Server, space: str) -> None:
    graph = flat(f"{space}/again")
    await server.run(graph)
    await server.run(flat(space))
    entry = await server.run(graph)
    assert cached(entry) == []
    assert entry["outputs"]["2"]["images"][0]["filename"] == "again_00002_.png"


async def test_a_cached_run_is_told_without_executing_a_node(server: Server, space: str) -> None:
    graph = flat(f"{space}/told")
    await server.run(graph)
    async with server.listen() as listener:
        prompt_id = await server.submit(graph, client_id=listener.client_id)
        heard = await listener.until_over(prompt_id)
    types = [message["type"] for message in heard if message["type"] not in ("status", "progress_state")]
    assert types == ["execution_start", "execution_cached", "executed", "execution_success", "executing"]


async def test_without_client_id_cached_outputs_are_missing_since_0_27(server: Server, space: str) -> None:
    graph = flat(f"{space}/nobody")
    await server.run(graph)
    prompt_id = new_id()
    await server.ask("POST", "/prompt", json={"prompt": graph, "prompt_id": prompt_id})
    entry = await server.over(prompt_id)
    missing_in = (0, 27) <= tuple(int(part) for part in server.version.split(".")[:2]) < (0, 38)
    assert entry["status"]["status_str"] == "success"
    assert (entry["outputs"] == {}) is missing_in


async def test_free_drops_the_cache(server: Server, space: str) -> None:
    graph = flat(f"{space}/free")
    await server.run(graph)
    answer = await server.ask("POST", "/free", json={"free_memory": True, "unload_models": True})
    assert (answer.status, answer.body) == (200, b"")
    # it works asynchronously, after whatever prompt is current: one more prompt is surely past it
    await server.run(flat(space))
    assert cached(await server.run(graph)) == []
