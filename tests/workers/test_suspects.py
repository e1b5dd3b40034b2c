"""Orders that were lost with two workers: any of them may be what ends workers, so they go one at a time."""

from __future__ import annotations

from uuid import UUID

import pytest

from forge.events.catalogue import Event
from forge.events.jobs import JobAdopted, JobCompleted
from forge.workers.attempt import Attempt
from waiting import wait_until
from workers.works import Works, ended, hold_before


@pytest.mark.fault("K9")
async def test_what_was_lost_twice_is_adopted_when_the_others_are_over(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching = hold_before(monkeypatch, Attempt, "_fetch")
    first = await works.start_worker()
    jobs = {await works.submit(nth) for nth in range(3)}
    for job in jobs:
        await works.happened(job, "started")
    await wait_until(lambda: len(works.simulator.memory.queue.history) == len(jobs), what="all are drawn")
    await ended(first)
    second = await works.start_worker()
    for job in jobs:
        await works.happened(job, "adopted")
    await ended(second)
    await works.start_worker()

    async def told() -> list[tuple[type[Event], UUID]]:
        return [
            (type(event), event.job_id)
            for event in await works.log()
            if isinstance(event, JobCompleted) or (isinstance(event, JobAdopted) and event.adoption == 2)
        ]

    await wait_until(told, 60, "one is adopted again")
    for nth in range(3, 6):  # time in which the others would be adopted, too
        await works.cancel(await works.submit(nth))
    fetching.opened.set()
    for job in jobs:
        await works.happened(job, "completed")
    life = await told()
    order = [job for kind, job in life if kind is JobAdopted]
    assert set(order) == jobs
    assert life == [(kind, job) for job in order for kind in (JobAdopted, JobCompleted)]
