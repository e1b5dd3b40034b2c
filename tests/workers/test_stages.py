"""Cancelled or out of time at every stage of its life, a job leaves nothing behind but its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any
from uuid import UUID

import msgspec
import pytest

from forge.comfyui.client import Comfy
from forge.comfyui.http import Http
from forge.comfyui.simulator import Faults
from forge.domain.ids import prompt_id
from forge.events.jobs import JobAttemptFailed, JobCancelled, JobCompleted
from forge.store import Store
from forge.workers import abandoned
from forge.workers.attempt import Attempt
from waiting import wait_until
from workers.works import Hold, Step, Works, hear_of_refusal, hold_after, hold_before

Patch = pytest.MonkeyPatch

SLOW, QUICK = (60_000, 60_000), (10, 20)

# ------------------------------------------------------------------ the stages, in the order of a job's life


async def waiting(works: Works, patch: Patch) -> UUID:
    await works.start_worker()
    works.simulator.render(*SLOW)
    works.others = [await works.submit(nth) for nth in range(3)]
    job = await works.submit(9)
    for one in works.others:
        await works.happened(one, "started")
    assert await works.facts(job) == []
    return job


async def ordered(works: Works, patch: Patch) -> UUID:
    job = await works.submit()
    await wait_until(lambda: works.ordered(job), what="its order is out")
    return job


async def started(works: Works, patch: Patch) -> UUID:
    posting = hold_before(patch, Comfy, "submit")
    await works.start_worker()
    job = await works.submit()
    await posting.occupied()
    assert await works.facts(job) == ["started"]
    return job


async def without_a_backend(works: Works, patch: Patch) -> UUID:
    posting = hold_before(patch, Comfy, "submit")
    await works.start_worker()
    job = await works.submit()
    await posting.occupied()
    await works.simulator.leave()
    refusal = hear_of_refusal(patch)
    posting.opened.set()
    await asyncio.wait_for(refusal.wait(), 30)
    return job


async def posting(works: Works, patch: Patch) -> UUID:
    """ComfyUI has the request and not yet the prompt, which it queues even if nobody listens any more."""
    works.simulator.render(*SLOW)
    works.simulator.faults = Faults(take_delay_ms=400)
    sent, ask = asyncio.Event(), Http.ask

    async def noted(http: Http, method: str, path: str, **more: Any) -> Any:
        if path == "/prompt" and method == "POST":
            sent.set()
        return await ask(http, method, path, **more)

    patch.setattr(Http, "ask", noted)
    await works.start_worker()
    job = await works.submit()
    await asyncio.wait_for(sent.wait(), 30)
    return job


async def queued(works: Works, patch: Patch) -> UUID:
    works.simulator.render(1500, 1500)
    await works.foreign()
    await works.start_worker()
    job = await works.submit()
    await wait_until(lambda: str(prompt_id(job, 1)) in works.present(), what="it waits at ComfyUI")
    return job


async def running(works: Works, patch: Patch) -> UUID:
    works.simulator.render(*SLOW)
    await works.start_worker()
    job = await works.submit()
    await works.runs(job)
    return job


async def finished(works: Works, patch: Patch) -> UUID:
    fetching = hold_before(patch, Attempt, "_fetch")
    await works.start_worker()
    job = await works.submit()
    await fetching.occupied()
    return job


async def fetching(works: Works, patch: Patch) -> UUID:
    half_way, fetch = Hold(), Comfy.fetch

    async def dripping(comfy: Comfy, *args: Any, **kwargs: Any) -> AsyncGenerator[bytes, None]:
        async for chunk in fetch(comfy, *args, **kwargs):
            yield chunk
            await half_way()

    patch.setattr(Comfy, "fetch", dripping)
    await works.start_worker()
    job = await works.submit()
    await half_way.occupied()
    return job


async def storing(works: Works, patch: Patch) -> UUID:
    keeping = hold_before(patch, Store, "keep")
    await works.start_worker()
    job = await works.submit()
    await keeping.occupied()
    return job


async def stored(works: Works, patch: Patch) -> UUID:
    """Its file stays until the scan for orphans: another job may be about to refer to the same content."""
    kept = hold_after(patch, Store, "keep")
    await works.start_worker()
    job = await works.submit()
    await kept.occupied()
    return job


async def backing_off(works: Works, patch: Patch) -> UUID:
    works.simulator.faults = Faults(fail_next=1)
    await works.start_worker()
    job = await works.submit()
    await works.happened(job, "attempt_failed")
    return job


async def adopted(works: Works, patch: Patch) -> UUID:
    works.simulator.render(*SLOW)
    first = await works.start_worker()
    job = await works.submit()
    await works.runs(job)
    first.cancel()
    await works.start_worker()
    await works.happened(job, "adopted")
    return job


CANCELLED: tuple[Step, ...] = (
    waiting,
    ordered,
    started,
    without_a_backend,
    posting,
    queued,
    running,
    finished,
    fetching,
    storing,
    stored,
    backing_off,
    adopted,
)


@pytest.mark.parametrize("stage", CANCELLED, ids=lambda stage: stage.__name__)
async def test_a_cancelled_job_leaves_nothing(stage: Step, works: Works, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        job = await stage(works, patch)
        if stage is not without_a_backend:
            works.simulator.render(*QUICK)
            strangers = asyncio.create_task(works.foreign())
        await works.cancel(job)
        if stage is ordered:
            await works.start_worker()
        if stage is posting:  # nothing is gone before it has come
            await wait_until(lambda: works.simulator.record.submitted[str(prompt_id(job, 1))], what="taken")
        await works.nothing_left(job)
    if stage is without_a_backend:
        await works.simulator.come_back()
    works.simulator.faults = Faults()
    await works.ended_once(job, JobCancelled)
    for one in works.others:
        await works.cancel(one)
    if stage is not without_a_backend:
        await strangers
        await _strangers_are_unharmed(works)
    await _three_places_are_free(works)
    await works.nothing_left(job)


async def _strangers_are_unharmed(works: Works) -> None:
    """Nothing but the job's own prompt was stopped."""
    history = works.simulator.memory.queue.history
    await wait_until(lambda: history.keys() >= set(works.strangers), what="others' prompts run")
    assert {history[id_]["status"]["status_str"] for id_ in works.strangers} == {"success"}


async def _three_places_are_free(works: Works) -> None:
    """Three jobs are at ComfyUI together."""
    works.simulator.render(*SLOW)
    jobs = [await works.submit(20 + nth) for nth in range(3)]
    prompts = {str(prompt_id(job, 1)) for job in jobs}
    await wait_until(lambda: prompts <= works.present(), what="three places are free")
    for job in jobs:
        await works.cancel(job)
    for job in jobs:
        await works.nothing_left(job)


# ----------------------------------------------------------------------------------------------- out of time


async def slow_behind_another(works: Works, patch: Patch) -> UUID:
    works.time_out(0.3)
    works.simulator.faults = Faults(frozen=True)
    await works.foreign()
    await works.start_worker()
    job = await works.submit()
    await works.happened(job, "attempt_failed")
    works.simulator.faults = Faults()
    return job


async def slow_to_run(works: Works, patch: Patch) -> UUID:
    works.time_out(0.3)
    works.patience = msgspec.structs.replace(works.patience, queue_factor=100)  # until it runs
    works.simulator.render(*SLOW)
    await works.start_worker()
    return await works.submit()


async def slow_to_take_the_prompt(works: Works, patch: Patch) -> UUID:
    """The answer to the POST is given up before ComfyUI queues the prompt: that comes to be all the same."""
    patch.setattr(abandoned, "LOOK_SECONDS", 0.1)
    given_up, ask = list[str](), Http.ask

    async def impatient(http: Http, method: str, path: str, **more: Any) -> Any:
        if path == "/prompt" and method == "POST" and not given_up:
            given_up.append(path)
            more["timeout"] = 0.3
        return await ask(http, method, path, **more)

    patch.setattr(Http, "ask", impatient)
    works.simulator.render(*SLOW)
    works.simulator.faults = Faults(take_delay_ms=1500)
    await works.start_worker()
    job = await works.submit()
    await works.happened(job, "attempt_failed")
    works.simulator.faults = Faults()
    await wait_until(lambda: works.simulator.record.submitted[str(prompt_id(job, 1))], what="taken after all")
    return job


async def slow_to_fetch(works: Works, patch: Patch) -> UUID:
    works.patience = msgspec.structs.replace(works.patience, fetch=1.0)
    fetching = hold_before(patch, Attempt, "_fetch")
    await works.start_worker()
    job = await works.submit()
    await fetching.occupied()
    works.simulator.faults = Faults(slow_http_ms=1500)
    fetching.opened.set()
    await works.happened(job, "attempt_failed")
    works.simulator.faults = Faults()
    return job


async def slow_when_adopted(works: Works, patch: Patch) -> UUID:
    works.time_out(0.5)
    hold_before(patch, Attempt, "_fail")  # the first worker dies in time
    works.simulator.render(*SLOW)
    first = await works.start_worker()
    job = await works.submit()
    await works.runs(job)
    first.cancel()
    patch.undo()
    await works.start_worker()
    await works.happened(job, "adopted")
    return job


OUT_OF_TIME: dict[Step, str] = {
    slow_behind_another: "prompt_timed_out",
    slow_to_run: "prompt_timed_out",
    slow_to_take_the_prompt: "backend_unreachable",
    slow_to_fetch: "backend_unreachable",
    slow_when_adopted: "prompt_timed_out",
}


@pytest.mark.parametrize("stage", OUT_OF_TIME, ids=lambda stage: stage.__name__)
async def test_an_attempt_out_of_time_leaves_nothing_and_is_made_again(
    stage: Step, works: Works, monkeypatch: Patch
) -> None:
    with monkeypatch.context() as patch:
        job = await stage(works, patch)
        await works.happened(job, "attempt_failed")
        works.simulator.render(*QUICK)
        works.time_out(60)
        await wait_until(lambda: str(prompt_id(job, 1)) not in works.present(), what="its prompt is gone")
        await works.happened(job, "completed")
    await works.sweep_leftovers()  # an unreachable ComfyUI keeps files until then
    await works.nothing_left(job, attempts=2)
    await works.ended_once(job, JobCompleted)
    failures = [e for e in await works.log() if isinstance(e, JobAttemptFailed) and e.job_id == job]
    assert [(e.attempt, e.code) for e in failures] == [(1, OUT_OF_TIME[stage])]
