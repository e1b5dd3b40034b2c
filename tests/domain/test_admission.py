"""What an hour, a session and a character hold, folded from the log."""

from __future__ import annotations

from datetime import timedelta

import pytest

from factories import (
    JOB,
    NOW,
    Log,
    after,
    completed,
    deleted,
    job_id,
    ready,
    released,
    retried,
    stored,
    submitted,
)
from forge.domain.admission import (
    FIRST_GUESS_BYTES,
    HOUR,
    Balances,
    Grants,
    Sizes,
    demand_character,
    demand_hour,
    demand_places,
    demand_queue,
    demand_session,
)
from forge.domain.limits import MAX_SESSION_BYTES
from forge.errors import LimitReached, QueueFull
from forge.events.catalogue import Event


def fold(into: Grants | Sizes | Balances, *events: Event) -> None:
    """The n-th event happens n seconds after `NOW`."""
    log = Log()
    for event in events:
        into.apply(log.add(event))


def test_an_admission_counts_for_an_hour() -> None:
    grants = Grants()
    fold(grants, submitted(), submitted(job_id(2)))
    assert grants.limit("mei", 20, after(3)).used == 2
    assert grants.limit("mei", 20, after(1) + HOUR).used == 1
    assert grants.limit("mei", 20, after(2) + HOUR).used == 0
    assert grants.limit("lin", 20, after(3)).used == 0


def test_a_retry_counts_and_what_was_not_drawn_does_not() -> None:
    grants = Grants()
    fold(grants, submitted(), submitted(job_id(2)), retried(), completed(job_id(2), cached=True))
    assert grants.limit("mei", 20, after(5)).used == 2


def test_the_limit_says_when_as_many_as_are_wanted_fit() -> None:
    grants = Grants()
    fold(grants, *(submitted(job_id(nth)) for nth in range(1, 4)))
    assert grants.limit("mei", 3, after(4), wanted=1).resets_at == after(1) + HOUR
    assert grants.limit("mei", 3, after(4), wanted=3).resets_at == after(3) + HOUR
    assert grants.limit("mei", 3, after(4), wanted=4).resets_at is None, "they never fit"
    assert grants.limit("mei", 4, after(4), wanted=1).resets_at is None, "it fits now"


def test_the_hour_is_refused_exactly() -> None:
    grants = Grants()
    fold(grants, submitted())
    demand_hour(grants, "mei", 1, 2, after(2))
    demand_hour(grants, "mei", 1000, 0, after(2))
    with pytest.raises(LimitReached):
        demand_hour(grants, "mei", 2, 2, after(2))


def test_grants_of_long_ago_are_forgotten() -> None:
    grants, log = Grants(), Log()
    for nth in range(1, 100):
        grants.apply(log.add(submitted(job_id(nth), user=f"user-{nth}"), at=NOW + nth * timedelta(minutes=1)))
    assert len(grants._of) == len(grants._oldest) == 60


def test_a_place_is_one_of_ten() -> None:
    demand_places(9, 1)
    with pytest.raises(LimitReached):
        demand_places(10, 1)


def test_the_queue_of_all_is_bounded() -> None:
    demand_queue(99, 1, 100)
    with pytest.raises(QueueFull):
        demand_queue(99, 2, 100)


def test_balances_are_those_of_the_newest_entry() -> None:
    balances = Balances()
    fold(
        balances,
        stored(session_id="s", session_bytes=100),
        ready(character_id="c", character_assets=1),
        stored(session_id="s", session_bytes=300),
        released(session_id="s", session_bytes=200),
        deleted(character_id="c", character_assets=0),
        stored(),
        ready(),
    )
    assert (balances.session("s"), balances.character("c")) == (200, 0)
    assert (balances.session("another"), balances.character("another")) == (0, 0)


def test_what_was_forgotten_only_the_log_knows() -> None:
    balances = Balances(remembered=1)
    fold(balances, stored(session_id="s", session_bytes=1), stored(session_id="t", session_bytes=2))
    assert (balances.session("s"), balances.session("t")) == (None, 2)


def test_what_is_coming_counts_before_it_is_there() -> None:
    demand_character(90, 5, 5)
    with pytest.raises(LimitReached):
        demand_character(90, 6, 5)
    demand_session(0, MAX_SESSION_BYTES - 1, 1)
    with pytest.raises(LimitReached):
        demand_session(1, MAX_SESSION_BYTES - 1, 1)


def test_pictures_are_taken_to_be_as_large_as_those_before() -> None:
    sizes = Sizes()
    assert sizes.guess({"npc_bust": 2}) == 2 * FIRST_GUESS_BYTES
    fold(sizes, stored(file_size_bytes=100), stored(JOB, file_size_bytes=300))
    assert sizes.guess({"npc_bust": 2, "ui_icon": 1}) == 400 + FIRST_GUESS_BYTES
