"""Drawings in place of what a model would paint: made from prompt, seed and size, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from forge.comfyui.simulator.canvas import Canvas
from forge.comfyui.simulator.emblems import card, icon
from forge.comfyui.simulator.figures import bust, portrait
from forge.comfyui.simulator.palettes import Kind, Palette, kind_of, palette_of, words_of
from forge.comfyui.simulator.scenery import landscape

LINES = 3


class Wish(NamedTuple):
    """What a sampler was asked for."""

    positive: str
    negative: str
    seed: int
    width: int
    height: int


def draw(wish: Wish) -> Image.Image:
    """The picture of a wish, in its size: the same wish gives the same pixels, another seed gives others."""
    chance = Random(f"{wish.seed}|{wish.positive}|{wish.negative}")
    words = words_of(wish.positive)
    palette, kind = palette_of(words, chance), kind_of(words, wish.width, wish.height)
    canvas = Canvas(wish.width, wish.height)
    if kind in ("portrait", "bust"):
        landscape(canvas, palette, chance)
    _FIGURES[kind](canvas, palette, words, chance)
    if kind != "card":
        canvas.vignette(palette.ink, 1.0)
    image = canvas.finished()
    _write_prompt(image, wish, palette, inset=round(min(image.size) * 0.075) if kind == "card" else 0)
    return image


_FIGURES: dict[Kind, Callable[[Canvas, Palette, list[str], Random], None]] = {
    "portrait": portrait,
    "bust": bust,
    "card": card,
    "icon": icon,
}


def _write_prompt(image: Image.Image, wish: Wish, palette: Palette, inset: int) -> None:
    """The prompt at the foot of the picture, `inset` pixels from its edges, as much as three lines hold."""
    size = max(9, round(min(image.size) * 0.028))
    font, small = ImageFont.load_default(size), ImageFont.load_default(max(8, round(size * 0.7)))
    left, right, bottom = inset, image.width - inset, image.height - inset
    margin = round(size * 1.2)
    lines = _wrapped(wish.positive, font, right - left - 2 * margin)
    y = bottom - round(size * 1.3) * (len(lines) + 1) - size
    band = image.crop((left, y, right, bottom))
    image.paste(Image.blend(band, Image.new("RGB", band.size, palette.ink), 0.72), (left, y))
    pen = ImageDraw.Draw(image)
    pen.line([(left, y), (right, y)], fill=palette.glow, width=1)
    y += size // 2
    for line in lines:
        pen.text((left + margin, y), line, font=font, fill=(248, 244, 232))
        y += round(size * 1.3)
    pen.text((left + margin, y), f"simulated, seed {wish.seed}", font=small, fill=palette.glow)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) == LINES:
            lines[-1] += " …"
            break
        else:
            lines.append(word)
    return lines
