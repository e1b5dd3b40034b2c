"""Preview frames: what a sampler shows of a picture that is not there yet."""

from __future__ import annotations

import io
import json
import struct

from PIL import Image

from forge.comfyui.simulator.queue import Item

METHODS = ("latent2rgb", "taesd", "auto")
LARGEST = 512


def wants_previews(item: Item) -> bool:
    """Whether this prompt asked for them; the server itself has them off."""
    return item.extra_data.get("preview_method") in METHODS


def half_done(picture: Image.Image, share: float) -> bytes:
    """A JPEG of at most 512 pixels, the coarser the less of the work is done (`share` from 0 to 1)."""
    small = picture.copy()
    small.thumbnail((LARGEST, LARGEST))
    grain = max(1, round((1 - share) * 32))
    coarse = small.resize((max(1, small.width // grain), max(1, small.height // grain)))
    buffer = io.BytesIO()
    coarse.resize(small.size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def frame(jpeg: bytes, prompt_id: str, node_id: str, *, with_metadata: bool) -> bytes:
    """The binary message: type 4 for a client that announced it, else type 1, which carries no ids."""
    if not with_metadata:
        return struct.pack(">II", 1, 1) + jpeg
    facts = {
        "node_id": node_id,
        "prompt_id": prompt_id,
        "display_node_id": node_id,
        "parent_node_id": None,
        "real_node_id": node_id,
        "image_type": "image/jpeg",
    }
    text = json.dumps(facts).encode()
    return struct.pack(">II", 4, len(text)) + text + jpeg
