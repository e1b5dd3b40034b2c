"""The judge of the soak: finds a leak that was planted, and none where there is none."""

from __future__ import annotations

import random

import pytest
from benchmarks.trend import MIN_SAMPLES, Point, Trend, theil_sen, trend, verdict

LIMIT = 512
"""Bytes a job that RELIABILITY allows."""

HEAP = 90e6


def series(
    leak: float, *, noise: float = 0.0, step: float = 1.0, count: int = 80, seed: int = 1
) -> list[Point]:
    """Resident memory every 108 jobs: a heap that grows in whole steps, and is disturbed."""
    draw = random.Random(seed)
    jobs = [4320 + 108 * nth for nth in range(count)]
    return [(job, HEAP + leak * job // step * step + draw.uniform(-noise, noise)) for job in jobs]


def test_a_leak_of_two_kilobytes_a_job_is_found() -> None:
    found = trend(series(2048))
    assert found is not None
    assert found.slope == pytest.approx(2048, rel=0.01)
    assert verdict(found, LIMIT) == "grows"


@pytest.mark.parametrize("seed", range(5))
def test_it_is_found_in_noise_and_steps_too(seed: int) -> None:
    found = trend(series(2048, noise=1.5e6, step=1 << 20, seed=seed))
    assert found is not None
    assert found.low < 2048 < found.high
    assert verdict(found, LIMIT) == "grows"


def test_a_flat_series_is_flat() -> None:
    assert trend(series(0)) == Trend(0, 0, 0)
    assert verdict(trend(series(0)), LIMIT) == "flat"


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_growth(seed: int) -> None:
    assert verdict(trend(series(0, noise=1.5e6, seed=seed)), LIMIT) == "flat"


def test_a_growth_below_the_limit_passes() -> None:
    assert verdict(trend(series(200, noise=3e5)), LIMIT) == "flat"


def test_a_few_wild_samples_do_not_bend_it() -> None:
    points = series(100)
    points[7], points[60] = (points[7][0], 10 * HEAP), (points[60][0], 0.0)
    found = trend(points)
    assert found is not None
    assert found.slope == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_waves_do_not_pass_for_certainty(seed: int) -> None:
    """Neighbours that hang together tell less than as many samples of their own."""
    draw, height = random.Random(seed), 0.0
    points = []
    for nth in range(80):
        height = 0.9 * height + draw.gauss(0, 1e6)
        points.append((108.0 * nth, HEAP + height))
    found = trend(points)
    assert found is not None
    alone = trend([(x, HEAP + draw.gauss(0, 1e6)) for x, _ in points])
    assert alone is not None
    assert found.high - found.low > alone.high - alone.low
    assert verdict(found, LIMIT) != "grows"


def test_what_is_explained_does_not_count() -> None:
    found = trend(series(900, noise=2e5))
    assert found is not None
    assert verdict(found, LIMIT) == "grows"
    assert verdict(found.less(700), LIMIT) == "flat"


def test_too_few_samples_tell_nothing() -> None:
    assert trend(series(2048, count=MIN_SAMPLES - 1)) is None
    assert verdict(None, LIMIT) == "unclear"


def test_many_samples_are_thinned_and_say_the_same() -> None:
    found = trend(series(300, count=450), resamples=50)
    assert found is not None
    assert found.slope == pytest.approx(300, rel=0.01)


def test_samples_at_the_same_place_have_no_slope() -> None:
    assert theil_sen([1, 1, 2], [5, 9, 7]) == 0.0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 512, "flat"), (0, 513, "unclear"), (513, 900, "grows"), (512, 900, "unclear")],
)
def test_the_verdict_is_about_both_bounds(low: float, high: float, expected: str) -> None:
    assert verdict(Trend((low + high) / 2, low, high), LIMIT) == expected
