"""What may go, and when nothing may."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factories import JOB, NOW, after
from forge.domain.retention import (
    BRAKE_FILES,
    BRAKE_FREE,
    TOLERANCE,
    Claim,
    Kept,
    doubt,
    given_up,
    held,
    least_worth,
    most,
    rest_of_grace,
    too_many_bytes,
)
from forge.events.assets import AssetDeleted, AssetExpired


def kept(number: int, **fields: Any) -> Kept:
    return Kept(id=UUID(int=number), **{"size_bytes": 100, "created_at": after(number)} | fields)


def chosen(assets: list[Kept], bytes_: int) -> list[int]:
    return [asset.id.int for asset in least_worth(assets, bytes_, NOW)]


def test_what_is_expired_goes_first_then_the_least_recently_used() -> None:
    assets = [
        kept(1, last_accessed_at=after(100)),
        kept(2),
        kept(3),
        kept(4, expires_at=after(-1), last_accessed_at=after(200)),
    ]
    assert chosen(assets, 400) == [4, 2, 3, 1]


def test_no_more_goes_than_is_needed() -> None:
    assets = [kept(1), kept(2), kept(3)]
    assert [chosen(assets, n) for n in (-5, 0, 1, 100, 101)] == [[], [], [1], [1], [1, 2]]


@given(st.lists(st.builds(kept, st.integers(1, 50), pinned=st.booleans())), st.integers(0, 2000))
def test_what_is_pinned_never_goes(assets: list[Kept], bytes_: int) -> None:
    gone = least_worth(assets, bytes_, NOW)
    assert not any(asset.pinned for asset in gone)
    free = [asset for asset in assets if not asset.pinned]
    assert sum(asset.size_bytes for asset in gone) >= min(bytes_, sum(a.size_bytes for a in free))


@pytest.mark.parametrize(
    ("of", "expected"),
    [(0, BRAKE_FREE), (20, BRAKE_FREE), (200, 40), (4999, 999), (5000, BRAKE_FILES), (10**6, BRAKE_FILES)],
)
def test_a_sweep_takes_a_fifth_or_a_thousand_and_a_few_always(of: int, expected: int) -> None:
    assert most(of) == expected
    assert (held(expected, of), held(expected + 1, of)) == (False, True)


def test_the_target_says_how_much_is_too_much() -> None:
    assert [too_many_bytes(used, 1000, 0.8) for used in (700, 800, 801, 950)] == [0, 0, 1, 150]


@pytest.mark.parametrize("days", [-8, 8])
@pytest.mark.fault("T1")
def test_a_clock_that_jumped_is_not_believed(days: int) -> None:
    wrong = NOW + timedelta(days=days)
    assert doubt(wrong, (NOW, NOW), None)
    assert doubt(NOW, (NOW, wrong), None)


@pytest.mark.fault("T1")
def test_a_log_from_the_future_is_not_believed() -> None:
    assert doubt(NOW, (NOW,), NOW + TOLERANCE * 2)
    assert not doubt(NOW, (NOW + TOLERANCE, NOW - TOLERANCE), NOW + TOLERANCE)
    assert not doubt(NOW, (NOW,), NOW - timedelta(days=300)), "a log may be quiet for long"


def test_a_grace_is_never_longer_than_itself_whatever_the_clocks_say() -> None:
    grace = timedelta(seconds=60)
    waits = [rest_of_grace(grace, NOW, after(elapsed)) for elapsed in (-700_000, -1, 0, 20, 60, 700_000)]
    assert waits == [60, 60, 60, 40, 0, -699_940]


def test_a_claim_ends_as_what_it_ended_by() -> None:
    claim = Claim(
        asset_id=UUID(int=7),
        job_id=JOB,
        asset_type="npc_bust",
        user_id="mei",
        session_id="s",
        character_id="c",
        content_hash="ab" * 32,
        format="png",
        pictures=2,
        size_bytes=100,
    )
    assert isinstance(given_up(claim, "expired"), AssetExpired)
    gone = given_up(claim, "evicted")
    assert isinstance(gone, AssetDeleted)
    assert (gone.reason, gone.pictures, gone.file_size_bytes) == ("evicted", 2, 200)
