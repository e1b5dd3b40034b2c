"""The life of an upload, rule by rule, and folded from what the log keeps at hand."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factories import HASH, NOW, after, upload_expired, upload_renewed, upload_stored
from forge.domain.uploads import FEW_STRAYS, MOST_STRAYS, expire, fold, store, too_many_strays, use
from forge.errors import UploadGone
from forge.events.catalogue import Event

LIFE = 1000


def stored_at(second: float) -> Event:
    return upload_stored(created_at=after(second), expires_at=after(second + LIFE))


def renewed_until(second: float) -> Event:
    return upload_renewed(expires_at=after(second))


def test_a_picture_that_is_new_is_stored() -> None:
    assert store(None, upload_stored()) == [upload_stored()]
    assert fold([upload_stored()]) == fold(store(None, upload_stored()))


def test_one_that_expired_is_stored_again() -> None:
    gone = fold([upload_stored(), upload_expired()])
    assert gone is None
    assert store(gone, upload_stored()) == [upload_stored()]


def test_the_same_picture_again_lives_on_from_now() -> None:
    again = upload_stored(created_at=after(500), expires_at=after(500 + LIFE))
    [event] = store(fold([upload_stored()]), again)
    assert event == upload_renewed(expires_at=after(1500))
    assert fold([upload_stored(), event]).expires_at == after(1500)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (0, []),
        (99, []),
        (100, [renewed_until(1100)]),
        (999, [renewed_until(1999)]),
        (5000, [renewed_until(6000)]),  # overdue, but nobody said so: it is alive
    ],
)
def test_use_lengthens_a_life_in_steps(now: float, expected: list[Event]) -> None:
    assert use(fold([upload_stored()]), after(now)) == expected


@pytest.mark.parametrize("events", [[], [upload_stored(), upload_expired()]], ids=["never", "expired"])
def test_what_is_not_there_cannot_be_used(events: list[Event]) -> None:
    with pytest.raises(UploadGone):
        use(fold(events), NOW)


@pytest.mark.parametrize(
    ("events", "now", "ends"),
    [
        ([upload_stored()], 999, False),
        ([upload_stored()], 1000, True),
        ([upload_stored(), renewed_until(2000)], 1999, False),
        ([upload_stored(), renewed_until(2000)], 2000, True),
        ([upload_stored(), upload_expired()], 3000, False),
        ([], 3000, False),
    ],
    ids=["alive", "its time is up", "renewed", "renewed, long ago", "already", "never"],
)
def test_it_expires_once_and_not_before_its_time(events: list[Event], now: float, ends: bool) -> None:
    assert expire(fold(events), after(now)) == ([upload_expired()] if ends else [])


moments = st.lists(st.tuples(st.sampled_from(["store", "use", "expire"]), st.integers(0, 5000)), max_size=12)


@given(moments)
def test_the_last_event_of_each_type_tells_the_whole(steps: list[tuple[str, int]]) -> None:
    """The log answers with those only, in order."""
    log: list[Event] = []
    for what, second in sorted(steps, key=lambda step: step[1]):
        log += _decided(what, fold(log), after(second))
    last = {type(event): nth for nth, event in enumerate(log)}
    assert fold(log[nth] for nth in sorted(last.values())) == fold(log)


def _decided(what: str, upload: object, now: datetime) -> list[Event]:
    second = (now - NOW).total_seconds()
    match what, upload:
        case "store", _:
            return store(upload, stored_at(second))  # type: ignore[arg-type]
        case "use", None:
            return []
        case "use", _:
            return use(upload, now)  # type: ignore[arg-type]
        case _:
            return expire(upload, now)  # type: ignore[arg-type]


def test_another_users_upload_of_one_content_is_another() -> None:
    assert upload_stored(user="mei").upload_id != upload_stored(user="lan").upload_id
    assert upload_stored().upload_id != upload_stored(content_hash=HASH[::-1]).upload_id


@pytest.mark.parametrize(
    ("strays", "files", "stopped"),
    [
        (FEW_STRAYS, FEW_STRAYS, False),
        (FEW_STRAYS + 1, FEW_STRAYS + 1, True),
        (FEW_STRAYS + 1, 1000, False),
        (300, 1000, True),
        (MOST_STRAYS, 100_000, False),
        (MOST_STRAYS + 1, 100_000, True),
    ],
)
def test_a_lost_log_does_not_empty_the_volume(strays: int, files: int, stopped: bool) -> None:
    assert too_many_strays(strays, files) is stopped
