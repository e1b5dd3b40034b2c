"""Given what happened, when something is asked for, then this follows: the job decider as a specification.

given(submitted(), started()).when(Cancel()).then(cancelled(attempt=1))
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from factories import Log
from forge.domain.jobs import Command, Job, admitted, decide, evolve
from forge.errors import ForgeError
from forge.events.catalogue import Event
from forge.events.jobs import JobRetried, JobSubmitted


class Given(msgspec.Struct, frozen=True):
    """A job as its events made it."""

    job: Job

    def when(self, command: Command) -> Decision:
        return Decision(lambda: decide(command, self.job))


class Decision(msgspec.Struct, frozen=True):
    """A command that is about to be decided."""

    made: Callable[[], list[Event]]

    def then(self, *events: Event) -> None:
        assert self.made() == list(events)

    def then_nothing(self) -> None:
        assert self.made() == []

    def then_raises(self, error: type[ForgeError], match: str | None = None) -> None:
        with pytest.raises(error, match=match):
            self.made()


def given(*events: Event) -> Given:
    """A job with this history; the n-th event stands at sequence n, n seconds after `NOW`."""
    return Given(job_of(*events))


def job_of(*events: Event) -> Job:
    log = Log()
    job: Job | None = None
    for event in events:
        record = log.add(event)
        if isinstance(event, JobSubmitted | JobRetried):
            job = admitted(event, record.seq, record.meta.at)
        else:
            assert job is not None, "a job begins with its submission"
            job = evolve(job, event, record.meta.at)
    assert job is not None
    return job
