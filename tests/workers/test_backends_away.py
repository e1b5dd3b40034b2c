"""A ComfyUI that refuses, hangs or comes back: no attempt is spent for nothing, and nothing stays behind."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import msgspec
import pytest

from comfyui.conformance.comfy_server import flat
from forge.comfyui.client import Comfy
from forge.comfyui.simulator import Faults
from forge.domain import jobs
from forge.domain.ids import prompt_id
from forge.events.jobs import JobCompleted, JobFailed, JobRedirected, JobStarted
from forge.events.system import MetricSampled
from forge.follower import follow
from forge.topology import ALL_METRICS, METRICS
from forge.workers import abandoned
from waiting import wait_until
from workers.works import HURRY, Hold, Works, hear_of_refusal, hold_before

Patch = pytest.MonkeyPatch
SOON_WEDGED = msgspec.structs.replace(HURRY, cancel=0.5)


# ------------------------------------------------------------------- refused connections


async def _about_to_post(works: Works, patch: Patch) -> tuple[UUID, Hold]:
    posting = hold_before(patch, Comfy, "submit")
    await works.start_worker()
    job = await works.submit()
    await posting.occupied()
    return job, posting


async def test_a_refused_connection_takes_the_attempt_to_the_fallback(
    two_comfyuis: Works, monkeypatch: Patch
) -> None:
    works = two_comfyuis
    job, posting = await _about_to_post(works, monkeypatch)
    await works.simulator.leave()
    posting.opened.set()
    await works.happened(job, "completed")
    assert await works.facts(job) == ["started", "redirected", "completed"]
    [redirected] = [e for e in await works.log() if isinstance(e, JobRedirected)]
    assert redirected.backend == works.simulators[1].url
    assert "fallback" in redirected.reason
    await works.ended_once(job, JobCompleted)
    await works.nothing_left(job)


async def test_a_refused_connection_waits_where_there_is_no_other_backend(
    works: Works, monkeypatch: Patch
) -> None:
    job, posting = await _about_to_post(works, monkeypatch)
    await works.simulator.leave()
    refusal = hear_of_refusal(monkeypatch)
    posting.opened.set()
    await asyncio.wait_for(refusal.wait(), 30)
    await works.simulator.come_back()
    await works.happened(job, "completed")
    assert await works.facts(job) == ["started", "redirected", "completed"]
    assert [e.attempt for e in await works.log() if isinstance(e, JobStarted)] == [1]
    await works.nothing_left(job)


async def test_an_attempt_does_not_go_round_for_ever(works: Works, monkeypatch: Patch) -> None:
    monkeypatch.setattr(jobs, "MAX_REDIRECTIONS", 0)
    job, posting = await _about_to_post(works, monkeypatch)
    await works.simulator.leave()
    posting.opened.set()
    await works.happened(job, "attempt_failed")
    await works.simulator.come_back()
    await works.happened(job, "completed")
    assert await works.facts(job) == ["started", "attempt_failed", "started", "completed"]
    await works.nothing_left(job, attempts=2)


# ------------------------------------------------------------------- hung


async def test_a_wedged_comfyui_is_left_and_used_again_when_it_executes(
    two_comfyuis: Works, monkeypatch: Patch
) -> None:
    works = two_comfyuis
    wedged, other = works.simulators
    works.time_out(0.3)
    works.patience = SOON_WEDGED
    wedged.faults = Faults(frozen=True)
    await works.start_worker()
    job = await works.submit()
    await works.runs(job)
    await works.happened(job, "attempt_failed")
    works.time_out(60)
    await works.happened(job, "completed")
    assert await works.facts(job) == ["started", "attempt_failed", "started", "completed"]
    assert works.backends.named(wedged.url) is not None
    assert [status.healthy for status in works.backends.status()] == [False, True]
    assert str(prompt_id(job, 1)) in works.present(wedged), "nobody can take it away"

    wedged.faults = Faults()
    await wait_until(lambda: works.backends.status()[0].healthy, what="it executes")
    again = await works.submit(2)
    await works.happened(again, "completed")
    assert [e.backend for e in await works.log() if isinstance(e, JobStarted)] == [
        wedged.url,
        other.url,
        wedged.url,
    ]
    await works.sweep_leftovers()
    await works.nothing_left(job, attempts=2)
    await works.nothing_left(again)


async def test_work_waits_while_the_only_comfyui_is_wedged(works: Works) -> None:
    works.time_out(0.3)
    works.patience = SOON_WEDGED
    works.simulator.faults = Faults(frozen=True)
    await works.start_worker()
    first = await works.submit(1)
    await works.happened(first, "attempt_failed")
    works.time_out(60)
    await wait_until(lambda: works.backends.choose() is None, what="it is in quarantine")
    second = await works.submit(2)
    await wait_until(lambda: works.ordered(second), what="its order is out")
    await works.simulator.forget()  # restarted, as an operator would
    works.simulator.faults = Faults()
    await works.happened(first, "completed")
    await works.happened(second, "completed")
    assert await works.facts(second) == ["started", "completed"], "waiting cost it nothing"
    await works.sweep_leftovers()
    await works.nothing_left(first, attempts=2)


async def test_a_lost_lease_sends_nothing(works: Works, monkeypatch: Patch) -> None:
    """A worker that was frozen behind its start: another one has the order by now."""
    from forge.workers.loop import Delivery

    sent = works.simulator.record.submitted
    job, posting = await _about_to_post(works, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Delivery, "held", property(lambda self: False))
        posting.opened.set()
        await wait_until(lambda: works.facts_include(job, "adopted", "attempt_failed"), 60, "others look")
        assert not sent
    await works.happened(job, "completed")
    assert str(prompt_id(job, 1)) not in sent


# ------------------------------------------------------------------- abandoned prompts


async def _submitted_late(works: Works, job: UUID, attempt: int, label: str | None = None) -> str:
    """A prompt as a worker would post it that woke up too late."""
    prompt = prompt_id(job, attempt)
    async with Comfy(works.simulator.url, HURRY) as comfy:
        graph = flat(f"forge/{job}/{attempt}/picture")
        await comfy.submit(prompt, graph, outputs=["2"], label=f"{job}/{attempt}" if label is None else label)
    return str(prompt)


async def test_a_prompt_that_nobody_waits_for_is_taken_out(works: Works, monkeypatch: Patch) -> None:
    monkeypatch.setattr(abandoned, "LOOK_SECONDS", 0.05)
    works.simulator.render(60_000, 60_000)
    await works.start_worker()
    over, current = await works.submit(1), await works.submit(2)
    await works.runs(over)
    await works.cancel(over)
    await works.nothing_left(over)
    await works.runs(current)
    late = await _submitted_late(works, over, 1)
    older = await _submitted_late(works, current, 2)
    stranger = await works.foreign()
    another_forges = await _submitted_late(works, uuid4(), 1)
    unlabelled = await _submitted_late(works, uuid4(), 1, label="")

    await wait_until(lambda: not {late, older} & works.present(), what="taken out")
    assert works.present() == {str(prompt_id(current, 1)), stranger, another_forges, unlabelled}
    await wait_until(lambda: works.backends.choose() is not None, what="it is used again")
    await works.cancel(current)
    await works.nothing_left(over)


async def test_a_server_is_given_nothing_until_it_is_rid_of_an_abandoned_prompt(
    works: Works, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(abandoned, "LOOK_SECONDS", 0.05)
    await works.start_worker()
    over = await works.submit(1)
    await works.happened(over, "completed")
    await works.nothing_left(over)
    cancelling = hold_before(monkeypatch, Comfy, "cancel")
    works.simulator.render(60_000, 60_000)
    late = await _submitted_late(works, over, 1)
    await cancelling.occupied()
    assert works.backends.choose() is None
    cancelling.opened.set()
    await wait_until(lambda: late not in works.present(), what="taken out")
    await wait_until(lambda: works.backends.choose() is not None, what="it is used again")


# ------------------------------------------------------------------- leftovers


async def test_leftovers_are_swept_and_what_cannot_be_removed_is_counted(works: Works) -> None:
    works.simulator.render(60_000, 60_000)
    await works.start_worker()
    over, current = await works.submit(1), await works.submit(2)
    await works.runs(over)
    await works.cancel(over)
    await works.nothing_left(over)
    await works.runs(current)
    ours = works.simulator.output / "forge"
    unknown = uuid4()
    for job, attempt in ((over, 1), (over, 2), (current, 1), (unknown, 1)):
        folder = ours / str(job) / str(attempt)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "picture_00001_.png").write_bytes(b"late")
    elsewhere = works.simulator.output.parent / "precious"
    elsewhere.mkdir()
    (elsewhere / "model").write_bytes(b"dear")
    (ours / str(over) / "3").symlink_to(elsewhere)

    await works.sweep_leftovers()
    assert sorted(path.name for path in ours.iterdir()) == sorted(map(str, (over, current, unknown)))
    assert [path.name for path in (ours / str(over)).iterdir()] == ["3"], "a link is not followed"
    assert (elsewhere / "model").exists()
    assert (await _samples(works))[-1] == (1, {works.simulator.url: 1})

    (ours / str(over) / "3").unlink()
    (ours / str(over)).rmdir()
    await works.sweep_leftovers()
    assert (await _samples(works))[-1] == (0, {works.simulator.url: 0})


async def _samples(works: Works) -> list[tuple[int, dict[str, int | None]]]:
    async for batch in follow(works.nc, 1, (ALL_METRICS,), stream=METRICS):
        told = [record.event for record in batch.records if isinstance(record.event, MetricSampled)]
        return [(e.value, e.details["by_backend"]) for e in told if e.metric_type == "comfyui_leftovers"]
    raise AssertionError("the stream ended")


async def test_a_job_that_fails_for_good_leaves_nothing(works: Works) -> None:
    swatch = works.workflows["swatch"]
    graph = {**swatch.graph, "1": {"class_type": "NoSuchNode", "inputs": {}}}
    works.workflows["swatch"] = msgspec.structs.replace(swatch, graph=graph)
    await works.start_worker()
    job = await works.submit()
    await works.happened(job, "failed")
    await works.nothing_left(job)
    await works.ended_once(job, JobFailed)
