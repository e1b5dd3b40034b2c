"""Whether something grows: the slope of a series with an interval, and a verdict. No I/O, no clock.

The slope is Theil–Sen's, the median over all pairs, which a few odd samples do not bend. Its interval comes
from a moving-block bootstrap of the residuals: what is sampled from a process that lives on hangs together
from one sample to the next (a heap grows in steps, a sweep comes in waves), and drawing single samples would
promise more than they tell.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Literal

import msgspec

MIN_SAMPLES = 8
MOST_SAMPLES = 100
"""The work grows with their square; of more, evenly many are taken."""

Point = tuple[float, float]
Verdict = Literal["flat", "grows", "unclear"]


class Trend(msgspec.Struct, frozen=True):
    """Units a step of x: the slope and the bounds of its 95 % interval."""

    slope: float
    low: float
    high: float

    def less(self, explained: float) -> Trend:
        """What is left of it where so much has a known reason."""
        return Trend(self.slope - explained, self.low - explained, self.high - explained)

    def shown(self, digits: int = 0) -> str:
        return f"{self.slope:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def trend(points: Sequence[Point], resamples: int = 300, seed: int = 0) -> Trend | None:
    """The slope of a series in order of x; None of fewer than eight samples."""
    if len(points) < MIN_SAMPLES:
        return None
    points = _thinned(points)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    slope = theil_sen(xs, ys)
    start = median(y - slope * x for x, y in points)
    fit = [start + slope * x for x in xs]
    rest = [y - f for y, f in zip(ys, fit, strict=True)]
    draw = random.Random(seed)
    found = sorted(
        theil_sen(xs, [f + r for f, r in zip(fit, _blocks(rest, draw), strict=True)])
        for _ in range(resamples)
    )
    edge = int(resamples * 0.025)
    return Trend(slope, found[edge], found[-1 - edge])


def theil_sen(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The median slope between all pairs of different x."""
    return median(
        (yb - ya) / (xb - xa) for (xa, ya), (xb, yb) in combinations(zip(xs, ys, strict=True), 2) if xb != xa
    )


def verdict(found: Trend | None, limit: float) -> Verdict:
    """``flat``: surely at most the limit; ``grows``: surely more; ``unclear``: the samples do not tell."""
    if found is None:
        return "unclear"
    if found.high <= limit:
        return "flat"
    return "grows" if found.low > limit else "unclear"


def _blocks(rest: Sequence[float], draw: random.Random) -> list[float]:
    """As many residuals again, drawn in runs of neighbours."""
    length = math.isqrt(len(rest))
    found: list[float] = []
    while len(found) < len(rest):
        begin = draw.randrange(len(rest) - length + 1)
        found += rest[begin : begin + length]
    return found[: len(rest)]


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    step = math.ceil(len(points) / MOST_SAMPLES)
    return points[::step]
