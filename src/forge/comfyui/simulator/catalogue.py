"""The node classes the simulator knows, in the shape `/object_info` serves them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

FOLDERS = (
    "checkpoints",
    "configs",
    "loras",
    "vae",
    "text_encoders",
    "diffusion_models",
    "clip_vision",
    "embeddings",
    "controlnet",
    "upscale_models",
    "hypernetworks",
)


class NodeClass(msgspec.Struct, frozen=True):
    """What validation needs of one class: declared inputs (required ones first) and output types."""

    name: str
    inputs: tuple[tuple[str, Any, bool], ...]
    outputs: tuple[str, ...]
    is_output: bool


class Catalogue:
    """Node classes of one server, with the model files that server has on disk."""

    def __init__(self, checkpoints: Sequence[str], loras: Sequence[str]) -> None:
        self.info: dict[str, Any] = copy.deepcopy(_recorded())
        self.models: dict[str, list[str]] = {folder: [] for folder in FOLDERS}
        self.models |= {"checkpoints": list(checkpoints), "loras": list(loras)}
        self._set_options("CheckpointLoaderSimple", "ckpt_name", checkpoints)
        for name in ("LoraLoader", "LoraLoaderModelOnly"):
            self._set_options(name, "lora_name", loras)
        self.classes = {name: _node_class(name, info) for name, info in self.info.items()}

    def _set_options(self, name: str, field: str, options: Sequence[str]) -> None:
        self.info[name]["input"]["required"][field][0] = list(options)


@cache
def _recorded() -> dict[str, Any]:
    text = files(__package__).joinpath("object_info.json").read_bytes()
    return msgspec.json.decode(text, type=dict[str, Any])


def _node_class(name: str, info: dict[str, Any]) -> NodeClass:
    declared = info["input"]
    inputs = [
        (field, config, kind == "required")
        for kind in ("required", "optional")
        for field, config in declared.get(kind, {}).items()
    ]
    return NodeClass(name, tuple(inputs), tuple(info["output"]), info["output_node"])
