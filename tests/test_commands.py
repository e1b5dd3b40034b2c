"""Asking twice, at once, and while somebody else does: the log decides, whatever a process believes."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, aclosing
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from nats.aio.client import Client

from factories import HASH, after, meta, produced, request, stored
from forge import topology
from forge.admissions import Admissions, fingerprint
from forge.broker import connect
from forge.commands import SUBMIT_SECONDS, Jobs, Loaded
from forge.domain.dispatch import Line
from forge.domain.ids import keyed_job_id
from forge.domain.jobs import Cancel, Complete, FailAttempt, Start, Status
from forge.domain.limits import MAX_SESSION_BYTES
from forge.embedded import EmbeddedNats
from forge.errors import (
    ForgeError,
    JobNotFailed,
    KeyReused,
    Limit,
    LimitReached,
    LogUnavailable,
    NotFound,
    QueueFull,
    StaleAttempt,
)
from forge.events.assets import AssetStored
from forge.events.jobs import JobCompleted, JobSubmitted
from forge.eventstore import Draft, EventStore
from forge.follower import follow
from forge.library import Library, Shelf
from forge.store import Store
from processes import freeze
from waiting import wait_until

Process = Callable[..., Awaitable[Admissions]]

PATIENCE = "forge.admissions.SUBMIT_SECONDS"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine too busy for an answer within a second is not what these tests are about."""
    monkeypatch.setattr(PATIENCE, 30.0)


@pytest.fixture
async def process(nats_server: EmbeddedNats, nats_client: Client) -> AsyncIterator[Process]:
    """Start what an API process has: a connection, a line that follows the log, admissions over both."""
    async with AsyncExitStack() as stack:

        async def start(
            queue_limit: int = 1000,
            rate_per_hour: int = 1000,
            hearing: bool = True,
            blobs: Store | None = None,
        ) -> Admissions:
            nc = await connect(nats_server.url, "api")
            stack.push_async_callback(nc.close)
            admissions = Admissions(
                EventStore(nc),
                Line(),
                queue_limit=queue_limit,
                rate_per_hour=rate_per_hour,
                shelf=Shelf(EventStore(nc), blobs, lambda _: 3600) if blobs else None,
            )
            listening = asyncio.create_task(_listen(nc, admissions))
            stack.push_async_callback(_ended, listening)
            await asyncio.wait_for(admissions.caught_up.wait(), 30)
            if not hearing:
                await _ended(listening)
            return admissions

        yield start


async def _listen(nc: Client, admissions: Admissions) -> None:
    async with aclosing(follow(nc, 1)) as batches:
        async for batch in batches:
            for record in batch.records:
                admissions.apply(record)
            if batch.caught_up:
                admissions.caught_up.set()
            async with admissions.moved:
                admissions.moved.notify_all()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def submit(admissions: Admissions, user: str = "mei", **fields: object) -> Loaded:
    [loaded] = await admissions.submit(user, [request(**fields)], actor=f"player:{user}")
    return loaded


def keyed(key: str, user: str = "mei", **fields: object) -> dict[str, object]:
    return {"id": keyed_job_id(user, key), "keyed": True, **fields}


async def start(jobs: Jobs, loaded: Loaded) -> Loaded:
    attempt = loaded.job.attempt + 1
    return await jobs.act(
        loaded, Start(attempt, "a", "http://comfy", "first"), actor="worker", name=f"{attempt}/start/a"
    )


async def finish(jobs: Jobs, loaded: Loaded) -> Loaded:
    job = (await start(jobs, loaded)).job
    loaded = await jobs.load(job.user_id, job.id, job.submitted_seq, job.admitted_seq)
    command = Complete(loaded.job.attempt, "a", (), after(9))
    return await jobs.act(loaded, command, actor="worker", name=f"{loaded.job.attempt}/complete/a")


async def fail(jobs: Jobs, loaded: Loaded) -> Loaded:
    loaded = await start(jobs, loaded)
    command = FailAttempt(loaded.job.attempt, "prompt_failed", "no memory", True, after(9))
    return await jobs.act(loaded, command, actor="worker", name=f"{loaded.job.attempt}/fail/a")


async def everything(events: EventStore) -> list[str]:
    records = [await events.at(seq) for seq in range(1, await events.head() + 1)]
    return [record.event.type for record in records if record]


# ----------------------------------------------------------------- submitting


async def test_a_request_becomes_a_job_in_the_log(process: Process, events: EventStore) -> None:
    admissions = await process()
    loaded = await submit(admissions, priority=3)
    assert (loaded.job.status, loaded.job.priority, loaded.seq) == (Status.PENDING, 3, 1)
    record = await events.at(1)
    assert record is not None
    assert isinstance(record.event, JobSubmitted)
    assert (record.event.job_id, record.meta.actor) == (loaded.job.id, "player:mei")
    assert admissions.line.pending == 1


async def test_the_same_key_is_the_same_job_for_ever(process: Process, events: EventStore) -> None:
    admissions, jobs = await process(), Jobs(events)
    first = await submit(admissions, **keyed("k"))
    assert (await submit(admissions, **keyed("k"))).job == first.job
    await start(jobs, first)
    assert (await submit(admissions, **keyed("k"))).job.status is Status.RUNNING
    await finish(jobs, await submit(admissions, **keyed("other")))
    over = await jobs.load("mei", first.job.id, 1)
    await jobs.act(over, Cancel(), actor="mei", name="cancel")
    await wait_until(lambda: first.job.id not in admissions.line.jobs)
    assert (await submit(admissions, **keyed("k"))).job.status is Status.CANCELLED
    assert (await submit(admissions, **keyed("other"))).job.status is Status.COMPLETED
    assert (await everything(events)).count("job.submitted") == 2


@pytest.mark.parametrize("end", ["waits", "completed", "cancelled"])
async def test_the_same_key_with_another_body_is_refused(
    process: Process, events: EventStore, end: str
) -> None:
    admissions, jobs = await process(), Jobs(events)
    first = await submit(admissions, **keyed("k"))
    if end == "completed":
        await finish(jobs, first)
    elif end == "cancelled":
        await jobs.act(first, Cancel(), actor="mei", name="cancel")
    await wait_until(lambda: end == "waits" or not admissions.line.jobs)
    with pytest.raises(KeyReused):
        await submit(admissions, **keyed("k", fingerprint="1" * 64))
    assert (await everything(events)).count("job.submitted") == 1


async def test_a_key_is_a_users_own(process: Process) -> None:
    admissions = await process()
    mine = await submit(admissions, "mei", **keyed("k", "mei"))
    theirs = await submit(admissions, "lin", **keyed("k", "lin"))
    assert mine.job.id != theirs.job.id


async def test_a_batch_is_admitted_side_by_side(process: Process) -> None:
    admissions = await process()
    await submit(admissions)
    made = await admissions.submit("mei", [request() for _ in range(9)], actor="mei")
    assert [loaded.seq for loaded in made] == list(range(2, 11))
    assert admissions.line.pending == 10


async def test_of_a_batch_all_are_admitted_or_none(process: Process, events: EventStore) -> None:
    admissions = await process(queue_limit=5)
    await submit(admissions, **keyed("k"))
    with pytest.raises(KeyReused):
        await admissions.submit(
            "mei", [request(), request(**keyed("k", fingerprint="1" * 64)), request()], actor="mei"
        )
    with pytest.raises(QueueFull):
        await admissions.submit("mei", [request() for _ in range(5)], actor="mei")
    assert await events.head() == 1
    await admissions.submit("mei", [request() for _ in range(4)], actor="mei")
    assert await events.head() == 5


async def test_a_batch_that_was_asked_for_before_answers_with_its_jobs(
    process: Process, events: EventStore
) -> None:
    admissions = await process()
    asked = [request(**keyed(f"k{nth}")) for nth in range(3)]
    first = await admissions.submit("mei", asked, actor="mei")
    again = await admissions.submit("mei", [*asked, request(**keyed("new"))], actor="mei")
    assert [loaded.job for loaded in again[:3]] == [loaded.job for loaded in first]
    assert await events.head() == 4


async def test_a_full_queue_still_answers_for_jobs_it_has(process: Process, events: EventStore) -> None:
    admissions, jobs = await process(queue_limit=2), Jobs(events)
    broken = await submit(admissions, **keyed("broken"))
    await fail(jobs, broken)
    await wait_until(lambda: not admissions.line.jobs)
    await submit(admissions, **keyed("one"))
    await submit(admissions, **keyed("two"))
    with pytest.raises(QueueFull, match="2 jobs wait already, and 2 may"):
        await submit(admissions, **keyed("three"))
    with pytest.raises(QueueFull):
        await admissions.retry("mei", broken.job.id, 1, actor="mei")
    assert (await submit(admissions, **keyed("one"))).job.status is Status.PENDING


def test_a_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [1, {"x": 1, "y": 2}]}) == fingerprint(
        {"b": [1, {"y": 2, "x": 1}], "a": 1}
    )
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


# --------------------------------------------------------------------- races


async def test_two_processes_admit_for_one_user_without_losing_or_doubling(
    process: Process, events: EventStore
) -> None:
    one, other = await process(), await process()
    made = await asyncio.gather(*(submit(p) for _ in range(5) for p in (one, other)))
    assert len({loaded.job.id for loaded in made}) == 10
    assert sorted(loaded.seq for loaded in made) == list(range(1, 11))
    assert await events.head() == 10
    await wait_until(lambda: one.line.pending == other.line.pending == 10)
    assert one.line.order() == other.line.order()


async def test_one_key_at_two_processes_at_once_is_one_job(process: Process, events: EventStore) -> None:
    one, other = await process(), await process()
    for nth in range(10):
        a, b = await asyncio.gather(*(submit(p, **keyed(f"k{nth}")) for p in (one, other)))
        assert a.job.id == b.job.id
        assert await events.head() == nth + 1


async def test_one_key_with_two_bodies_at_two_processes_is_one_job_and_one_refusal(
    process: Process, events: EventStore
) -> None:
    one, other = await process(), await process()
    for nth in range(10):
        asked = (submit(one, **keyed(f"k{nth}")), submit(other, **keyed(f"k{nth}", fingerprint="1" * 64)))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sorted(type(answer) for answer in answers if isinstance(answer, ForgeError)) == [KeyReused]
        assert await events.head() == nth + 1


async def test_a_batch_whose_answer_was_lost_is_not_admitted_again(
    process: Process, events: EventStore
) -> None:
    """No key: the process itself decides again, after its own batch and somebody's job behind it."""
    one, other = await process(), await process()
    asked = [request() for _ in range(3)]
    drafts: list[list[Draft]] = []
    append = one.store.append

    async def losing(given: list[Draft], *, within: float) -> object:
        drafts.append(given)
        if len(drafts) == 1:
            await append(given)
            await submit(other)
        return await append(given, within=within)

    one.store.append = losing  # type: ignore[method-assign,assignment]
    made = await one.submit("mei", asked, actor="mei")
    assert [loaded.job.id for loaded in made] == [r.id for r in asked]
    assert (await everything(events)).count("job.submitted") == 4


async def test_a_process_that_hears_nothing_says_so_in_time(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf, other = await process(hearing=False), await process()
    await submit(other)
    monkeypatch.setattr(PATIENCE, SUBMIT_SECONDS)
    async with asyncio.timeout(10):
        with pytest.raises(LogUnavailable, match="does not hear from its log"):
            await submit(deaf)


async def test_a_frozen_log_is_told_to_everybody_in_about_a_second(
    process: Process, nats_server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    admissions = await process()
    await submit(admissions)
    assert nats_server.process is not None
    await freeze(nats_server.process.pid)
    try:
        monkeypatch.setattr(PATIENCE, SUBMIT_SECONDS)
        began = time.monotonic()
        asked = [submit(admissions, user) for user in ("mei", "lin") for _ in range(20)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        took = time.monotonic() - began
    finally:
        nats_server.process.send(signal.SIGCONT)
    assert {type(answer) for answer in answers} == {LogUnavailable}
    assert took < 8 < 20 * SUBMIT_SECONDS, "the last one waited for all before it"
    monkeypatch.setattr(PATIENCE, 30.0)
    assert (await submit(admissions)).job.status is Status.PENDING


# ----------------------------------------------------------------------- retry


async def test_a_failed_job_is_admitted_again(process: Process, events: EventStore) -> None:
    admissions, jobs = await process(), Jobs(events)
    loaded = await submit(admissions, priority=2)
    for attempts in (1, 2, 3):
        await fail(jobs, loaded)
        await wait_until(lambda: not admissions.line.jobs)
        loaded = await admissions.retry("mei", loaded.job.id, 1, actor="mei")
        job = loaded.job
        assert (job.status, job.attempt, job.max_attempts) == (Status.PENDING, attempts, attempts + 3)
        assert (job.submitted_seq, job.admitted_seq, job.priority) == (1, loaded.seq, 2)
        assert loaded.request.job_id == job.id
    done = await finish(jobs, loaded)
    assert done.job.status is Status.COMPLETED


@pytest.mark.parametrize("state", ["pending", "running", "completed", "cancelled"])
async def test_only_a_failed_job_is_retried(process: Process, events: EventStore, state: str) -> None:
    admissions, jobs = await process(), Jobs(events)
    loaded = await submit(admissions)
    if state == "running":
        await start(jobs, loaded)
    elif state == "completed":
        await finish(jobs, loaded)
    elif state == "cancelled":
        await jobs.act(loaded, Cancel(), actor="mei", name="cancel")
    line, over = admissions.line.jobs, state in ("completed", "cancelled")
    await wait_until(lambda: not line if over else line[loaded.job.id].status == state)
    with pytest.raises(JobNotFailed):
        await admissions.retry("mei", loaded.job.id, 1, actor="mei")


async def test_two_processes_retry_a_job_once(process: Process, events: EventStore) -> None:
    one, other, jobs = await process(), await process(), Jobs(events)
    loaded = await submit(one)
    for nth in range(5):
        await fail(jobs, loaded)
        await wait_until(lambda: not one.line.jobs and not other.line.jobs)
        asked = (p.retry("mei", loaded.job.id, 1, actor="mei") for p in (one, other, one))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        retried = [answer for answer in answers if isinstance(answer, Loaded)]
        assert len({again.seq for again in retried}) == 1
        assert {type(a) for a in answers if isinstance(a, BaseException)} <= {JobNotFailed}
        loaded = retried[0]
        assert (await everything(events)).count("job.retried") == nth + 1


async def test_another_users_job_is_not_there(process: Process, events: EventStore) -> None:
    admissions, jobs = await process(), Jobs(events)
    loaded = await submit(admissions)
    await submit(admissions)
    with pytest.raises(NotFound):
        await jobs.load("mei", loaded.job.id, 2)
    with pytest.raises(NotFound):
        await jobs.load("mei", loaded.job.id, 9)


# --------------------------------------------------------------------- one job


async def test_a_cancelled_job_takes_no_result(process: Process, events: EventStore) -> None:
    admissions, jobs = await process(), Jobs(events)
    running = await start(jobs, await submit(admissions))
    await jobs.act(running, Cancel(), actor="mei", name="cancel")
    command = Complete(1, "a", (), after(9))
    counted = partial(Library(events).entries, [stored(running.job.id)])
    with pytest.raises(StaleAttempt):
        await jobs.act(running, command, actor="worker", name="1/complete/a", before=counted)
    assert await everything(events) == ["job.submitted", "job.started", "job.cancelled"]


async def test_cancelling_and_completing_at_once_has_one_winner(process: Process, events: EventStore) -> None:
    admissions, jobs = await process(), Jobs(events)
    for _ in range(10):
        running = await start(jobs, await submit(admissions))
        complete = Complete(1, "a", (), after(9))
        answers = await asyncio.gather(
            jobs.act(running, Cancel(), actor="mei", name="cancel"),
            jobs.act(running, complete, actor="worker", name="1/complete/a"),
            return_exceptions=True,
        )
        assert len([answer for answer in answers if isinstance(answer, Loaded)]) == 1
    told = await everything(events)
    assert told.count("job.cancelled") + told.count("job.completed") == 10


async def test_saying_it_twice_does_it_once(process: Process, events: EventStore) -> None:
    admissions, jobs = await process(), Jobs(events)
    loaded = await submit(admissions)
    one, other = await asyncio.gather(
        *(jobs.act(loaded, Cancel(), actor="mei", name="cancel") for _ in range(2))
    )
    assert one.job.status is other.job.status is Status.CANCELLED
    assert await everything(events) == ["job.submitted", "job.cancelled"]


async def test_two_workers_start_an_attempt_once(process: Process, events: EventStore) -> None:
    admissions, jobs = await process(), Jobs(events)
    loaded = await submit(admissions)
    starts = (
        jobs.act(loaded, Start(1, worker, "", ""), actor=worker, name=f"1/start/{worker}") for worker in "ab"
    )
    answers = await asyncio.gather(*starts, return_exceptions=True)
    assert sorted(type(a).__name__ for a in answers) == ["Loaded", "StaleAttempt"]


async def test_what_is_loaded_is_what_was_acted(process: Process, events: EventStore) -> None:
    admissions, jobs = await process(), Jobs(events)
    done = await finish(jobs, await submit(admissions))
    loaded = await jobs.load("mei", done.job.id, 1)
    assert loaded == done
    assert [type(fact.event) for fact in loaded.facts][-1] is JobCompleted


# -------------------------------------------------------------------- limits


async def outcomes(asked: Iterable[Awaitable[Loaded]]) -> tuple[list[Loaded], list[ForgeError]]:
    """What came of requests that were made at the same moment; nothing but a refusal may go wrong."""
    answers = await asyncio.gather(*asked, return_exceptions=True)
    made = [answer for answer in answers if isinstance(answer, Loaded)]
    refused = [answer for answer in answers if isinstance(answer, LimitReached | QueueFull)]
    assert len(made) + len(refused) == len(answers), answers
    return made, refused


async def test_of_a_hundred_at_once_at_two_processes_ten_are_granted(
    process: Process, events: EventStore
) -> None:
    one, other = await process(), await process()
    made, refused = await outcomes(submit(p) for _ in range(50) for p in (one, other))
    assert (len(made), len(refused)) == (10, 90)
    assert await events.head() == 10
    limit = refused[0].limit if isinstance(refused[0], LimitReached) else None
    assert limit == Limit("queued_jobs", 10, 10)


async def test_a_job_that_is_over_makes_a_place(process: Process, events: EventStore) -> None:
    admissions, jobs = await process(), Jobs(events)
    first, *_ = [await submit(admissions) for _ in range(10)]
    with pytest.raises(LimitReached):
        await submit(admissions)
    await start(jobs, first)
    with pytest.raises(LimitReached):  # one that runs is in the queue still
        await submit(admissions)
    running = await jobs.load("mei", first.job.id, 1)
    await jobs.act(running, Complete(1, "a", (), after(9)), actor="worker", name="1/complete/a")
    await wait_until(lambda: admissions.line.queued("mei") == 9)
    await submit(admissions)


async def test_a_limit_is_a_users_own(process: Process) -> None:
    admissions = await process()
    for _ in range(10):
        await submit(admissions, "mei")
    await submit(admissions, "lin")


async def test_a_batch_counts_as_its_jobs(process: Process, events: EventStore) -> None:
    admissions = await process()
    await submit(admissions)
    with pytest.raises(LimitReached):
        await admissions.submit("mei", [request() for _ in range(10)], actor="mei")
    with pytest.raises(LimitReached, match="11 at once never fit"):
        await admissions.submit("lin", [request() for _ in range(11)], actor="lin")
    assert await events.head() == 1


async def test_what_was_granted_before_is_answered_beyond_the_limit(process: Process) -> None:
    admissions = await process(rate_per_hour=1)
    first = await submit(admissions, **keyed("k"))
    with pytest.raises(LimitReached):
        await submit(admissions, **keyed("other"))
    assert (await submit(admissions, **keyed("k"))).job == first.job


async def test_the_hour_is_exact_at_two_processes(process: Process, events: EventStore) -> None:
    one, other = await process(rate_per_hour=3), await process(rate_per_hour=3)
    made, refused = await outcomes(submit(p) for _ in range(10) for p in (one, other))
    assert (len(made), len(refused)) == (3, 17)
    limits = [error.limit for error in refused if isinstance(error, LimitReached)]
    granted_at = made[0].job.admitted_at
    assert {limit.name for limit in limits} == {"generations_per_hour"}
    assert all(limit.resets_at and limit.resets_at >= granted_at + timedelta(hours=1) for limit in limits)


async def test_a_retry_is_a_generation_too(process: Process, events: EventStore) -> None:
    admissions, jobs = await process(rate_per_hour=1), Jobs(events)
    broken = await submit(admissions)
    await fail(jobs, broken)
    await wait_until(lambda: not admissions.line.jobs)
    with pytest.raises(LimitReached):
        await admissions.retry("mei", broken.job.id, 1, actor="mei")


async def test_the_queue_of_all_is_exact_at_two_processes(process: Process, events: EventStore) -> None:
    one, other = await process(queue_limit=12), await process(queue_limit=12)
    made, refused = await outcomes(
        submit(p, f"user-{nth}-{name}") for nth in range(20) for name, p in (("a", one), ("b", other))
    )
    assert (len(made), len(refused)) == (12, 28)
    assert await events.head() == 12


async def test_a_character_is_not_drawn_more_than_it_may_have(process: Process) -> None:
    admissions = await process()
    wanted = {"character_id": "c", "pictures": 40}
    for user in ("mei", "lin"):
        await submit(admissions, user, **wanted)
    with pytest.raises(LimitReached, match="80 are coming") as refused:
        await submit(admissions, "tao", **wanted)
    assert refused.value.limit.name == "character_assets"
    await submit(admissions, "tao", character_id="c", pictures=20)
    await submit(admissions, "tao", character_id="another", pictures=40)


async def test_a_session_is_not_drawn_more_than_it_may_hold(process: Process, events: EventStore) -> None:
    admissions = await process()
    full = stored(session_id="s", file_size_bytes=1000, session_bytes=MAX_SESSION_BYTES - 1001)
    await events.append([Draft(full, meta("so far"), topology.session("s"), 0)])
    await wait_until(lambda: admissions.balances.session("s"))
    await submit(admissions, session_id="s")
    with pytest.raises(LimitReached, match="session_bytes"):
        await submit(admissions, session_id="s")


# --------------------------------------------------------------------- reuse


async def drawn(
    admissions: Admissions, events: EventStore, blobs: Store, recipe: str, **asked: object
) -> Loaded:
    """A job that was drawn the ordinary way, its picture on the volume."""
    loaded = await start(Jobs(events), await submit(admissions, recipe=recipe, **asked))
    picture = stored(loaded.job.id, content_hash=HASH)
    path = blobs.path(HASH, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"a picture")
    command = Complete(1, "a", (produced(HASH),), after(9))
    before = partial(Library(events).entries, [picture])
    done = await Jobs(events).act(loaded, command, actor="w", name="1/complete", before=before)
    await wait_until(lambda: admissions.results.find(recipe))
    return done


@pytest.fixture
def blobs(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.open()
    return store


async def test_what_was_drawn_before_is_answered_at_once(
    process: Process, events: EventStore, blobs: Store
) -> None:
    admissions, jobs = await process(rate_per_hour=2, blobs=blobs), Jobs(events)
    await drawn(admissions, events, blobs, "r")
    asked = {"recipe": "r", "session_id": "s", "character_id": "c", **keyed("k", "lin")}
    again = await submit(admissions, "lin", **asked)
    assert again.job.status is Status.COMPLETED
    told = await everything(events)
    assert told[-4:] == ["job.submitted", "asset.stored", "asset.ready", "job.completed"]
    stored_ = await events.at(again.seq - 2)
    assert stored_ is not None
    assert isinstance(stored_.event, AssetStored)
    assert (stored_.event.user_id, stored_.event.session_id) == ("lin", "s")
    assert admissions.limits("lin")[1].used == 0, "nothing was drawn"
    # for ever, whatever process is asked
    elsewhere = await process(blobs=blobs)
    assert (
        await submit(elsewhere, "lin", recipe="r", session_id="s", character_id="c", **keyed("k", "lin"))
    ) == again
    assert await jobs.submitted_seq("lin", again.job.id) == again.job.submitted_seq


async def test_it_is_answered_even_to_who_may_not_have_more_drawn(
    process: Process, events: EventStore, blobs: Store
) -> None:
    admissions = await process(rate_per_hour=1, blobs=blobs)
    await drawn(admissions, events, blobs, "r")
    with pytest.raises(LimitReached):
        await submit(admissions, recipe="another")
    assert (await submit(admissions, recipe="r")).job.status is Status.COMPLETED


async def test_a_picture_that_is_gone_is_drawn_again(
    process: Process, events: EventStore, blobs: Store
) -> None:
    admissions = await process(blobs=blobs)
    await drawn(admissions, events, blobs, "r")
    blobs.path(HASH, "png").unlink()
    assert (await submit(admissions, recipe="r")).job.status is Status.PENDING


async def test_what_is_lent_counts_for_whom_it_is_lent(
    process: Process, events: EventStore, blobs: Store
) -> None:
    admissions = await process(blobs=blobs)
    await drawn(admissions, events, blobs, "r")
    full = stored(session_id="s", session_bytes=MAX_SESSION_BYTES)
    await events.append([Draft(full, meta("so far"), topology.session("s"), 0)])
    head = await events.head()
    with pytest.raises(LimitReached, match="session_bytes"):
        await submit(admissions, recipe="r", session_id="s")
    assert await events.head() == head


async def test_one_key_answered_at_once_at_two_processes_is_one_job(
    process: Process, events: EventStore, blobs: Store
) -> None:
    one, other = await process(blobs=blobs), await process(blobs=blobs)
    await drawn(one, events, blobs, "r")
    await wait_until(lambda: other.results.find("r"))
    for nth in range(5):
        a, b = await asyncio.gather(*(submit(p, recipe="r", **keyed(f"k{nth}")) for p in (one, other)))
        assert (a.job.id, a.job.status) == (b.job.id, Status.COMPLETED)
    assert (await everything(events)).count("job.submitted") == 6
