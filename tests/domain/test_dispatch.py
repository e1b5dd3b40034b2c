"""Who is next: priority, turns, ageing; and the bound on every wait, against users who try their worst."""

from __future__ import annotations

import random
from collections.abc import Collection
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import (
    NOW,
    Log,
    adopted,
    after,
    attempt_failed,
    cancelled,
    completed,
    failed,
    job_id,
    retried,
    started,
    submitted,
)
from forge.domain import dispatch
from forge.domain.dispatch import AGEING, Line, bound
from forge.domain.jobs import Status
from forge.events.catalogue import Event
from forge.events.envelope import Recorded

PLACES = 3


class House:
    """A line, the log that feeds it, and places that take orders."""

    def __init__(self) -> None:
        self.log, self.line = Log(), Line()
        self.given: list[UUID] = []
        self.running: list[UUID] = []
        self.jobs = 0

    def tell(self, event: Event, at: datetime | None = None) -> Recorded:
        record = self.log.add(event, at)
        self.line.apply(record)
        return record

    def submit(self, user: str, priority: int = 5) -> UUID:
        self.jobs += 1
        self.tell(submitted(job_id(self.jobs), user, priority))
        return job_id(self.jobs)

    def start(self, job: UUID) -> None:
        self.tell(started(job, self.line.jobs[job].user_id, self.line.jobs[job].attempt + 1))

    def next(self) -> UUID | None:
        choice = self.line.choose(self.given)
        return choice and choice.job.id

    def drained(self, most: int = 10_000) -> list[UUID]:
        """The jobs in the order in which they start, one place, nothing else coming."""
        found: list[UUID] = []
        while (job := self.next()) is not None and len(found) < most:
            self.start(job)
            found.append(job)
        return found

    # what a busy house does by itself

    def give(self) -> UUID | None:
        if len(self.given) + len(self.running) < PLACES and (job := self.next()):
            self.given.append(job)
            return job
        return None

    def start_given(self) -> UUID | None:
        if not self.given:
            return None
        job = self.given.pop(0)
        self.start(job)
        self.running.append(job)
        return job

    def finish(self, nth: int = 0) -> None:
        if self.running:
            job = self.running.pop(nth % len(self.running))
            self.tell(completed(job, self.line.jobs[job].user_id, self.line.jobs[job].attempt))


@pytest.fixture
def house() -> House:
    return House()


# ------------------------------------------------------------------ order


def test_nobody_waits_in_an_empty_house(house: House) -> None:
    assert house.next() is None


def test_the_lower_priority_number_goes_first(house: House) -> None:
    late, soon = house.submit("mei", 7), house.submit("lin", 2)
    assert house.drained() == [soon, late]


def test_a_user_is_served_first_in_first_out(house: House) -> None:
    jobs = [house.submit("mei") for _ in range(5)]
    assert house.drained() == jobs


def test_a_users_own_priorities_come_before_their_order(house: House) -> None:
    second, first = house.submit("mei", 6), house.submit("mei", 1)
    assert house.drained() == [first, second]


def test_users_take_turns_however_many_jobs_one_brings(house: House) -> None:
    flood = [house.submit("mei") for _ in range(9)]
    lin, wu = house.submit("lin"), house.submit("wu")
    assert house.drained() == [flood[0], lin, wu, *flood[1:]]


def test_who_empties_the_line_and_comes_back_waits_a_turn(house: House) -> None:
    first, lin = house.submit("mei"), house.submit("lin")
    house.start(first)
    again = house.submit("mei")
    assert house.drained() == [lin, again]


def test_cancelling_and_asking_again_wins_nothing(house: House) -> None:
    first, lin = house.submit("mei"), house.submit("lin")
    house.tell(cancelled(first))
    again = house.submit("mei")
    assert house.drained() == [lin, again]


def test_orders_that_are_out_count_as_turns(house: House) -> None:
    mei, _, lin = house.submit("mei"), house.submit("mei"), house.submit("lin")
    assert house.give() == mei
    assert house.give() == lin


def test_a_long_wait_lifts_a_job_by_a_level(house: House) -> None:
    old = house.submit("old", 3)
    for _ in range(2 * AGEING - 1):
        house.start(house.submit("mei", 1))
    newer = house.submit("lin", 1)
    assert house.next() == newer
    house.start(house.submit("mei", 1))
    assert house.next() == old
    choice = house.line.choose()
    assert choice is not None
    assert f"aged to 1; waited {2 * AGEING} starts" in choice.reason


def test_a_choice_says_why(house: House) -> None:
    house.submit("mei", 2)
    choice = house.line.choose()
    assert choice is not None
    assert choice.reason == "priority 2; waited 0 starts; mei's turn after 0 starts among 1 waiting users"


# --------------------------------------------------------------- the fold


def test_a_job_leaves_with_its_start_and_the_house_with_its_end(house: House) -> None:
    job = house.submit("mei")
    assert (house.line.pending, house.line.jobs[job].status) == (1, Status.PENDING)
    house.start(job)
    assert (house.line.pending, [j.id for j in house.line.running()]) == (0, [job])
    house.tell(adopted(job))
    house.tell(completed(job))
    assert (house.line.pending, house.line.jobs) == (0, {})


def test_an_admission_told_twice_counts_once(house: House) -> None:
    record = house.tell(submitted())
    house.line.apply(record)
    assert house.line.pending == 1
    assert len(house.drained()) == 1


def test_a_retried_job_waits_again_with_its_attempts_behind_it(house: House) -> None:
    job = house.submit("mei")
    house.start(job)
    house.tell(failed(job, attempt=1))
    assert house.line.pending == 0
    house.tell(retried(job, attempt=1, max_attempts=4))
    assert (house.line.pending, house.next()) == (1, job)
    assert house.line.jobs[job].attempt == 1


def test_a_job_in_back_off_waits_outside_until_its_time(house: House) -> None:
    job, other = house.submit("mei"), house.submit("lin")
    house.start(job)
    house.tell(attempt_failed(job, retry_at=after(60)))
    assert house.line.pending == 2
    assert house.line.release(after(59)) == after(60)
    assert house.drained() == [other]
    assert house.line.release(after(60)) is None
    assert house.next() == job


def test_an_outdated_back_off_lets_nobody_in(house: House) -> None:
    job = house.submit("mei")
    house.start(job)
    house.tell(attempt_failed(job, retry_at=after(60)))
    house.start(job)  # given by a dispatcher whose clock is ahead
    house.tell(attempt_failed(job, attempt=2, retry_at=after(90)))
    house.line.release(after(70))
    assert house.next() is None
    house.line.release(after(90))
    assert house.drained() == [job]


def test_a_job_cancelled_in_back_off_never_comes_back(house: House) -> None:
    job = house.submit("mei")
    house.start(job)
    house.tell(attempt_failed(job, retry_at=after(60)))
    house.tell(cancelled(job, attempt=1))
    house.line.release(after(99))
    assert (house.next(), house.line.pending) == (None, 0)


def test_nothing_is_kept_of_users_who_left_but_where_their_ledger_ends(house: House) -> None:
    for nth in range(50):
        job = house.submit(f"user {nth}")
        house.start(job)
        house.tell(completed(job, f"user {nth}"))
    assert (house.line._lanes, house.line._turn, house.line.jobs) == ({}, {}, {})
    assert len(house.line.admission_seq) == 50


# ------------------------------------------------------------- properties

submissions = st.lists(
    st.tuples(st.sampled_from(["mei", "lin", "wu", "an"]), st.integers(1, 10)), min_size=1, max_size=20
)


@given(submissions, st.integers(0, 5))
@settings(deadline=None)
def test_the_order_that_is_told_is_the_order_that_comes(asked: list[tuple[str, int]], begun: int) -> None:
    house = House()
    for user, priority in asked:
        house.submit(user, priority)
    house.drained(most=begun)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "AGEING", 10**9)
        told = house.line.order()
        assert told == house.drained()


@given(submissions)
@settings(deadline=None)
def test_while_two_wait_at_one_priority_neither_starts_twice_more_than_the_other(
    asked: list[tuple[str, int]],
) -> None:
    house = House()
    for user, _ in asked:
        house.submit(user)
    waiting = {job: house.line.jobs[job].user_id for job in house.line.order()}
    served = dict.fromkeys(waiting.values(), 0)
    for job in house.drained():
        served[waiting.pop(job)] += 1
        still = [served[user] for user in set(waiting.values())]
        assert not still or max(served[u] for u in served) - min(still) <= 1


class Wait(msgspec.Struct):
    """What a waiting job's bound is made of."""

    since: int
    own_ahead: int
    users: int


@given(
    seed=st.integers(0, 2**32),
    priorities=st.sampled_from([(1,), (1, 2), (1, 10), (1, 2, 3, 4), tuple(range(1, 11))]),
    strangers=st.sampled_from([0.0, 0.5, 1.0]),
    load=st.sampled_from([1, 2, 6]),
    ageing=st.sampled_from([1, 2, 5, AGEING]),
)
@settings(max_examples=150, deadline=None)
def test_no_job_waits_longer_than_the_bound(
    seed: int, priorities: tuple[int, ...], strangers: float, load: int, ageing: int
) -> None:
    """Streams of new users, one user who floods priority 1, orders out but not started: whatever comes."""
    dice, house, waits = random.Random(seed), House(), dict[UUID, Wait]()
    mine: dict[UUID, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "AGEING", ageing)
        for step in range(160):
            act = dice.choice(["submit"] * load + ["flood", "give", "give", "start", "start", "finish"])
            if act in ("submit", "flood") and house.line.pending < 25:
                stranger = dice.random() < strangers
                user = "flood" if act == "flood" else f"new {step}" if stranger else dice.choice("abc")
                own_ahead = sum(1 for job in waits if mine[job] == user)
                job = house.submit(user, 1 if act == "flood" else dice.choice(priorities))
                waits[job], mine[job] = Wait(house.line.starts, own_ahead, 0), user
            elif act == "give":
                house.give()
            elif act == "start" and (begun := house.start_given()):
                wait, priority = waits.pop(begun), house.line.jobs[begun].priority
                waited = house.line.starts - wait.since
                assert waited <= bound(priority, wait.own_ahead, wait.users, PLACES)
            elif act == "finish":
                house.finish(dice.randrange(PLACES))
            users = len({mine[job] for job in waits})
            for wait in waits.values():
                wait.users = max(wait.users, users)


def test_the_bound_is_met_to_the_start_when_all_orders_are_out(house: House) -> None:
    for _ in range(PLACES + 2):
        house.submit("flood", 1)
    while house.give():
        pass
    since = house.line.starts
    mine = house.submit("mei", 1)
    while house.start_given() != mine:
        house.finish()
        house.give()
    assert house.line.starts - since == bound(1, own_ahead=0, users=2, places=PLACES)


def test_ageing_is_met_to_the_start(house: House) -> None:
    since, mine = house.line.starts, house.submit("mei", 10)
    while house.line.jobs[mine].status is Status.PENDING:
        house.submit("flood", 1)
        job = house.next()
        assert job is not None
        house.start(job)
    # one order out at a time; the flood's own turn is the first at level 1, mei's the second at the latest
    assert 9 * AGEING < house.line.starts - since <= bound(10, own_ahead=0, users=2, places=1)


def _fed(records: Collection[Recorded], released: Collection[int]) -> Line:
    """A line that read these records; after some of them its dispatcher's clock let delayed jobs join."""
    line = Line()
    for record in records:
        line.apply(record)
        if record.seq in released:
            line.release(record.meta.at)
    return line


@given(st.integers(0, 2**32), st.sets(st.integers(1, 120)))
@settings(max_examples=60, deadline=None)
def test_two_lines_that_read_the_same_log_choose_alike(seed: int, looks: set[int]) -> None:
    """One reads it live and looks at its clock again and again, the other replays it at once."""
    dice, house = random.Random(seed), House()
    for _ in range(60):
        match dice.choice(["submit", "submit", "start", "fail", "complete", "cancel"]):
            case "submit":
                house.submit(dice.choice("abcd"), dice.randint(1, 10))
            case "start" if job := house.next():
                house.start(job)
                house.running.append(job)
            case "fail" if house.running:
                job = house.running.pop(0)
                state = house.line.jobs[job]
                at = house.log.records[-1].meta.at
                soon = at + (after(dice.choice([0, 2, 10])) - NOW)
                house.tell(attempt_failed(job, state.user_id, state.attempt, retry_at=soon))
            case "complete":
                house.finish()
            case "cancel" if house.line.jobs and (job := dice.choice(list(house.line.jobs))):
                if job not in house.running:
                    house.tell(cancelled(job, house.line.jobs[job].user_id))
    end: dict[str, Any] = {"now": after(10_000)}
    live, replayed = _fed(house.log.records, looks), _fed(house.log.records, ())
    live.release(**end)
    replayed.release(**end)
    assert live.order() == replayed.order()
    assert live.choose() == replayed.choose()
