"""What would have been, where it can be worked out by hand."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest

from factories import (
    NOW,
    Log,
    after,
    attempt_failed,
    cancelled,
    completed,
    deleted,
    failed,
    job_id,
    pinned,
    produced,
    ready,
    retried,
    started,
    stored,
    submitted,
)
from forge.domain.disk import Lines
from forge.domain.recording import Recording
from forge.domain.simulation import Outcome, Rules, recorded, simulate

DAY = 86400
LATER = after(10 * DAY)
LOOSE = Rules(rate_per_hour=0, queue_limit=1000, ttl_seconds=7 * DAY)


class Tape:
    """A recording, written by hand; times are seconds after NOW."""

    def __init__(self) -> None:
        self.log = Log()
        self.jobs = 0

    def tell(self, second: float, event: Any) -> None:
        self.log.add(event, after(second))

    def job(
        self,
        asked: float,
        start: float | None = None,
        end: float | None = None,
        user: str = "mei",
        **more: Any,
    ) -> UUID:
        """A job that was asked for, started, and brought one picture of 1200 bytes of its own."""
        self.jobs += 1
        id_, content = job_id(self.jobs), f"{self.jobs:02x}" * 32
        priority = more.pop("priority", 5)
        self.tell(asked, submitted(id_, user, priority, **more))
        if start is not None:
            self.tell(start, started(id_, user))
        if end is not None:
            self.picture(end, id_, user, content)
            self.tell(end, completed(id_, user, assets=[produced(content)], recipe=more.get("recipe", "")))
        return id_

    def picture(self, second: float, id_: UUID, user: str, content: str) -> None:
        self.tell(
            second, stored(id_, user, content, created_at=after(second), expires_at=after(second + 9 * DAY))
        )
        self.tell(second, ready(id_, user, content))

    @property
    def recording(self) -> Recording:
        made = Recording()
        for record in sorted(self.log.records, key=lambda r: r.meta.at):
            made.apply(record)
        return made

    def went(self, since: datetime = NOW, until: datetime = LATER, **limits: Any) -> Outcome:
        return simulate(self.recording, LOOSE if not limits else _rules(**limits), since, until)


def _rules(**limits: Any) -> Rules:
    return msgspec.structs.replace(LOOSE, **limits)


def waits(outcome: Outcome) -> list[float | None]:
    return [job.waited for job in outcome.jobs]


def took(outcome: Outcome) -> list[float | None]:
    return [job.took for job in outcome.jobs]


def five() -> Tape:
    """Five jobs at once, ten seconds each, one place: one after the other."""
    tape = Tape()
    for nth in range(5):
        tape.job(0, nth * 10, nth * 10 + 10)
    return tape


def test_what_was_is_read_out_of_the_log() -> None:
    real = recorded(five().recording, NOW, after(100))
    assert waits(real) == [0, 10, 20, 30, 40]
    assert took(real) == [10, 20, 30, 40, 50]
    assert (real.busy, real.span, real.refused) == (50, 50, None)
    assert (real.disk_peak, real.disk_end) == (5 * 1200, 5 * 1200)


def test_more_places_shorten_the_wait_and_not_the_work() -> None:
    assert waits(five().went(slots=1)) == [0, 10, 20, 30, 40]
    three = five().went(slots=3)
    assert waits(three) == [0, 0, 0, 10, 20]
    assert took(three) == [10, 20, 30, 40, 50], "one backend draws one after the other"
    assert (three.busy, three.span) == (50, 50)


def test_more_backends_shorten_the_work() -> None:
    two = five().went(slots=5, gpus=2)
    assert took(two) == [10, 10, 20, 20, 30]
    assert (two.busy, two.span, two.gpus) == (50, 30, 2)


def test_a_prompt_behind_another_took_what_was_left() -> None:
    """Three at the backend at once: they end at 10, 14 and 20, so they took 10, 4 and 6."""
    tape = Tape()
    for end in (10, 14, 20):
        tape.job(0, 0, end)
    assert waits(tape.went(slots=1)) == [0, 10, 14]


def test_an_hour_is_as_full_as_is_allowed() -> None:
    tape = Tape()
    for nth in range(4):
        tape.job(nth, nth, nth + 1)
    tape.job(3601, 3601, 3602)
    two = tape.went(rate_per_hour=2)
    assert two.refused == {"generations_per_hour": 2}
    assert [job.outcome for job in two.jobs] == ["completed"] * 3, "at 3601 only the one of second 1 counts"


def test_a_user_has_so_many_jobs_at_once() -> None:
    assert five().went(slots=1, queue_per_user=2).refused == {"queued_jobs": 3}
    assert five().went(slots=1, queue_limit=1).refused == {"queue_full": 3}


def test_a_batch_is_let_in_or_not_as_one() -> None:
    tape = Tape()
    batch = UUID(int=9)
    for nth in range(3):
        tape.job(0, nth, nth + 1, batch_id=batch)
    tape.job(0, 3, 4)
    outcome = tape.went(queue_per_user=2)
    assert outcome.refused == {"queued_jobs": 3}
    assert len(outcome.jobs) == 1


def test_the_urgent_goes_first() -> None:
    tape = Tape()
    tape.job(0, 0, 10)
    tape.job(1, 10, 20, priority=9)
    tape.job(2, 20, 30, priority=1)
    assert waits(tape.went(slots=1)) == [0, 19, 8]


def test_a_failed_attempt_fails_again_and_backs_off() -> None:
    tape = Tape()
    id_ = tape.job(0, 0)
    tape.tell(4, attempt_failed(id_, retry_at=after(6)))
    tape.tell(6, started(id_, attempt=2))
    tape.tell(11, failed(id_, attempt=2, code="prompt_rejected"))
    tape.tell(20, retried(id_, attempt=2, max_attempts=5))
    tape.tell(20, started(id_, attempt=3))
    tape.picture(23, id_, "mei", "aa" * 32)
    tape.tell(23, completed(id_, attempt=3))
    [job] = (outcome := tape.went()).jobs
    assert (job.outcome, job.took, outcome.busy) == ("completed", 23, 4 + 5 + 3)
    [job] = tape.went(rate_per_hour=1).jobs
    assert job.outcome == "failed", "the retry was refused"


def test_who_cancels_does_so_when_they_did_and_a_place_is_free() -> None:
    tape = Tape()
    tape.job(0, 0, 10)
    id_ = tape.job(0, 10)
    tape.tell(12, cancelled(id_, attempt=1))
    tape.job(0, 12, 22)
    one = tape.went(slots=1)
    assert [job.outcome for job in one.jobs] == ["completed", "cancelled", "completed"]
    assert took(one) == [10, None, 22]
    assert one.busy == 22
    assert [j.outcome for j in tape.went(slots=1, gpus=1, rate_per_hour=2).jobs] == ["completed", "cancelled"]


def test_assets_go_when_their_time_is_over() -> None:
    tape = Tape()
    for nth in range(3):
        tape.job(nth * DAY, nth * DAY, nth * DAY + 10)
    week = tape.went(until=after(5 * DAY))
    assert (week.disk_peak, week.disk_end) == (3600, 3600)
    day = tape.went(until=after(5 * DAY), ttl_seconds=DAY + 5)
    assert (day.disk_peak, day.disk_end) == (2400, 0), "each goes five seconds after the next came"


def test_what_its_owner_pins_stays_and_what_is_deleted_goes() -> None:
    tape = Tape()
    first = tape.job(0, 0, 10)
    second = tape.job(0, 10, 20)
    tape.tell(30, pinned(first, content_hash="01" * 32))
    tape.tell(40, deleted(second, content_hash="02" * 32, reason="requested"))
    outcome = tape.went(until=after(5 * DAY), ttl_seconds=DAY)
    assert (outcome.disk_peak, outcome.disk_end) == (2400, 1200)


def test_what_is_there_is_not_drawn_and_what_is_gone_is() -> None:
    tape = Tape()
    tape.job(0, 0, 10, recipe="r")
    again = tape.job(2 * DAY, recipe="r")
    tape.picture(2 * DAY, again, "mei", "01" * 32)
    tape.tell(2 * DAY, completed(again, cached=True, attempt=0, recipe="r"))
    kept, gone = tape.went(), tape.went(ttl_seconds=DAY)
    assert [job.outcome for job in kept.jobs] == ["completed", "cached"]
    assert kept.busy == 10
    assert [job.outcome for job in gone.jobs] == ["completed", "completed"]
    assert gone.busy == 20, "drawn anew, in the usual time"


def test_a_full_disk_lets_go_of_the_oldest_or_takes_no_work() -> None:
    tape = Tape()
    for nth in range(6):
        tape.job(nth * 20, nth * 20, nth * 20 + 10)
    lines = Lines(0.5, 0.75, 100)
    outcome = tape.went(until=after(600), disk_limit=4800, lines=lines, target_ratio=0.5)
    assert (outcome.disk_peak, outcome.disk_end, outcome.refused) == (3600, 2400, {}), "3 × 1200 is the line"
    none_left = Lines(0.5, 0.75, 5000)
    outcome = tape.went(until=after(600), disk_limit=4800, lines=none_left, target_ratio=0.5)
    assert outcome.refused == {"disk_full": 5}, "the reserve is larger than the volume"


def test_what_was_before_is_taken_as_it_was() -> None:
    """From second 5 on: one is drawn, five more seconds of it are left, one waits; they are nobody's."""
    tape = Tape()
    tape.job(0, 0, 10)
    tape.job(1, 10, 20)
    tape.job(6, 20, 30)
    outcome = tape.went(since=after(5), slots=1)
    assert (waits(outcome), took(outcome)) == ([14], [24])
    assert tape.went(since=after(5), until=after(5.5)).jobs == []


def test_the_same_question_has_the_same_answer() -> None:
    tape = Tape()
    for nth in range(40):
        tape.job(nth * 3 % 17, 20 + nth * 5, 20 + nth * 5 + 5, user=f"u{nth % 7}", priority=1 + nth % 9)
    assert tape.went(slots=2) == tape.went(slots=2)


@pytest.mark.parametrize("limits", [{}, {"slots": 1}, {"rate_per_hour": 3}], ids=["present", "slots", "rate"])
def test_nothing_asked_nothing_done(limits: dict[str, Any]) -> None:
    outcome = Tape().went(**limits)
    assert (outcome.jobs, outcome.busy, outcome.span, outcome.disk_end) == ([], 0, 0, 0)


def test_every_request_is_accounted_for() -> None:
    """Every request ends, once, whatever the limits."""
    tape = Tape()
    for nth in range(300):
        tape.job(nth, nth * 2, nth * 2 + 2, user=f"u{nth % 11}")
    outcome = tape.went(rate_per_hour=20, slots=6)
    assert len(outcome.jobs) + sum((outcome.refused or {}).values()) == 300
    assert {job.outcome for job in outcome.jobs} == {"completed"}
    assert timedelta(seconds=outcome.span) >= timedelta(seconds=outcome.busy)
