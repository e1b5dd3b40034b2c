"""People: a standing cultivator in robe and halo, and a bust that shows an expression."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from forge.comfyui.simulator.canvas import Canvas, curve, ring
from forge.comfyui.simulator.palettes import Colour, Palette, mixed

SKINS: tuple[Colour, ...] = ((246, 216, 188), (232, 194, 160), (206, 160, 124), (168, 120, 88))
HAIRS: tuple[Colour, ...] = ((24, 20, 26), (52, 34, 26), (92, 30, 24), (28, 36, 58))
GREY: Colour = (206, 206, 212)


class Looks(NamedTuple):
    """How one person looks."""

    skin: Colour
    hair: Colour
    long_hair: bool
    beard: bool
    mood: str


MOODS = {
    "angry": "angry furious rage wrath fierce stern battle",
    "happy": "happy smile smiling joyful laughing cheerful warm kind",
    "sad": "sad sorrow crying grief melancholy weary",
    "surprised": "surprised shocked astonished fear fearful afraid",
}


def looks_of(words: list[str], chance: Random) -> Looks:
    """Looks as the prompt says, the rest by chance."""
    said = set(words)
    old = not said.isdisjoint({"old", "elder", "elderly", "ancient", "sage", "grandmaster"})
    woman = not said.isdisjoint(
        {"woman", "female", "girl", "lady", "priestess", "empress", "queen", "she", "maiden"}
    )
    man = not said.isdisjoint({"man", "male", "boy", "king", "emperor", "he", "monk"})
    mood = next((m for m, known in MOODS.items() if not said.isdisjoint(known.split())), "calm")
    hair = GREY if old else chance.choice(HAIRS)
    return Looks(
        chance.choice(SKINS), hair, woman or (not man and chance.random() < 0.5), old and not woman, mood
    )


def portrait(canvas: Canvas, palette: Palette, words: list[str], chance: Random) -> None:
    """A standing figure: halo, robe with sash, wide sleeves, head."""
    looks = looks_of(words, chance)
    x, head, size = canvas.cx, canvas.bottom * 0.3, 0.088 * min(1.25, canvas.bottom)
    _halo(canvas, palette, x, head, size * 2.5, chance)
    shoulder, hem = head + size * 1.75, canvas.bottom * 0.94
    cloth, shade = palette.cloth, mixed(palette.cloth, palette.ink, 0.45)
    trim = mixed(palette.glow, palette.cloth, 0.15)
    if looks.long_hair:
        _long_hair(canvas, looks, x, head, size, shoulder + size * 2.2)
    for side in (-1, 1):  # sleeves fall behind the robe
        sleeve = [
            (x + side * size * 1.0, shoulder),
            *curve(
                (x + side * size * 1.6, shoulder + 0.1 * size),
                (x + side * size * 2.9, shoulder + size * 2.4),
                (x + side * size * 3.1, shoulder + size * 5.0),
            ),
            (x + side * size * 1.9, shoulder + size * 5.3),
            (x + side * size * 0.7, shoulder + size * 2.6),
        ]
        canvas.shape(sleeve, mixed(cloth, palette.ink, 0.2), trim, 0.004)
    left = curve((x - size * 1.35, shoulder), (x - size * 0.8, shoulder + size * 3), (x - size * 2.5, hem))
    right = curve((x + size * 2.5, hem), (x + size * 0.8, shoulder + size * 3), (x + size * 1.35, shoulder))
    canvas.shape([(x, shoulder - size * 0.45), *left, *right], cloth, trim, 0.004)
    fold = curve((x, shoulder + size * 3.2), (x + size * 0.2, hem - size), (x - size * 0.4, hem))
    canvas.line(fold, shade, 0.006)
    for side in (-1, 1):
        canvas.line(
            curve(
                (x + side * size * 0.6, shoulder + size * 3.3),
                (x + side * size, hem - size * 2),
                (x + side * size * 1.5, hem),
            ),
            shade,
            0.005,
        )
    _collar(canvas, x, shoulder, size, trim, shade)
    waist = shoulder + size * 2.7
    band = [
        (x - size * 1.0, waist),
        (x + size * 1.0, waist),
        (x + size * 1.05, waist + size * 0.6),
        (x - size * 1.05, waist + size * 0.6),
    ]
    canvas.shape(band, shade, trim, 0.004)
    canvas.ellipse(x, waist + size * 0.3, size * 0.24, size * 0.24, palette.glow, palette.ink, 0.003)
    canvas.line([(x, waist + size * 0.55), (x - size * 0.12, waist + size * 2.1)], palette.glow, 0.006)
    _head(canvas, palette, looks, x, head, size)


def bust(canvas: Canvas, palette: Palette, words: list[str], chance: Random) -> None:
    """Head and shoulders, large enough to read the mood."""
    looks = looks_of(words, chance)
    x, head, size = canvas.cx, canvas.bottom * 0.43, 0.185 * min(1.2, canvas.bottom)
    _halo(canvas, palette, x, head, size * 1.85, chance)
    shoulder = head + size * 1.5
    trim = mixed(palette.glow, palette.cloth, 0.15)
    if looks.long_hair:
        _long_hair(canvas, looks, x, head, size, canvas.bottom)
    body = [
        *curve(
            (x - size * 2.2, canvas.bottom),
            (x - size * 1.9, shoulder),
            (x - size * 0.4, shoulder - size * 0.3),
        ),
        *curve(
            (x + size * 0.4, shoulder - size * 0.3),
            (x + size * 1.9, shoulder),
            (x + size * 2.2, canvas.bottom),
        ),
    ]
    canvas.shape(body, palette.cloth, trim, 0.005)
    _collar(canvas, x, shoulder, size, trim, mixed(palette.cloth, palette.ink, 0.45))
    _head(canvas, palette, looks, x, head, size)


def _halo(canvas: Canvas, palette: Palette, x: float, y: float, radius: float, chance: Random) -> None:
    canvas.glow(x, y, radius * 1.7, palette.glow, 0.65)
    canvas.ellipse(x, y, radius, radius, None, palette.glow, 0.006)
    canvas.ellipse(x, y, radius * 0.9, radius * 0.9, None, palette.glow, 0.0025)
    rays = chance.choice((12, 16, 24))
    inner, outer = ring(x, y, radius * 1.05, rays), ring(x, y, radius * 1.2, rays)
    for index, (start, end) in enumerate(zip(inner, outer, strict=True)):
        if index % 2:
            canvas.line([start, end], palette.glow, 0.004)
        else:
            canvas.ellipse(*end, radius * 0.035, radius * 0.035, palette.glow)


def _collar(canvas: Canvas, x: float, y: float, size: float, trim: Colour, shade: Colour) -> None:
    canvas.shape(
        [(x - size * 0.55, y - size * 0.4), (x + size * 0.55, y - size * 0.4), (x, y + size * 1.6)], shade
    )
    canvas.line([(x - size * 0.6, y - size * 0.45), (x + size * 0.1, y + size * 1.7)], trim, size * 0.16)
    canvas.line([(x + size * 0.6, y - size * 0.45), (x - size * 0.1, y + size * 1.7)], trim, size * 0.16)


def _long_hair(canvas: Canvas, looks: Looks, x: float, y: float, size: float, end: float) -> None:
    left = curve((x - size * 0.95, y - size * 0.2), (x - size * 1.7, (y + end) / 2), (x - size * 1.2, end))
    right = curve((x + size * 1.2, end), (x + size * 1.7, (y + end) / 2), (x + size * 0.95, y - size * 0.2))
    canvas.shape([*left, *right], looks.hair)


def _head(canvas: Canvas, palette: Palette, looks: Looks, x: float, y: float, size: float) -> None:
    shade = mixed(looks.skin, (90, 40, 40), 0.25)
    canvas.shape(
        [
            (x - size * 0.32, y + size * 0.6),
            (x + size * 0.32, y + size * 0.6),
            (x + size * 0.4, y + size * 1.5),
            (x - size * 0.4, y + size * 1.5),
        ],
        shade,
    )
    for side in (-1, 1):
        canvas.ellipse(x + side * size * 0.8, y + size * 0.12, size * 0.13, size * 0.22, shade)
    jaw = [
        *curve((x - size * 0.82, y - size * 0.1), (x - size * 0.8, y + size * 0.85), (x, y + size * 1.08)),
        *curve((x, y + size * 1.08), (x + size * 0.8, y + size * 0.85), (x + size * 0.82, y - size * 0.1)),
        *curve((x + size * 0.82, y - size * 0.1), (x, y - size * 1.7), (x - size * 0.82, y - size * 0.1)),
    ]
    canvas.shape(jaw, looks.skin)
    _face(canvas, looks, x, y, size)
    _hair(canvas, palette, looks, x, y, size)
    if looks.beard:
        beard = [
            *curve(
                (x - size * 0.5, y + size * 0.72), (x, y + size * 0.62), (x + size * 0.5, y + size * 0.72)
            ),
            *curve((x + size * 0.5, y + size * 0.72), (x + size * 0.25, y + size * 1.7), (x, y + size * 2.0)),
            *curve((x, y + size * 2.0), (x - size * 0.25, y + size * 1.7), (x - size * 0.5, y + size * 0.72)),
        ]
        canvas.shape(beard, looks.hair)


def _face(canvas: Canvas, looks: Looks, x: float, y: float, size: float) -> None:
    dark = (40, 26, 30)
    tilt = {"angry": 0.13, "sad": -0.12, "surprised": 0.0}.get(looks.mood, 0.02)
    wide = {"surprised": 0.15, "happy": 0.07, "angry": 0.09}.get(looks.mood, 0.1)
    lift = 0.1 if looks.mood == "surprised" else 0.0
    for side in (-1, 1):
        eye = x + side * size * 0.36
        canvas.ellipse(eye, y + size * 0.16, size * 0.17, size * wide, (250, 248, 244))
        canvas.ellipse(eye, y + size * 0.16, size * 0.085, size * min(wide, 0.095), dark)
        canvas.ellipse(eye + size * 0.03, y + size * 0.13, size * 0.025, size * 0.025, (255, 255, 255))
        canvas.line(
            curve(
                (eye - size * 0.18, y + size * 0.14),
                (eye, y + size * (0.14 - wide * 1.5)),
                (eye + size * 0.18, y + size * 0.14),
            ),
            dark,
            size * 0.035,
        )
        brow = y - size * (0.14 + lift)
        canvas.line(
            [(eye + side * size * 0.22, brow - tilt * size), (eye - side * size * 0.2, brow + tilt * size)],
            looks.hair,
            size * 0.06,
        )
    canvas.line(
        curve((x, y + size * 0.22), (x + size * 0.1, y + size * 0.5), (x - size * 0.03, y + size * 0.52)),
        mixed(looks.skin, dark, 0.45),
        size * 0.03,
    )
    mouth, lips = y + size * 0.75, (150, 62, 62)
    if looks.mood == "surprised":
        canvas.ellipse(x, mouth, size * 0.1, size * 0.13, (96, 34, 40))
        return
    bend = {"happy": 0.2, "sad": -0.2, "angry": -0.14}.get(looks.mood, 0.05)
    canvas.line(
        curve(
            (x - size * 0.24, mouth - bend * size * 0.4),
            (x, mouth + bend * size),
            (x + size * 0.24, mouth - bend * size * 0.4),
        ),
        lips,
        size * 0.055,
    )


def _hair(canvas: Canvas, palette: Palette, looks: Looks, x: float, y: float, size: float) -> None:
    fringe = [
        *curve((x - size * 0.92, y + size * 0.3), (x - size * 1.25, y - size * 1.5), (x, y - size * 1.3)),
        *curve((x, y - size * 1.3), (x + size * 1.25, y - size * 1.5), (x + size * 0.92, y + size * 0.3)),
        *curve(
            (x + size * 0.92, y + size * 0.3),
            (x + size * 0.72, y - size * 0.5),
            (x + size * 0.08, y - size * 0.62),
        ),
        *curve(
            (x + size * 0.08, y - size * 0.62),
            (x - size * 0.72, y - size * 0.5),
            (x - size * 0.92, y + size * 0.3),
        ),
    ]
    canvas.shape(fringe, looks.hair)
    canvas.ellipse(x, y - size * 1.36, size * 0.36, size * 0.32, looks.hair)
    canvas.line(
        [(x - size * 0.62, y - size * 1.5), (x + size * 0.62, y - size * 1.22)], palette.glow, size * 0.07
    )
    canvas.ellipse(x - size * 0.66, y - size * 1.52, size * 0.1, size * 0.1, palette.glow)
