"""Lines of a volume: crossed once going up, left some way below, however the use moves."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.domain.disk import (
    CLEAN,
    FULL,
    LEVELS,
    RESERVE_BYTES,
    WARN,
    Disk,
    Lines,
    crossings,
    full,
    rank,
    rank_after,
    reminder,
)
from forge.events.system import DiskCrossed

LINES = Lines(0.8, 0.9)
KIB = 1024


def disk(used: int, limit: int = 1000 * KIB, elsewhere: int | None = None) -> Disk:
    free = max(0, limit - used)
    return Disk(used, limit, free if elsewhere is None else min(free, elsewhere))


@pytest.mark.parametrize(
    ("percent", "before", "expected"),
    [
        (0, 0, 0),
        (79, 0, 0),
        (80, 0, WARN),
        (90, 0, CLEAN),
        (95, 0, CLEAN),
        (96, 0, FULL),
        (100, 0, FULL),
        (79, WARN, WARN),
        (77, WARN, 0),
        (89, CLEAN, CLEAN),
        (87, CLEAN, WARN),
        (94, FULL, FULL),
        (92, FULL, CLEAN),
        (89, FULL, CLEAN),
        (10, FULL, 0),
        (96, WARN, FULL),
    ],
)
def test_levels_begin_at_their_line_and_end_some_way_below(percent: int, before: int, expected: int) -> None:
    assert rank(disk(percent * 10 * KIB), LINES, before) == expected


def test_a_large_volume_keeps_a_reserve_in_bytes() -> None:
    limit = 1024**4
    assert not full(disk(limit - RESERVE_BYTES, limit), LINES)
    assert full(disk(limit - RESERVE_BYTES + 1, limit), LINES)
    assert full(disk(limit - RESERVE_BYTES - 1, limit), LINES, was=True), "a little room is not room again"


def test_the_settings_may_say_how_much_is_kept_free() -> None:
    lines = Lines(0.8, 0.9, reserve=0)
    assert not full(disk(1000 * KIB), lines)
    assert full(disk(999 * KIB), Lines(0.8, 0.9, reserve=2 * KIB))


def test_a_volume_that_others_have_filled_is_full_and_over_every_line() -> None:
    others = disk(100 * KIB, elsewhere=0)
    assert rank(others, LINES) == FULL
    assert [event.level for event in crossings(others, 0, FULL)] == ["warn", "clean", "full"]


def test_a_volume_of_nothing_is_full() -> None:
    assert rank(Disk(0, 0, 0), LINES) == CLEAN
    assert rank(Disk(0, 0, 0), Lines(0.8, 0.9, reserve=1)) == FULL


def test_each_line_is_one_event_in_order() -> None:
    up, down = crossings(disk(1), 0, CLEAN), crossings(disk(1), FULL, WARN)
    assert [(e.level, e.above) for e in up] == [("warn", True), ("clean", True)]
    assert [(e.level, e.above) for e in down] == [("full", False), ("clean", False)]
    assert crossings(disk(1), WARN, WARN) == []
    assert (up[0].used_bytes, up[0].limit_bytes) == (1, 1000 * KIB)


def test_a_reminder_is_only_for_those_who_clean() -> None:
    assert reminder(disk(1), WARN) == []
    assert [(e.level, e.above) for e in reminder(disk(1), CLEAN)] == [("clean", True)]
    assert [(e.level, e.above) for e in reminder(disk(1), FULL)] == [("full", True)]


@given(st.lists(st.integers(0, 1000 * KIB), max_size=30))
def test_every_line_is_crossed_up_and_down_in_turns(uses: list[int]) -> None:
    newest: DiskCrossed | None = None
    said: list[DiskCrossed] = []
    for use in uses:
        before = rank_after(newest)
        found = crossings(disk(use), before, rank(disk(use), LINES, before))
        said += found
        newest = found[-1] if found else newest
        assert rank_after(newest) == rank(disk(use), LINES, before), "the newest event says it all"
        assert full(disk(use), LINES) <= (rank_after(newest) == FULL)
    for level in LEVELS:
        turns = [event.above for event in said if event.level == level]
        assert turns[:1] in ([], [True])
        assert all(one is not other for one, other in pairwise(turns))


@given(st.integers(0, 1000 * KIB), st.integers(0, 3))
def test_looking_twice_says_nothing_new(use: int, before: int) -> None:
    now = rank(disk(use), LINES, before)
    assert rank(disk(use), LINES, now) == now
