"""Moments as people say them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone

import click
import pytest

from forge.cli.moments import Moment, moment

ZONE = timezone(timedelta(hours=2))
NOW = datetime(2026, 5, 1, 12, 30, tzinfo=ZONE)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("2026-04-30T18:00:00Z", "2026-04-30T20:00:00+02:00"),
        ("2026-04-30 18:00", "2026-04-30T18:00:00+02:00"),
        ("2026-04-30", "2026-04-30T00:00:00+02:00"),
        ("now", "2026-05-01T12:30:00+02:00"),
        ("2h ago", "2026-05-01T10:30:00+02:00"),
        ("90 minutes ago", "2026-05-01T11:00:00+02:00"),
        ("1.5d ago", "2026-04-30T00:30:00+02:00"),
        ("Yesterday 18:00", "2026-04-30T18:00:00+02:00"),
        ("yesterday", "2026-04-30T00:00:00+02:00"),
        ("today 9:15", "2026-05-01T09:15:00+02:00"),
        ("09:15:30", "2026-05-01T09:15:30+02:00"),
    ],
)
def test_a_moment(text: str, meant: str) -> None:
    assert moment(text, NOW) == datetime.fromisoformat(meant)


def test_an_event() -> None:
    assert moment("seq:12345", NOW) == 12345


@pytest.mark.parametrize("text", ["", "soon", "25:00", "seq:", "seq:-1", "2h", "tomorrow", "2026-13-01"])
def test_no_moment(text: str) -> None:
    with pytest.raises(ValueError):
        moment(text, NOW)


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_a_moment_that_is_none_here_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no time"):
        Moment().convert(text, None, None)


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as there:
        there.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("berlin")
def test_a_clock_time_has_the_offset_of_its_day() -> None:
    for month, hour in ((7, 16), (12, 17)):
        found = Moment().convert(f"2026-{month:02}-01 18:00", None, None)
        assert found == datetime(2026, month, 1, hour, tzinfo=UTC)
    ago = Moment().convert("2h ago", None, None)
    assert isinstance(ago, datetime)
    assert abs(datetime.now(UTC) - timedelta(hours=2) - ago) < timedelta(minutes=1)
