"""The life of a job, rule by rule, and as a whole against every order of commands."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from factories import (
    JOB,
    adopted,
    after,
    attempt_failed,
    cancelled,
    completed,
    failed,
    produced,
    redirected,
    retried,
    started,
    submitted,
)
from forge.domain.jobs import (
    Adopt,
    Cancel,
    Command,
    Complete,
    FailAttempt,
    Job,
    Redirect,
    Retry,
    Start,
    Status,
    admitted,
    backoff,
    decide,
    evolve,
    exhausted,
    held_at,
    sent_to,
    stranded,
    suspect,
)
from forge.domain.limits import BACKOFF_SECONDS, MAX_ADOPTIONS, MAX_ATTEMPTS, MAX_REDIRECTIONS
from forge.errors import ForgeError, JobAlreadyOver, JobNotFailed, StaleAttempt
from forge.events.catalogue import Event
from forge.events.jobs import JobCompleted, JobFailed, JobRetried, JobStarted, JobSubmitted, Terminal
from spec import given, job_of

START = Start(1, "worker-a", "http://comfy", "its turn")
COMPLETE = Complete(1, "worker-a", (produced(),), after(9))
FAIL = FailAttempt(1, "prompt_failed", "out of memory", False, after(9))
REDIRECT = Redirect(1, "worker-a", "http://other", "its turn")
EVERY_COMMAND: list[Command] = [START, Adopt(1, "worker-b"), REDIRECT, COMPLETE, FAIL, Cancel(), Retry()]

ENDS = {
    "completed": (submitted(), started(), completed()),
    "failed": (submitted(), started(), failed(attempt=1)),
    "cancelled": (submitted(), cancelled()),
}


# -------------------------------------------------------------- an attempt


def test_a_waiting_job_starts_its_first_attempt() -> None:
    given(submitted()).when(START).then(started())


def test_an_attempt_starts_once() -> None:
    given(submitted(), started()).when(START).then_raises(StaleAttempt)


@pytest.mark.parametrize("attempt", [0, 2, 3])
def test_only_the_next_attempt_may_start(attempt: int) -> None:
    command = msgspec.structs.replace(START, attempt=attempt)
    given(submitted()).when(command).then_raises(StaleAttempt)


def test_after_a_failure_the_second_attempt_starts() -> None:
    command = msgspec.structs.replace(START, attempt=2)
    given(submitted(), started(), attempt_failed()).when(command).then(started(attempt=2))


def test_pictures_conclude_an_attempt_with_its_times() -> None:
    # submitted in second 1, started in second 2, concluded in second 9
    given(submitted(), started()).when(COMPLETE).then(completed(waited_ms=1000, run_ms=7000))


def test_pictures_of_another_version_of_the_job_type_are_nobodys_recipe() -> None:
    asked = submitted(recipe="r")
    given(asked, started()).when(COMPLETE).then(completed(waited_ms=1000, run_ms=7000, recipe="r"))
    other = msgspec.structs.replace(COMPLETE, followed=False)
    given(asked, started()).when(other).then(completed(waited_ms=1000, run_ms=7000))


def test_a_clock_that_ran_backwards_gives_no_negative_time() -> None:
    early = msgspec.structs.replace(COMPLETE, now=after(0))
    given(submitted(), started()).when(early).then(completed(waited_ms=1000, run_ms=0))


def test_the_wait_of_a_retried_job_begins_with_the_retry() -> None:
    history = (submitted(), started(), failed(attempt=1), retried(attempt=1), started(attempt=2))
    command = Complete(2, "worker-a", (), after(5.5))
    given(*history).when(command).then(completed(attempt=2, assets=[], waited_ms=1000, run_ms=500))


# --------------------------------------------------------------- adoption


def test_another_worker_takes_over_a_running_attempt() -> None:
    given(submitted(), started()).when(Adopt(1, "worker-b")).then(adopted())


def test_every_adoption_has_its_own_number() -> None:
    given(submitted(), started(), adopted()).when(Adopt(1, "worker-c")).then(
        adopted(adoption=2, worker="worker-c")
    )


def test_a_waiting_job_cannot_be_adopted() -> None:
    given(submitted()).when(Adopt(1, "worker-b")).then_raises(StaleAttempt)


def test_the_worker_that_lost_its_attempt_may_not_conclude_it() -> None:
    given(submitted(), started(), adopted()).when(COMPLETE).then_raises(StaleAttempt, "adopted by worker-b")


def test_the_worker_that_adopted_may() -> None:
    theirs = msgspec.structs.replace(COMPLETE, worker="worker-b")
    given(submitted(), started(), adopted()).when(theirs).then(
        completed(waited_ms=1000, run_ms=7000, submitted_seq=1)
    )


@pytest.mark.fault("K9")
def test_an_attempt_is_exhausted_by_its_adoptions_and_the_next_begins_afresh() -> None:
    history = [submitted(), started(), *(adopted(adoption=n) for n in range(1, MAX_ADOPTIONS + 1))]
    assert not exhausted(job_of(*history[:-1]))
    assert exhausted(job_of(*history))
    assert not exhausted(job_of(*history, attempt_failed(), started(attempt=2)))


def test_a_job_is_suspect_when_whoever_took_it_over_is_lost_too() -> None:
    history = [submitted(), started(), adopted()]
    assert not suspect(job_of(*history[:-1])), "a worker may be lost for any reason"
    assert suspect(job_of(*history))
    assert not suspect(job_of(*history, attempt_failed(), started(attempt=2)))


# ------------------------------------------------------------ redirection


def test_an_attempt_of_which_nothing_was_sent_goes_to_another_backend() -> None:
    given(submitted(), started()).when(REDIRECT).then(redirected())
    job = job_of(submitted(), started(), redirected())
    assert (job.status, job.attempt, job.backend) == (Status.RUNNING, 1, "http://other")


def test_every_redirection_has_its_own_number() -> None:
    given(submitted(), started(), redirected()).when(REDIRECT).then(redirected(redirection=2))


def test_only_whoever_has_the_attempt_may_redirect_it() -> None:
    given(submitted(), started(), adopted()).when(REDIRECT).then_raises(StaleAttempt, "adopted by worker-b")
    given(submitted()).when(REDIRECT).then_raises(StaleAttempt)
    given(submitted(), started(), cancelled(attempt=1)).when(REDIRECT).then_raises(StaleAttempt)


def test_a_redirected_attempt_ends_like_any_other() -> None:
    given(submitted(), started(), redirected()).when(COMPLETE).then(completed(waited_ms=1000, run_ms=7000))


def test_an_attempt_is_stranded_after_so_many_and_the_next_begins_afresh() -> None:
    history = [submitted(), started(), *(redirected(redirection=n) for n in range(1, MAX_REDIRECTIONS + 1))]
    assert not stranded(job_of(*history[:-1]))
    assert stranded(job_of(*history))
    assert not stranded(job_of(*history, attempt_failed(), started(attempt=2)))


@pytest.mark.parametrize(
    ("facts", "first", "second"),
    [
        ([], None, None),
        ([started()], "http://comfy", None),
        ([started(), adopted()], "http://comfy", None),
        ([started(), redirected()], "http://other", None),
        ([started(), attempt_failed()], None, None),
        ([started(), attempt_failed(), started(attempt=2)], None, "http://comfy"),
        ([started(), redirected(), completed()], None, None),
        ([started(), cancelled(attempt=1)], None, None),
        ([started(), failed(attempt=1)], None, None),
    ],
)
def test_an_attempt_is_held_where_it_is_under_way(
    facts: list[Event], first: str | None, second: str | None
) -> None:
    assert (held_at(facts, 1), held_at(facts, 2)) == (first, second)


def test_where_an_attempt_was_sent_is_known_for_ever() -> None:
    facts = [started(), redirected(), attempt_failed(), started(attempt=2, backend="http://third")]
    assert [sent_to(facts, attempt) for attempt in (1, 2, 3)] == ["http://other", "http://third", ""]


# ---------------------------------------------------------------- failure


def test_a_failed_attempt_waits_for_the_next() -> None:
    given(submitted(), started()).when(FAIL).then(attempt_failed(retry_at=after(9 + BACKOFF_SECONDS[0])))


def test_the_last_attempt_fails_the_job() -> None:
    history = [submitted()]
    for attempt in range(1, MAX_ATTEMPTS):
        history += [started(attempt=attempt), attempt_failed(attempt=attempt)]
    last = msgspec.structs.replace(FAIL, attempt=MAX_ATTEMPTS)
    given(*history, started(attempt=MAX_ATTEMPTS)).when(last).then(failed(attempt=MAX_ATTEMPTS))


def test_what_can_never_succeed_is_not_tried_again() -> None:
    final = msgspec.structs.replace(FAIL, final=True)
    given(submitted(), started()).when(final).then(failed(attempt=1))


def test_the_failure_of_an_older_attempt_says_nothing_about_this_one() -> None:
    given(submitted(), started(), attempt_failed(), started(attempt=2)).when(FAIL).then_raises(StaleAttempt)


def test_each_failure_waits_longer_until_the_longest_wait() -> None:
    waits = [backoff(attempt) for attempt in range(1, 7)]
    assert waits == sorted(waits)
    assert waits[:3] == list(BACKOFF_SECONDS)
    assert waits[3:] == [BACKOFF_SECONDS[-1]] * 3


# ------------------------------------------------------- cancel and retry


@pytest.mark.parametrize(
    "history",
    [(submitted(),), (submitted(), started()), (submitted(), started(), attempt_failed())],
    ids=["waiting", "running", "in back-off"],
)
def test_a_job_can_be_cancelled_wherever_it_is(history: tuple[Event, ...]) -> None:
    given(*history).when(Cancel()).then(cancelled(attempt=len(history) > 1))


def test_cancelling_twice_is_cancelling_once() -> None:
    given(*ENDS["cancelled"]).when(Cancel()).then_nothing()


@pytest.mark.parametrize("end", ["completed", "failed"])
def test_what_is_over_cannot_be_cancelled(end: str) -> None:
    given(*ENDS[end]).when(Cancel()).then_raises(JobAlreadyOver, end)


def test_a_failed_job_gets_new_attempts_behind_the_old_ones() -> None:
    given(*ENDS["failed"]).when(Retry()).then(
        retried(attempt=1, max_attempts=1 + MAX_ATTEMPTS, asset_type="npc_bust")
    )


@pytest.mark.parametrize(
    "history",
    [(submitted(),), (submitted(), started()), ENDS["completed"], ENDS["cancelled"]],
    ids=["waiting", "running", "completed", "cancelled"],
)
def test_only_a_failed_job_can_be_retried(history: tuple[Event, ...]) -> None:
    given(*history).when(Retry()).then_raises(JobNotFailed)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "command", [START, Adopt(1, "worker-b"), COMPLETE, FAIL], ids=lambda c: type(c).__name__
)
def test_a_worker_that_comes_late_changes_nothing(end: str, command: Command) -> None:
    given(*ENDS[end]).when(command).then_raises(StaleAttempt)


# ------------------------------------------------------------- as a whole


class LifeOfAJob(RuleBasedStateMachine):
    """Any commands in any order, each possibly said twice or by a worker of the past."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = 1
        self.job: Job = admitted(submitted(), 1, after(1))
        self.events: list[Event] = [submitted()]

    @rule(
        command=st.one_of(
            st.builds(Start, st.integers(1, 9), st.sampled_from("ab"), st.just("http://comfy"), st.just("")),
            st.builds(Adopt, st.integers(1, 9), st.sampled_from("ab")),
            st.builds(Complete, st.integers(1, 9), st.sampled_from("ab"), st.just(()), st.just(after(99))),
            st.builds(
                FailAttempt, st.integers(1, 9), st.just("x"), st.just("y"), st.booleans(), st.just(after(99))
            ),
            st.just(Cancel()),
            st.just(Retry()),
        )
    )
    def somebody_says(self, command: Command) -> None:
        self._say(command)

    @precondition(lambda self: not self.job.status.over)
    @rule(worker=st.sampled_from("ab"), outcome=st.sampled_from(["complete", "fail", "adopt"]))
    def work_goes_on(self, worker: str, outcome: str) -> None:
        job = self.job
        if job.status is Status.PENDING:
            self._say(Start(job.attempt + 1, worker, "http://comfy", ""))
        elif outcome == "complete":
            self._say(Complete(job.attempt, job.worker, (), after(99)))
        elif outcome == "fail":
            self._say(FailAttempt(job.attempt, "x", "y", False, after(99)))
        else:
            self._say(Adopt(job.attempt, worker))

    def _say(self, command: Command) -> None:
        try:
            events = decide(command, self.job)
        except ForgeError:
            return
        for event in events:
            self.seq += 1
            self.events.append(event)
            if isinstance(event, JobRetried):
                self.job = admitted(event, self.seq, after(self.seq))
            else:
                self.job = evolve(self.job, event, after(self.seq))

    @invariant()
    def no_attempt_starts_twice(self) -> None:
        attempts = [event.attempt for event in self.events if isinstance(event, JobStarted)]
        assert attempts == list(range(1, len(attempts) + 1))

    @invariant()
    def every_admission_ends_at_most_once(self) -> None:
        ended = 0
        for event in self.events:
            if isinstance(event, JobSubmitted | JobRetried):
                ended = 0
            else:
                assert not ended, "something happened to a job that was over"
                ended += isinstance(event, Terminal)

    @invariant()
    def nothing_follows_success_or_cancellation(self) -> None:
        ends = [
            n for n, e in enumerate(self.events) if isinstance(e, Terminal) and not isinstance(e, JobFailed)
        ]
        assert ends in ([], [len(self.events) - 1])

    @invariant()
    def no_admission_is_attempted_too_often(self) -> None:
        attempts = 0
        for event in self.events:
            attempts = 0 if isinstance(event, JobRetried) else attempts + isinstance(event, JobStarted)
            assert attempts <= MAX_ATTEMPTS

    @invariant()
    def the_log_alone_tells_the_state(self) -> None:
        assert self.job == job_of(*self.events)
        assert self.job.id == JOB
        assert (self.job.status is Status.COMPLETED) == isinstance(self.events[-1], JobCompleted)


TestLifeOfAJob = LifeOfAJob.TestCase
TestLifeOfAJob.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
