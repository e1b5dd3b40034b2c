"""Job types of an operator's own, without any model: a flat colour, and a user's picture inverted."""

from __future__ import annotations

import json
from pathlib import Path

TIMEOUT = 2.0

_GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "swatch"}},
}
_DESCRIPTION = f"""
asset_type = "ui_icon"
description = "A flat colour swatch"
timeout_seconds = {TIMEOUT:.0f}
outputs = ["2"]

[params.color]
type = "integer"
minimum = 0
maximum = 16777215
default = 0
targets = ["1.color"]
"""


_RECOLOUR_GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "recolour"}},
}
_RECOLOUR = """
asset_type = "character_portrait"
description = "The user's own picture in opposite colours"
timeout_seconds = 30
outputs = ["3"]

[params.picture]
type = "image"
required = true
targets = ["1.image"]
"""


STILL = "still.png"

_STILL_GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": STILL}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "still"}},
}
_STILL = """
asset_type = "ui_icon"
description = "A picture that lies at ComfyUI, as it is"
timeout_seconds = 30
outputs = ["2"]
"""


def write_still(folder: Path) -> Path:
    """Put the job type `still` into a directory; it fails for as long as its picture is none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "still.json").write_text(json.dumps(_STILL_GRAPH))
    (folder / "still.toml").write_text(_STILL)
    return folder


def write_recolour(folder: Path) -> Path:
    """Put the job type `recolour`, which takes an uploaded picture, into a directory; returns that."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recolour.json").write_text(json.dumps(_RECOLOUR_GRAPH))
    (folder / "recolour.toml").write_text(_RECOLOUR)
    return folder


def write_swatch(folder: Path) -> Path:
    """Put the job type `swatch` into a directory of its own, and return that."""
    folder.mkdir(parents=True)
    (folder / "swatch.json").write_text(json.dumps(_GRAPH))
    (folder / "swatch.toml").write_text(_DESCRIPTION)
    return folder
