"""Cards and icons: a frame, and one symbol drawn large."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from forge.comfyui.simulator.canvas import Canvas, curve, ring
from forge.comfyui.simulator.palettes import Colour, Palette, mixed
from forge.comfyui.simulator.scenery import landscape

GOLD: Colour = (222, 184, 102)
PALE_GOLD: Colour = (250, 230, 170)


def card(canvas: Canvas, palette: Palette, words: list[str], chance: Random) -> None:
    """A fate card: gold frame, landscape seen through a round window, the symbol inside it."""
    canvas.gradient(mixed(palette.ink, palette.hills, 0.35), mixed(palette.ink, (0, 0, 0), 0.3))
    x, y, radius = canvas.cx, canvas.bottom * 0.42, min(0.36, canvas.bottom * 0.36)
    canvas.glow(x, y, radius * 2.2, palette.cloth, 0.9)
    for start, end in zip(ring(x, y, radius * 1.14, 48), ring(x, y, canvas.bottom * 0.75, 48), strict=True):
        canvas.line([start, end], mixed(palette.hills, palette.ink, 0.35), 0.003)
    window = Canvas(canvas.size[0] // canvas.factor, canvas.size[1] // canvas.factor)
    landscape(window, palette, chance)
    canvas.paste_disc(window.image, x, y, radius)
    canvas.ellipse(x, y, radius, radius, None, GOLD, 0.014)
    canvas.ellipse(x, y, radius * 1.07, radius * 1.07, None, PALE_GOLD, 0.003)
    for point in ring(x, y, radius * 1.07, 12):
        canvas.ellipse(*point, 0.012, 0.012, GOLD, palette.ink, 0.003)
    canvas.glow(x, y, radius * 0.95, palette.glow, 0.75)
    symbol_of(words, chance)(canvas, x, y, radius * 0.58, palette)
    _scrolls(canvas, x, y + radius * 1.24, palette)
    _frame(canvas, palette)


def _scrolls(canvas: Canvas, x: float, y: float, palette: Palette) -> None:
    """Two curls and a gem between window and title."""
    for side in (-1, 1):
        for length, drop in ((0.3, 0.05), (0.2, 0.09)):
            stem = curve(
                (x, y), (x + side * length * 0.5, y + drop * 1.4), (x + side * length, y + drop * 0.2)
            )
            canvas.line(stem, GOLD, 0.006)
            canvas.arc(x + side * length, y + drop * 0.2 - 0.022, 0.022, 0, 300, PALE_GOLD, 0.005)
    canvas.shape(ring(x, y + 0.01, 0.035, 4), palette.glow, GOLD, 0.006)


def icon(canvas: Canvas, palette: Palette, words: list[str], chance: Random) -> None:
    """An emblem: a shield-like plate with a bevelled rim and the symbol on it."""
    canvas.gradient(mixed(palette.ink, (0, 0, 0), 0.4), palette.ink)
    x, y, corners = canvas.cx, canvas.cy * 0.86, chance.choice((6, 8, 40))
    canvas.glow(x, y, 0.62, palette.glow, 0.55)
    canvas.shape(ring(x, y, 0.4, corners), mixed(GOLD, palette.ink, 0.25), palette.ink, 0.008)
    canvas.shape(ring(x, y, 0.375, corners), PALE_GOLD)
    canvas.shape(ring(x, y, 0.355, corners), mixed(palette.cloth, palette.ink, 0.35))
    light = chance.uniform(-0.1, 0.1), chance.uniform(-0.1, 0.02)
    canvas.glow(x + light[0], y + light[1], 0.3, mixed(palette.cloth, palette.glow, 0.4), 0.9)
    for _ in range(24):
        angle, far = chance.uniform(0, 2 * math.pi), chance.uniform(0.1, 0.31)
        spark = chance.uniform(0.003, 0.007)
        canvas.ellipse(x + far * math.cos(angle), y + far * math.sin(angle), spark, spark, palette.glow)
    for point in ring(x, y, 0.388, corners if corners < 40 else 8):
        canvas.ellipse(*point, 0.016, 0.016, palette.glow, palette.ink, 0.004)
    symbol_of(words, chance)(canvas, x, y, 0.2, palette)


Symbol = Callable[[Canvas, float, float, float, Palette], None]


def symbol_of(words: list[str], chance: Random) -> Symbol:
    """The symbol the prompt names, else one by chance."""
    for word in words:
        for known, symbol in _SYMBOLS.items():
            if word in known.split():
                return symbol
    return chance.choice(list(_SYMBOLS.values()))


def _frame(canvas: Canvas, palette: Palette) -> None:
    for inset, width, colour in ((0.025, 0.014, GOLD), (0.05, 0.004, PALE_GOLD), (0.062, 0.002, GOLD)):
        left, top = inset, inset
        right, bottom = canvas.right - inset, canvas.bottom - inset
        canvas.line([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], colour, width)
    for x in (0.05, canvas.right - 0.05):
        for y in (0.05, canvas.bottom - 0.05):
            canvas.shape(ring(x, y, 0.05, 4), palette.ink, GOLD, 0.005)
            canvas.shape(ring(x, y, 0.026, 4), palette.glow)


def _sword(canvas: Canvas, x: float, y: float, size: float, palette: Palette) -> None:
    blade = [
        (x, y - size * 1.25),
        (x + size * 0.16, y - size),
        (x + size * 0.12, y + size * 0.55),
        (x - size * 0.12, y + size * 0.55),
        (x - size * 0.16, y - size),
    ]
    canvas.shape(blade, (232, 236, 244), palette.ink, 0.005)
    canvas.line([(x, y - size * 1.1), (x, y + size * 0.5)], (150, 158, 176), 0.005)
    canvas.shape(
        [
            (x - size * 0.5, y + size * 0.5),
            (x + size * 0.5, y + size * 0.5),
            (x + size * 0.36, y + size * 0.7),
            (x - size * 0.36, y + size * 0.7),
        ],
        GOLD,
        palette.ink,
        0.004,
    )
    canvas.line([(x, y + size * 0.7), (x, y + size * 1.15)], palette.cloth, size * 0.16)
    canvas.ellipse(x, y + size * 1.22, size * 0.14, size * 0.14, palette.glow, palette.ink, 0.004)


def _lotus(canvas: Canvas, x: float, y: float, size: float, palette: Palette) -> None:
    for spread, height, share in ((1.3, 0.35, 0.2), (0.85, 0.8, 0.45), (0.4, 1.05, 0.7)):
        for side in (-1, 1):
            tip = (x + side * size * spread, y + size * (0.5 - height))
            outer = curve((x, y + size * 0.8), (x + side * size * (spread + 0.45), y + size * 0.55), tip)
            inner = curve(tip, (x + side * size * (spread - 0.35), y), (x, y + size * 0.8))
            canvas.shape([*outer, *inner], mixed(palette.cloth, PALE_GOLD, share), palette.ink, 0.004)
    petal = [
        *curve((x, y + size * 0.8), (x - size * 0.55, y), (x, y - size * 0.9)),
        *curve((x, y - size * 0.9), (x + size * 0.55, y), (x, y + size * 0.8)),
    ]
    canvas.shape(petal, PALE_GOLD, palette.ink, 0.004)


def _yin_yang(canvas: Canvas, x: float, y: float, size: float, palette: Palette) -> None:
    light, dark = (246, 242, 230), palette.ink
    canvas.ellipse(x, y, size, size, light, GOLD, 0.01)
    half = [(x + size * math.sin(a), y - size * math.cos(a)) for a in (math.pi * s / 40 for s in range(41))]
    canvas.shape(half, dark)
    canvas.ellipse(x, y - size / 2, size / 2, size / 2, dark)
    canvas.ellipse(x, y + size / 2, size / 2, size / 2, light)
    canvas.ellipse(x, y - size / 2, size / 7, size / 7, light)
    canvas.ellipse(x, y + size / 2, size / 7, size / 7, dark)
    canvas.ellipse(x, y, size, size, None, GOLD, 0.012)


def _flame(canvas: Canvas, x: float, y: float, size: float, palette: Palette) -> None:
    for part, colour in ((1.0, palette.cloth), (0.7, (244, 140, 48)), (0.42, PALE_GOLD)):
        s, foot = size * part, y + size
        flame = [
            *curve((x, foot), (x - s * 1.2, foot - s * 0.5), (x - s * 0.5, foot - s * 1.3)),
            *curve(
                (x - s * 0.5, foot - s * 1.3), (x - s * 0.3, foot - s * 0.9), (x + s * 0.1, foot - s * 2.2)
            ),
            *curve(
                (x + s * 0.1, foot - s * 2.2), (x + s * 0.4, foot - s * 1.2), (x + s * 0.6, foot - s * 1.4)
            ),
            *curve((x + s * 0.6, foot - s * 1.4), (x + s * 1.2, foot - s * 0.4), (x, foot)),
        ]
        canvas.shape(flame, colour, palette.ink if part == 1 else None, 0.005)


def _star(canvas: Canvas, x: float, y: float, size: float, palette: Palette) -> None:
    outer, inner = ring(x, y, size * 1.15, 8), ring(x, y, size * 0.5, 8, 1 / 16)
    points = [point for pair in zip(outer, inner, strict=True) for point in pair]
    canvas.shape(points, GOLD, palette.ink, 0.006)
    for tip in outer:
        canvas.line([(x, y), tip], mixed(GOLD, palette.ink, 0.4), 0.004)
    canvas.ellipse(x, y, size * 0.3, size * 0.3, palette.glow, palette.ink, 0.005)


def _tower(canvas: Canvas, x: float, y: float, size: float, palette: Palette) -> None:
    for floor in range(4):
        width, top = size * (0.95 - 0.18 * floor), y + size * (0.95 - 0.52 * (floor + 1))
        wall = width * 0.62
        canvas.shape(
            [
                (x - wall, top + size * 0.52),
                (x - wall, top + size * 0.1),
                (x + wall, top + size * 0.1),
                (x + wall, top + size * 0.52),
            ],
            mixed(palette.cloth, PALE_GOLD, 0.3),
            palette.ink,
            0.004,
        )
        roof = [
            *curve(
                (x - width, top + size * 0.14), (x - width * 0.5, top + size * 0.1), (x, top - size * 0.12)
            ),
            *curve(
                (x, top - size * 0.12), (x + width * 0.5, top + size * 0.1), (x + width, top + size * 0.14)
            ),
        ]
        canvas.shape(roof, mixed(palette.ink, palette.cloth, 0.4), GOLD, 0.005)
        canvas.ellipse(x, top + size * 0.34, size * 0.06, size * 0.09, palette.glow)
    canvas.line([(x, y - size * 1.2), (x, y - size * 1.5)], GOLD, 0.008)


def _gourd(canvas: Canvas, x: float, y: float, size: float, palette: Palette) -> None:
    body = mixed(palette.cloth, PALE_GOLD, 0.25)
    canvas.line([(x, y - size * 0.8), (x + size * 0.14, y - size * 1.25)], (96, 66, 34), size * 0.14)
    canvas.ellipse(x, y - size * 0.42, size * 0.5, size * 0.48, body, palette.ink, 0.006)
    canvas.ellipse(x, y + size * 0.45, size * 0.78, size * 0.7, body, palette.ink, 0.006)
    canvas.ellipse(x, y - size * 0.02, size * 0.34, size * 0.14, GOLD, palette.ink, 0.004)
    canvas.glow(x - size * 0.28, y + size * 0.2, size * 0.4, (255, 255, 255), 0.6)
    canvas.ellipse(x, y + size * 0.48, size * 0.3, size * 0.3, palette.glow, palette.ink, 0.004)


_SYMBOLS: dict[str, Symbol] = {
    "sword weapon blade general war strength justice metal": _sword,
    "lotus flower herb wood spring healing purity": _lotus,
    "balance yin yang void dao harmony moon": _yin_yang,
    "fire flame phoenix ember wrath passion": _flame,
    "star destiny heaven sun lightning fortune": _star,
    "tower pagoda sect earth mountain city": _tower,
    "gourd elixir pill alchemical water potion jade alchemy": _gourd,
}
