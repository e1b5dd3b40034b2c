"""Colours by element, and what a prompt says about the picture."""

from __future__ import annotations

import re
from random import Random
from typing import Literal, NamedTuple

Colour = tuple[int, int, int]
Kind = Literal["portrait", "bust", "card", "icon"]


class Palette(NamedTuple):
    """Sky from top to bottom, hills, cloth, what glows, and the lines drawn over it all."""

    element: str
    top: Colour
    bottom: Colour
    hills: Colour
    cloth: Colour
    glow: Colour
    ink: Colour


PALETTES = {
    p.element: p
    for p in (
        Palette(
            "fire", (58, 12, 22), (244, 132, 52), (92, 24, 24), (166, 32, 30), (255, 196, 84), (40, 10, 14)
        ),
        Palette(
            "water", (14, 38, 78), (126, 190, 214), (26, 70, 110), (30, 94, 150), (178, 232, 255), (8, 24, 48)
        ),
        Palette(
            "wood", (22, 52, 40), (196, 214, 140), (40, 88, 54), (56, 112, 62), (226, 244, 158), (14, 34, 24)
        ),
        Palette(
            "metal",
            (44, 48, 60),
            (206, 206, 212),
            (86, 92, 106),
            (128, 134, 150),
            (250, 236, 190),
            (22, 24, 32),
        ),
        Palette(
            "earth",
            (62, 42, 28),
            (226, 186, 122),
            (112, 78, 46),
            (142, 92, 48),
            (250, 220, 150),
            (36, 22, 14),
        ),
        Palette(
            "lightning",
            (24, 16, 58),
            (126, 100, 196),
            (52, 40, 104),
            (84, 58, 160),
            (244, 240, 140),
            (14, 8, 36),
        ),
        Palette(
            "ice",
            (36, 66, 98),
            (222, 240, 248),
            (112, 152, 184),
            (150, 190, 216),
            (255, 255, 255),
            (20, 42, 66),
        ),
        Palette("void", (8, 6, 18), (70, 30, 96), (26, 14, 46), (44, 22, 70), (206, 132, 255), (4, 2, 10)),
        Palette(
            "jade", (16, 58, 56), (176, 224, 196), (40, 104, 90), (52, 138, 112), (238, 222, 150), (8, 36, 34)
        ),
    )
}

_WORDS = {
    "fire": "fire flame flames phoenix ember inferno lava sun red crimson cinnabar vermilion burning",
    "water": "water river sea ocean rain wave tide lake blue azure mist",
    "wood": "wood tree forest leaf leaves bamboo vine green spring nature herb lotus",
    "metal": "metal steel iron sword blade armor armour silver gold golden general military",
    "earth": "earth stone mountain rock sand clay desert soil ochre brown",
    "lightning": "lightning thunder storm bolt electric violet tribulation",
    "ice": "ice frost snow winter cold crystal glacier white moon",
    "void": "void shadow dark abyss night star stars demon demonic ghost cosmic black",
    "jade": "jade emerald sect immortal elixir pill wind cloud",
}
_KINDS: dict[Kind, str] = {
    "card": "card fate tarot",
    "icon": "icon emblem symbol badge glyph button item sigil",
    "bust": "bust npc face headshot expression closeup",
    "portrait": "portrait character full",
}


def words_of(text: str) -> list[str]:
    """The words of a prompt in order, lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


def palette_of(words: list[str], chance: Random) -> Palette:
    """The element named first; without one, chance picks."""
    for word in words:
        if word in _WORDS:
            return PALETTES[word]
    for word in words:
        for element, known in _WORDS.items():
            if word in known.split():
                return PALETTES[element]
    return PALETTES[chance.choice(list(PALETTES))]


def kind_of(words: list[str], width: int, height: int) -> Kind:
    """What to draw: by the words, else by the shape of the picture."""
    for kind, known in _KINDS.items():
        if not set(words).isdisjoint(known.split()):
            return kind
    if min(width, height) <= 320:
        return "icon"
    return "bust" if width >= height else "portrait"


def mixed(first: Colour, second: Colour, share: float) -> Colour:
    """A colour between two; 0 is the first, 1 the second."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue
