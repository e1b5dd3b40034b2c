"""Token buckets: so many at once, so many a second, and nobody's memory grows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forge.domain.rates import Buckets, Rate, take


def test_a_burst_is_taken_at_once_and_comes_back_with_time() -> None:
    buckets = Buckets(Rate(per_second=2, burst=3))
    assert [buckets.take("a", 10.0) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("a", 10.4) > 0
    assert buckets.take("a", 10.5) == 0
    assert buckets.take("a", 10.5) == 0.5
    assert [buckets.take("a", 1000.0) for _ in range(4)] == [0, 0, 0, 0.5]


def test_askers_do_not_share_a_bucket() -> None:
    buckets = Buckets(Rate(per_second=1, burst=1))
    assert buckets.take("a", 0.0) == 0
    assert buckets.take("b", 0.0) == 0
    assert buckets.take("a", 0.0) == 1


def test_the_asker_that_was_heard_last_is_forgotten_last() -> None:
    buckets = Buckets(Rate(per_second=1, burst=1), most=2)
    for key in ("a", "b", "a", "c"):
        buckets.take(key, 0.0)
    assert len(buckets) == 2
    assert buckets.take("a", 0.0) > 0, "refused askers stay known"
    assert buckets.take("b", 0.0) == 0


@given(
    rate=st.builds(Rate, st.floats(0.1, 1000), st.integers(1, 100)),
    waits=st.lists(st.floats(0, 10), max_size=200),
)
def test_never_more_than_the_burst_and_what_came_back(rate: Rate, waits: list[float]) -> None:
    now = full_at = 0.0
    taken: list[float] = []
    for wait in waits:
        now += wait
        refused, full_at = take(rate, full_at, now)
        if not refused:
            taken.append(now)
    for start in range(len(taken)):
        for end in range(start, len(taken)):
            allowed = rate.burst + (taken[end] - taken[start]) * rate.per_second
            assert end - start + 1 <= allowed + 1e-3
