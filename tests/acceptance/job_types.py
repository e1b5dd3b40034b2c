"""A job type of an operator's own: a flat colour, drawn without any model, given up after two seconds."""

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


def write_swatch(folder: Path) -> Path:
    """Put the job type `swatch` into a directory of its own, and return that."""
    folder.mkdir(parents=True)
    (folder / "swatch.json").write_text(json.dumps(_GRAPH))
    (folder / "swatch.toml").write_text(_DESCRIPTION)
    return folder
