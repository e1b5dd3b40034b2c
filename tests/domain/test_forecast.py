"""Growth that a few odd samples do not bend, and when a line is reached at that pace."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from factories import NOW
from forge.domain.forecast import growth, reaches


def steady(per_second: float, count: int = 30) -> list[tuple[datetime, float]]:
    return [(NOW + timedelta(minutes=nth), 1000 + 60 * nth * per_second) for nth in range(count)]


def test_steady_growth_is_read_back() -> None:
    assert growth(steady(2.5)) == pytest.approx(2.5)
    assert growth(list(reversed(steady(-1.0)))) == pytest.approx(-1.0)


def test_a_clean_up_or_two_and_a_wild_sample_do_not_bend_it() -> None:
    samples = steady(2.5)
    samples[3] = (samples[3][0], 10**12)
    samples[17] = (samples[17][0], 0.0)
    assert growth(samples) == pytest.approx(2.5, rel=0.05)


def test_too_few_samples_say_nothing() -> None:
    assert growth(steady(1.0, 4)) is None
    assert growth([(NOW, 1.0)] * 10) is None


@pytest.mark.parametrize(
    ("value", "per_second", "expected"),
    [
        (100.0, 2.0, NOW + timedelta(seconds=50)),
        (200.0, None, NOW),
        (200.0, -1.0, NOW),
        (100.0, 0.0, None),
        (100.0, -1.0, None),
        (100.0, None, None),
        (100.0, 1e-9, None),
    ],
)
def test_when_a_line_is_reached(value: float, per_second: float | None, expected: datetime | None) -> None:
    assert reaches(200.0, NOW, value, per_second) == expected
