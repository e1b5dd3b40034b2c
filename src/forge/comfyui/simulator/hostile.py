"""What a hijacked ComfyUI might leave in its output folder."""

from __future__ import annotations

from typing import Any

from forge.comfyui.simulator.folders import Folders
from forge.comfyui.simulator.options import Hostile
from forge.comfyui.simulator.png import bomb_png

HUGE_NAME = "huge_00001_.png"
STRANGE_NAMES = (
    "../../../etc/passwd",
    "a\x00b.png",
    "x" * 400 + ".png",
    "C:\\windows\\win.ini",
    "<script>.png",
)


def spoil(kind: Hostile, saved: list[dict[str, Any]], folders: Folders) -> list[dict[str, Any]]:
    """Replace what was saved by something no client should keep; the new output entries."""
    path = folders.path(saved[0]["type"]) / saved[0]["subfolder"] / saved[0]["filename"]
    match kind:
        case "bytes":
            path.write_bytes(b"\x00\xff this is no picture" * 40)
        case "html":
            path.write_bytes(b"<!doctype html><script>alert(document.cookie)</script>")
        case "bomb":
            path.write_bytes(bomb_png())
        case "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "names":
            return [{"filename": name, "subfolder": "../..", "type": "output"} for name in STRANGE_NAMES]
        case "huge":
            return [{"filename": HUGE_NAME, "subfolder": "", "type": "output"}]
    return saved
