"""Saving pictures the way SaveImage and PreviewImage do, or the way a hijacked server would."""

from __future__ import annotations

import asyncio
import json
import random
import string
from typing import Any

from forge.comfyui.simulator import hostile
from forge.comfyui.simulator.folders import Folders
from forge.comfyui.simulator.options import Faults
from forge.comfyui.simulator.png import Flat, Frame, png_bytes
from forge.comfyui.simulator.queue import Item

SAVERS = {"SaveImage": "output", "PreviewImage": "temp"}


class Saver:
    """Writes numbered PNG files; previews get a name that one life of a server keeps."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._temp_name = "ComfyUI_temp_" + "".join(random.choices(string.ascii_lowercase, k=5))

    async def save(
        self, item: Item, class_type: str, inputs: dict[str, Any], faults: Faults
    ) -> list[dict[str, Any]]:
        """Save every picture of `inputs["images"]` and return the output entries."""
        frames = inputs["images"]
        if isinstance(frames, str):
            raise AttributeError("'str' object has no attribute 'shape'")
        kind = SAVERS[class_type]
        prefix = inputs["filename_prefix"] if kind == "output" else self._temp_name
        folder, name, number = self._folders.numbered(kind, prefix, (frames[0].width, frames[0].height))
        inside = str(folder.relative_to(self._folders.path(kind)))
        texts = _texts(item)
        saved: list[dict[str, Any]] = []
        for index, frame in enumerate(frames):
            file_name = f"{name.replace('%batch_num%', str(index))}_{number + index:05}_.png"
            (folder / file_name).write_bytes(await _encoded(frame, texts))
            saved.append({"filename": file_name, "subfolder": "" if inside == "." else inside, "type": kind})
        if faults.hostile:
            saved = hostile.spoil(faults.hostile, saved, self._folders)
        if faults.noise:
            saved = [entry | {"id": "a1", "metadata": {"unheard_of": 1}} for entry in saved]
        return saved


async def _encoded(frame: Frame, texts: dict[str, str]) -> bytes:
    if isinstance(frame, Flat) or frame.width * frame.height <= 256 * 256:
        return png_bytes(frame, texts)  # cheaper than a thread
    return await asyncio.to_thread(png_bytes, frame, texts)


def _texts(item: Item) -> dict[str, str]:
    extra: dict[str, Any] = item.extra_data.get("extra_pnginfo") or {}
    return {key: json.dumps(value) for key, value in ({"prompt": item.graph} | extra).items()}
