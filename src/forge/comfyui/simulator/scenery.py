"""What lies behind a figure: sky, sun, hills, and the signs of the element."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from forge.comfyui.simulator.canvas import Canvas, Point, curve, ring
from forge.comfyui.simulator.palettes import Colour, Palette, mixed


def landscape(canvas: Canvas, palette: Palette, chance: Random) -> None:
    """Sky, one light, three chains of hills in haze."""
    canvas.gradient(palette.top, palette.bottom)
    x, y = canvas.right * chance.uniform(0.2, 0.8), canvas.bottom * chance.uniform(0.14, 0.3)
    canvas.glow(x, y, 0.55, palette.glow, 0.7)
    canvas.ellipse(x, y, 0.09, 0.09, mixed(palette.glow, (255, 255, 255), 0.35))
    for depth in range(3):
        foot = canvas.bottom * (0.46 + 0.13 * depth)
        colour = mixed(palette.bottom, palette.hills, 0.35 + 0.3 * depth)
        _hills(canvas, foot, 0.22 - 0.04 * depth, colour, chance)
        canvas.mist(foot - 0.02, 0.3, palette.bottom, 0.5)
    SIGNS[palette.element](canvas, palette, chance)


def _hills(canvas: Canvas, foot: float, height: float, colour: Colour, chance: Random) -> None:
    tops = [chance.uniform(0.25, 1.0) for _ in range(7)]
    ridge: list[Point] = []
    for index in range(len(tops) - 1):
        for step in range(24):
            t = step / 24
            ease = (1 - math.cos(math.pi * t)) / 2
            top = tops[index] + (tops[index + 1] - tops[index]) * ease + chance.uniform(-0.025, 0.025)
            ridge.append(((index + t) / (len(tops) - 1) * canvas.right, foot - height * top))
    canvas.shape(
        [*ridge, (canvas.right, foot), (canvas.right, canvas.bottom), (0, canvas.bottom), (0, foot)], colour
    )


def _embers(canvas: Canvas, palette: Palette, chance: Random) -> None:
    for _ in range(70):
        x, y = chance.uniform(0, canvas.right), canvas.bottom * chance.random() ** 0.6
        size = chance.uniform(0.002, 0.007)
        canvas.glow(x, y, size * 5, palette.glow, 0.8)
        canvas.shape([(x, y - 2 * size), (x + size, y), (x, y + size), (x - size, y)], palette.glow)


def _waves(canvas: Canvas, palette: Palette, chance: Random) -> None:
    size = 0.085
    for row in range(4):
        y = canvas.bottom * 0.74 + row * size * 0.62
        shift = size * (row % 2) + chance.uniform(-0.02, 0.02)
        for column in range(-1, int(canvas.right / size / 2) + 3):
            x = column * size * 2 + shift
            colour = mixed(palette.cloth, palette.ink, 0.2 * row)
            canvas.ellipse(x, y + size, size, size, colour, palette.glow, 0.003)
            for inner in (0.7, 0.4):
                canvas.arc(x, y + size, size * inner, 180, 360, palette.glow, 0.003)


def _leaves(canvas: Canvas, palette: Palette, chance: Random) -> None:
    for _ in range(34):
        x, y = chance.uniform(0, canvas.right), chance.uniform(0, canvas.bottom)
        length, turn = chance.uniform(0.02, 0.05), chance.uniform(0, 2 * math.pi)
        tip = (x + length * math.cos(turn), y + length * math.sin(turn))
        side = (-(tip[1] - y) * 0.5, (tip[0] - x) * 0.5)
        middle = ((x + tip[0]) / 2, (y + tip[1]) / 2)
        first = curve((x, y), (middle[0] + side[0], middle[1] + side[1]), tip, 8)
        second = curve(tip, (middle[0] - side[0], middle[1] - side[1]), (x, y), 8)
        canvas.shape([*first, *second], mixed(palette.cloth, palette.glow, chance.random()))


def _shards(canvas: Canvas, palette: Palette, chance: Random) -> None:
    for _ in range(16):
        x, y = chance.uniform(0, canvas.right), chance.uniform(0, canvas.bottom * 0.8)
        length, lean = chance.uniform(0.08, 0.22), chance.uniform(-0.05, 0.05)
        blade = [
            (x, y),
            (x + 0.008 + lean / 2, y + length * 0.5),
            (x + lean, y + length),
            (x - 0.008 + lean / 2, y),
        ]
        canvas.shape(blade, mixed(palette.bottom, palette.glow, chance.random()), palette.hills, 0.002)


def _strata(canvas: Canvas, palette: Palette, chance: Random) -> None:
    for band in range(6):
        y = canvas.bottom * (0.72 + 0.05 * band)
        colour = mixed(palette.cloth, palette.ink, band / 7)
        points = [(canvas.right * step / 12, y + chance.uniform(-0.012, 0.012)) for step in range(13)]
        canvas.shape([*points, (canvas.right, canvas.bottom), (0, canvas.bottom)], colour)


def _bolts(canvas: Canvas, palette: Palette, chance: Random) -> None:
    for _ in range(3):
        x, y = canvas.right * chance.uniform(0.05, 0.95), 0.0
        path = [(x, y)]
        while y < canvas.bottom * chance.uniform(0.5, 0.75):
            x, y = x + chance.uniform(-0.07, 0.07), y + chance.uniform(0.04, 0.1)
            path.append((x, y))
        for point in path[::2]:
            canvas.glow(*point, 0.12, palette.glow, 0.35)
        canvas.line(path, palette.glow, 0.008)
        canvas.line(path, (255, 255, 255), 0.003)


def _flakes(canvas: Canvas, palette: Palette, chance: Random) -> None:
    for _ in range(36):
        x, y, size = (
            chance.uniform(0, canvas.right),
            chance.uniform(0, canvas.bottom),
            chance.uniform(0.006, 0.026),
        )
        for tip in ring(x, y, size, 6, chance.random()):
            canvas.line([(x, y), tip], palette.glow, 0.0025)


def _stars(canvas: Canvas, palette: Palette, chance: Random) -> None:
    for _ in range(150):
        x, y = chance.uniform(0, canvas.right), chance.uniform(0, canvas.bottom * 0.85)
        size = chance.choice((0.0012, 0.0016, 0.003))
        canvas.ellipse(x, y, size, size, mixed(palette.glow, (255, 255, 255), chance.random()))
    x, y = canvas.cx + chance.uniform(-0.2, 0.2), canvas.bottom * 0.26
    for turn in range(3):
        spiral = [
            (x + 0.004 * s * math.cos(s / 9 + turn * 2.1), y + 0.0026 * s * math.sin(s / 9 + turn * 2.1))
            for s in range(12, 70)
        ]
        canvas.line(spiral, mixed(palette.bottom, palette.glow, 0.6), 0.004)


def _clouds(canvas: Canvas, palette: Palette, chance: Random) -> None:
    for _ in range(6):
        x, y, size = (
            chance.uniform(0, canvas.right),
            canvas.bottom * chance.uniform(0.1, 0.8),
            chance.uniform(0.03, 0.055),
        )
        for offset in (-1.2, 0, 1.2):
            canvas.arc(x + offset * size, y, size * (0.9 if offset else 1.3), 180, 360, palette.glow, 0.004)
            canvas.arc(x + offset * size, y, size * 0.5, 150, 400, palette.glow, 0.003)
        canvas.line([(x - 2.4 * size, y), (x + 2.8 * size, y)], palette.glow, 0.004)


SIGNS: dict[str, Callable[[Canvas, Palette, Random], None]] = {
    "fire": _embers,
    "water": _waves,
    "wood": _leaves,
    "metal": _shards,
    "earth": _strata,
    "lightning": _bolts,
    "ice": _flakes,
    "void": _stars,
    "jade": _clouds,
}
