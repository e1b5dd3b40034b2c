"""What a ComfyUI lacks for a graph."""

from __future__ import annotations

from typing import Any

import pytest

from forge.comfyui.http import Http
from forge.comfyui.nodes import classes, lacking
from forge.comfyui.patience import Patience
from forge.comfyui.server import Server
from forge.comfyui.simulator import Simulator, SimulatorOptions
from forge.comfyui.workflows import load

GRAPH: dict[str, Any] = {
    "1": {"class_type": "Loader", "inputs": {"name": "a.safetensors", "strength": 1.0}},
    "2": {"class_type": "Sampler", "inputs": {"model": ["1", 0], "sampler": "euler"}},
}
OLD = {
    "Loader": {"input": {"required": {"name": [["a.safetensors"], {}], "strength": ["FLOAT", {}]}}},
    "Sampler": {"input": {"required": {"model": ["MODEL"]}, "optional": {"sampler": [["euler"]]}}},
}
NEW = OLD | {"Loader": {"input": {"required": {"name": ["COMBO", {"options": ["a.safetensors"]}]}}}}


@pytest.mark.parametrize("info", [OLD, NEW])
def test_nothing_is_lacking_where_every_name_is_listed(info: dict[str, Any]) -> None:
    assert classes(GRAPH) == {"Loader", "Sampler"}
    assert lacking(GRAPH, info, ()) == []


@pytest.mark.parametrize("info", [OLD, NEW])
def test_a_file_that_is_not_listed_is_named(info: dict[str, Any]) -> None:
    other = GRAPH | {"1": {"class_type": "Loader", "inputs": {"name": "b.safetensors"}}}
    assert lacking(other, info, ()) == ["Loader has no name 'b.safetensors'"]
    assert lacking(other, info, {"1.name"}) == []


def test_a_node_that_is_not_there_is_named() -> None:
    assert lacking(GRAPH, {"Loader": OLD["Loader"], "Sampler": {}}, ()) == ["there is no node Sampler"]


def test_an_uploaded_picture_is_not_looked_for() -> None:
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "new.png"}}}
    info = {"LoadImage": {"input": {"required": {"image": [["old.png"], {"image_upload": True}]}}}}
    assert lacking(graph, info, ()) == []


async def test_the_simulator_can_run_every_job_type_that_comes_along() -> None:
    async with Simulator(SimulatorOptions()) as simulator, Http(simulator.url, Patience()) as http:
        server = Server(http)
        for name, workflow in load().items():
            info = {used: await server.node(used) for used in classes(workflow.graph)}
            slots = {target for param in workflow.params.values() for target in param.targets}
            assert lacking(workflow.graph, info, slots) == [], name
        assert await server.node("NoSuchNode") == {}
