"""One order in two hands of one worker, as after a server that was killed right after delivering it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from forge.domain.ids import prompt_id
from forge.workers.attempt import Attempt
from forge.workers.loop import Outcome
from waiting import wait_until
from workers.works import Works


@pytest.mark.fault("B2")
async def test_of_two_hands_with_one_order_one_draws(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Attempt] = []
    both, start = asyncio.Event(), Attempt._start

    async def held(attempt: Attempt) -> Any:
        begun.append(attempt)
        await asyncio.wait_for(both.wait(), 30)
        return await start(attempt)

    monkeypatch.setattr(Attempt, "_start", held)
    await works.start_worker()
    job = await works.submit()
    await wait_until(lambda: begun, what="one has it")
    await begun[0].delivery.settle(Outcome.RELEASE)  # what a server does that has forgotten the lease
    await wait_until(lambda: len(begun) == 2, what="two have it")
    both.set()
    await works.happened(job, "completed")
    assert works.simulator.record.submitted[str(prompt_id(job, 1))] == 1
    await works.nothing_left(job)
