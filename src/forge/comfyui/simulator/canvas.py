"""A drawing surface with coordinates from 0 to 1, soft light and smooth edges."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw

from forge.comfyui.simulator.palettes import Colour

Point = tuple[float, float]
SMOOTH_BELOW = 1_200_000


class Canvas:
    """x and y run from 0 to 1 across the short side `unit`; (cx, cy) is the middle.

    Drawn at twice the size where that is cheap, and reduced at the end.
    """

    def __init__(self, width: int, height: int) -> None:
        self.factor = 2 if width * height <= SMOOTH_BELOW else 1
        self.size = (width * self.factor, height * self.factor)
        self.unit = min(self.size)
        self.right, self.bottom = self.size[0] / self.unit, self.size[1] / self.unit
        self.cx, self.cy = self.right / 2, self.bottom / 2
        self.image = Image.new("RGB", self.size)
        self.pen = ImageDraw.Draw(self.image)

    def finished(self) -> Image.Image:
        """The picture in its real size."""
        return self.image.reduce(self.factor) if self.factor > 1 else self.image

    def gradient(self, top: Colour, bottom: Colour) -> None:
        """Fill everything, from top to bottom."""
        ramp = Image.linear_gradient("L").resize(self.size)
        self.image.paste(Image.composite(self._plain(bottom), self._plain(top), ramp))

    def vignette(self, colour: Colour, strength: float) -> None:
        """Darken towards the corners."""
        shade = Image.radial_gradient("L").resize(self.size).point(lambda v: int(max(0, v - 90) * strength))
        self.image.paste(self._plain(colour), mask=shade)

    def glow(self, x: float, y: float, radius: float, colour: Colour, strength: float = 1.0) -> None:
        """A soft light, brightest in its middle."""
        edge = max(2, int(radius * 2 * self.unit))
        falloff = Image.radial_gradient("L").resize((edge, edge))
        mask = falloff.point(lambda v: int(max(0, 255 - v * 1.42) ** 2 / 255 * strength))
        corner = (int(x * self.unit - edge / 2), int(y * self.unit - edge / 2))
        area = self.image.crop((*corner, corner[0] + edge, corner[1] + edge))
        light = Image.composite(Image.new("RGB", area.size, colour), Image.new("RGB", area.size), mask)
        self.image.paste(ImageChops.screen(area, light), corner)

    def shape(
        self, points: Sequence[Point], colour: Colour, edge: Colour | None = None, width: float = 0.004
    ) -> None:
        """A filled outline."""
        pixels = self._pixels(points)
        self.pen.polygon(pixels, fill=colour)
        if edge is not None:
            self.pen.line([*pixels, pixels[0]], fill=edge, width=self._thick(width), joint="curve")

    def line(self, points: Sequence[Point], colour: Colour, width: float = 0.004) -> None:
        self.pen.line(self._pixels(points), fill=colour, width=self._thick(width), joint="curve")

    def ellipse(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        colour: Colour | None,
        edge: Colour | None = None,
        width: float = 0.004,
    ) -> None:
        """An ellipse around (x, y); without a colour only its edge."""
        box = [v * self.unit for v in (x - rx, y - ry, x + rx, y + ry)]
        self.pen.ellipse(box, fill=colour, outline=edge, width=self._thick(width) if edge else 0)

    def arc(
        self, x: float, y: float, r: float, start: float, end: float, colour: Colour, width: float = 0.004
    ) -> None:
        box = [v * self.unit for v in (x - r, y - r, x + r, y + r)]
        self.pen.arc(box, start, end, fill=colour, width=self._thick(width))

    def paste_disc(self, image: Image.Image, x: float, y: float, radius: float) -> None:
        """Show the part of another picture of the same size that lies in a disc."""
        mask = Image.new("L", self.size)
        box = [v * self.unit for v in (x - radius, y - radius, x + radius, y + radius)]
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        self.image.paste(image, mask=mask)

    def mist(self, y: float, height: float, colour: Colour, strength: float) -> None:
        """A band of haze that fades at both edges."""
        rows = max(2, int(height * self.unit))
        mask = Image.linear_gradient("L").resize((self.size[0], rows))
        mask = ImageChops.multiply(mask, ImageChops.invert(mask)).point(
            lambda v: int(min(255, v * 4 * strength))
        )
        self.image.paste(Image.new("RGB", mask.size, colour), (0, int(y * self.unit)), mask)

    def _plain(self, colour: Colour) -> Image.Image:
        return Image.new("RGB", self.size, colour)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self.unit, y * self.unit) for x, y in points]

    def _thick(self, width: float) -> int:
        return max(1, round(width * self.unit))


def ring(x: float, y: float, radius: float, corners: int, turn: float = 0.0) -> list[Point]:
    """The corners of a regular polygon; `turn` in full turns, 0 has one corner on top."""
    angles = [2 * math.pi * (turn + corner / corners) - math.pi / 2 for corner in range(corners)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def curve(start: Point, bend: Point, end: Point, steps: int = 16) -> list[Point]:
    """Points along a quadratic curve."""
    found = []
    for step in range(steps + 1):
        t = step / steps
        a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t * t
        found.append((a * start[0] + b * bend[0] + c * end[0], a * start[1] + b * bend[1] + c * end[1]))
    return found
