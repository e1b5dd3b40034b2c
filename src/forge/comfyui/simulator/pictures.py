"""Drawings in place of what a model would paint."""

from __future__ import annotations

import random
from typing import NamedTuple

from PIL import Image, ImageDraw


class Wish(NamedTuple):
    """What a sampler was asked for."""

    positive: str
    negative: str
    seed: int
    width: int
    height: int


def draw(wish: Wish) -> Image.Image:
    """The picture of a wish: the same wish gives the same pixels."""
    chance = random.Random(f"{wish.seed}|{wish.positive}|{wish.negative}")
    image = Image.new("RGB", (wish.width, wish.height), tuple(chance.randrange(256) for _ in range(3)))
    ImageDraw.Draw(image).text((4, wish.height - 14), wish.positive[: wish.width // 6], fill="white")
    return image
