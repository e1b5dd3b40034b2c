"""When memory is short: the closest limit decides, and it is over only some way below."""

from __future__ import annotations

import pytest

from forge.domain.memory import MACHINE_BYTES, Bound, machine, short, tightest

GIB = 1024**3
ROOMY = Bound("container", 1, 100)


def process(percent: int) -> Bound:
    return Bound("process", percent, 100)


@pytest.mark.parametrize(
    ("percent", "was", "expected"),
    [
        (89, False, False),
        (90, False, True),
        (120, False, True),
        (89, True, True),
        (85, True, True),
        (84, True, False),
    ],
)
def test_shedding_begins_at_its_line_and_ends_below(percent: int, was: bool, expected: bool) -> None:
    assert short([ROOMY, process(percent)], 0.9, was) is expected


def test_the_closest_limit_decides() -> None:
    assert tightest([ROOMY, process(50), Bound("machine", 3, 4)]).name == "machine"
    with pytest.raises(ValueError):
        tightest([])


def test_a_limit_of_nothing_is_reached() -> None:
    assert short([Bound("process", 0, 0)], 0.9)


def test_of_a_large_machine_only_the_last_bytes_count() -> None:
    assert machine(512 * GIB, 51 * GIB).used == 0
    assert not short([machine(512 * GIB, GIB)], 0.9)
    assert short([machine(512 * GIB, MACHINE_BYTES // 11)], 0.9)


def test_of_a_small_machine_everything_counts() -> None:
    assert machine(GIB, GIB // 4) == Bound("machine", GIB * 3 // 4, GIB)
