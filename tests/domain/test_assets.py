"""What a session and a character may hold."""

from __future__ import annotations

import pytest

from factories import deleted, stored
from forge.domain.assets import answers, count_in, give_back, original, regenerated
from forge.domain.limits import MAX_CHARACTER_ASSETS, MAX_SESSION_BYTES
from forge.errors import LimitReached
from forge.events.assets import AssetDeleted, AssetReady, AssetStored, SessionReleased


def test_each_picture_carries_the_balance_after_it() -> None:
    pictures = [
        stored(position=nth, file_size_bytes=100, session_id="s", character_id="c") for nth in range(2)
    ]
    events = count_in(pictures, 1000, 7)
    assert [type(event) for event in events] == [AssetStored, AssetReady] * 2
    assert [event.session_bytes for event in events if isinstance(event, AssetStored)] == [1100, 1200]
    assert [event.character_assets for event in events if isinstance(event, AssetReady)] == [8, 9]


def test_what_belongs_to_nobody_is_not_counted() -> None:
    stored_, ready = count_in([stored()], 0, 0)
    assert isinstance(stored_, AssetStored)
    assert isinstance(ready, AssetReady)
    assert stored_.session_bytes is ready.character_assets is None


def test_the_last_byte_of_a_session_may_be_used_and_no_more() -> None:
    picture = stored(file_size_bytes=100, session_id="s")
    assert count_in([picture], MAX_SESSION_BYTES - 100, 0)
    with pytest.raises(LimitReached) as refused:
        count_in([picture], MAX_SESSION_BYTES - 99, 0)
    assert refused.value.limit.name == "session_bytes"


def test_the_hundred_and_first_asset_of_a_character_is_refused() -> None:
    picture = stored(character_id="c")
    assert count_in([picture], 0, MAX_CHARACTER_ASSETS - 1)
    with pytest.raises(LimitReached) as refused:
        count_in([picture], 0, MAX_CHARACTER_ASSETS)
    assert (refused.value.limit.name, refused.value.limit.allowed) == ("character_assets", 100)


def test_what_is_given_up_is_given_back() -> None:
    gone = deleted(session_id="s", character_id="c", pictures=2, file_size_bytes=200)
    event, released = give_back(gone, 1000, 5)
    assert isinstance(event, AssetDeleted)
    assert isinstance(released, SessionReleased)
    assert (event.character_assets, released.session_bytes, released.released_bytes) == (3, 800, 200)


def test_a_reference_of_nobody_gives_nothing_back() -> None:
    assert give_back(deleted(), 0, 0) == [deleted()]


# ------------------------------------------------------------- drawing it again


@pytest.mark.parametrize(
    ("made", "result"),
    [
        ([stored()], "identical"),
        ([stored(content_hash="ef" * 32)], "identical_pixels"),
        ([stored(content_hash="ef" * 32, pixel_hash="01" * 32)], "other_pixels"),
        ([stored(position=1)], "other_pixels"),
        ([stored(content_hash="ef" * 32, pixel_hash="01" * 32), stored(position=1)], "other_pixels"),
    ],
    ids=["same", "pixels", "other", "elsewhere", "both"],
)
def test_a_picture_drawn_again_is_compared_with_the_one_that_stood_there(
    made: list[AssetStored], result: str
) -> None:
    wanted = original(stored())
    assert regenerated(wanted, made) == result
    assert answers(wanted, made) is (result == "identical")


def test_whoever_draws_nothing_again_compares_nothing() -> None:
    assert regenerated(None, [stored()]) is None
    assert answers(None, [stored()])
