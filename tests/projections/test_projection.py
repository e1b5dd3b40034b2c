"""Any batching gives the same rows; the checkpoint moves with them; of two projectors one wins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from factories import (
    Log,
    accessed,
    adopted,
    after,
    attempt_failed,
    cancelled,
    completed,
    deleted,
    failed,
    job_id,
    reads,
    ready,
    redirected,
    retried,
    sampled,
    started,
    stored,
    submitted,
    upload_expired,
    upload_renewed,
    upload_stored,
)
from folding import ALL, fold, tables
from forge.database import Pool
from forge.errors import Conflict
from forge.events.catalogue import Event
from forge.events.envelope import Recorded
from forge.events.system import MetricSampled
from forge.projections.projection import Add, Change, Create, Projection, Put, Run, Table, advance
from forge.projections.queue import queue

property_of_real_tables = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# Not only what forge would write: facts of jobs nobody submitted, things said twice, in any order.
FACTS: dict[str, Callable[[int], Event]] = {
    "submitted": lambda n: submitted(
        job_id(n % 4 + 1), priority=n % 10 + 1, session_id="s" if n % 2 else None
    ),
    "retried": lambda n: retried(job_id(n % 4 + 1), attempt=n),
    "started": lambda n: started(job_id(n % 4 + 1), attempt=n),
    "adopted": lambda n: adopted(job_id(n % 4 + 1), worker=f"worker-{n}"),
    "redirected": lambda n: redirected(job_id(n % 4 + 1), backend=f"http://comfy-{n}"),
    "attempt_failed": lambda n: attempt_failed(job_id(n % 4 + 1), retry_at=after(n)),
    "completed": lambda n: completed(job_id(n % 4 + 1), run_ms=n * 700, cached=n % 3 == 0),
    "failed": lambda n: failed(job_id(n % 4 + 1), message=f'it\'s "broken" \\ {n} 雪'),
    "cancelled": lambda n: cancelled(job_id(n % 4 + 1)),
    "stored": lambda n: stored(
        job_id(n % 4 + 1),
        content_hash=f"{n % 2}" * 64,
        expires_at=None if n % 3 == 0 else after(n * 60),
        generation_params={"prompt": 'a "crane"', "seed": 2**53 + n, "cfg": 1.5 + n, "tags": [None, {}]},
        session_id=None if n % 2 else "s",
    ),
    "ready": lambda n: ready(job_id(n % 4 + 1)),
    "deleted": lambda n: deleted(job_id(n % 4 + 1), content_hash=f"{n % 2}" * 64),
    "upload_stored": lambda n: upload_stored(content_hash=f"{n % 2}" * 64, expires_at=after(n)),
    "upload_renewed": lambda n: upload_renewed(content_hash=f"{n % 2}" * 64, expires_at=after(n * 60)),
    "upload_expired": lambda n: upload_expired(content_hash=f"{n % 2}" * 64),
    "accessed": lambda n: accessed(
        reads("mei", f"{n % 2}" * 64, n + 1, last_at=after(n)), reads("lan", "1" * 64, 2, first_at=after(-n))
    ),
}
histories = st.lists(st.tuples(st.sampled_from(sorted(FACTS)), st.integers(0, 12)), min_size=1, max_size=40)
batchings = st.lists(st.integers(1, 20), min_size=1, max_size=4)


@given(history=histories, sizes=batchings)
@property_of_real_tables
async def test_any_batching_gives_the_same_rows(
    pool: Pool, history: list[tuple[str, int]], sizes: list[int]
) -> None:
    log = Log()
    for fact, number in history:
        log.add(FACTS[fact](number))
    async with pool.acquire() as connection:
        seen = []
        for batching in ([1], sizes, [len(history)]):
            transaction = connection.transaction()
            await transaction.start()
            await fold(connection, log.records, batching)
            seen.append(await tables(connection))
            await transaction.rollback()
    assert seen[0] == seen[1] == seen[2]


# ------------------------------------------------------------------ changes

THING = Table("thing", ("id",))
_MAKE = "create temporary table thing (id int primary key, a text, b int, n bigint not null default 0)"


def things() -> Projection:
    """A projection whose events say in words what they change."""
    projection = Projection("things", version=1, tables=[THING])

    @projection.on(MetricSampled)
    def told(event: MetricSampled, record: Recorded) -> Iterable[Change]:
        what, id_, value = event.details["what"], event.details["id"], event.value
        match what:
            case "create":
                yield Create(THING, {"id": id_, "a": f"made {value}", "b": value})
            case "grow":
                yield Create(THING, {"id": id_, "b": value if value % 3 else None}, latest=("b",))
            case "put a":
                yield Put(THING, {"id": id_, "a": f"put {value}"})
            case "put b":
                yield Put(THING, {"id": id_, "b": value})
            case "add":
                yield Add(THING, {"id": id_}, {"n": value})
            case "delete":
                yield Run("delete from thing where id = any($1::int[]) and b is distinct from 3", id_, (id_,))
            case "keep":
                yield Run("update thing set b = 3 where id = any($1::int[])", id_, (id_,))

    return projection


CHANGES = ["create", "grow", "put a", "put b", "add", "delete", "keep"]


@given(
    told=st.lists(
        st.tuples(st.sampled_from(CHANGES), st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=25
    ),
    sizes=batchings,
)
@example(told=[("create", 1, 0), ("delete", 2, 0), ("keep", 1, 0), ("delete", 1, 0)], sizes=[4])
@property_of_real_tables
async def test_any_changes_in_any_batching_give_the_same_rows(
    pool: Pool, told: list[tuple[str, int, int]], sizes: list[int]
) -> None:
    log, projection = Log(), things()
    for what, id_, value in told:
        log.add(sampled(value=value, details={"what": what, "id": id_}))
    async with pool.acquire() as connection:
        seen = []
        for batching in ([1], sizes, [len(told)]):
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(_MAKE)
            await fold(connection, log.records, batching, [projection])
            seen.append(await tables(connection, [projection]))
            await transaction.rollback()
    assert seen[0] == seen[1] == seen[2]


def test_a_projection_listens_to_a_type_once() -> None:
    projection = things()
    with pytest.raises(TypeError, match=r"things already listens to forge.metric.sampled.v1"):

        @projection.on(MetricSampled)
        def again(event: MetricSampled, record: Recorded) -> Iterable[Change]:
            return []


# --------------------------------------------------------------- checkpoint


@pytest.fixture
def log() -> Log:
    log = Log()
    for nth in range(1, 9):
        log.add(submitted(job_id(nth)))
        log.add(started(job_id(nth)))
        log.add(completed(job_id(nth)))
    return log


async def test_what_was_taken_in_is_passed_over(pool: Pool, log: Log) -> None:
    async with pool.acquire() as connection:
        await fold(connection, log.records[:10], [10])
        before = await tables(connection)
        positions = {projection.name: 10 for projection in ALL}
        assert await advance(connection, ALL, log.records[:10], positions) == positions
        assert await tables(connection) == before
        await advance(connection, ALL, log.records, positions)
        assert [await p.position(connection) for p in ALL] == [24] * len(ALL)
        counted = "select sum(jobs) from generation_stats where outcome = 'submitted'"
        assert await connection.fetchval(counted) == 8


async def test_a_projection_that_is_behind_catches_up_beside_the_others(pool: Pool, log: Log) -> None:
    async with pool.acquire() as connection:
        await fold(connection, log.records[:10], [10], [queue])
        positions = dict.fromkeys((p.name for p in ALL), 0) | {"queue": 10}
        await advance(connection, ALL, log.records, positions)
        mixed = await tables(connection)
        for name in mixed:
            await connection.execute(f"truncate {name}")
        await fold(connection, log.records, [24])
        assert await tables(connection) == mixed


async def test_whoever_comes_second_writes_nothing(pool: Pool, log: Log) -> None:
    async with pool.acquire() as connection:
        positions = dict.fromkeys((p.name for p in ALL), 0)
        await advance(connection, ALL, log.records[:12], positions)
        before = await tables(connection)
        with pytest.raises(Conflict, match="another projector"):
            await advance(connection, ALL, log.records, positions)
        assert await tables(connection) == before


@pytest.mark.parametrize("start", [0, 3], ids=["from nothing", "from a checkpoint"])
async def test_of_projectors_at_once_one_wins_every_step(pool: Pool, log: Log, start: int) -> None:
    """Each takes batches of its own size; who loses reads the checkpoint again."""

    async def project(size: int) -> int:
        lost = 0
        async with pool.acquire() as connection:
            while True:
                positions: dict[str, int] = {p.name: await p.position(connection) for p in ALL}
                begun = min(positions.values())
                if begun == len(log.records):
                    return lost
                try:
                    await advance(connection, ALL, log.records[begun : begun + size], positions)
                except Conflict:
                    lost += 1

    async with pool.acquire() as connection:
        await fold(connection, log.records[:start], [1])
    lost = await asyncio.gather(*(project(size) for size in (1, 2, 3, 24)))
    async with pool.acquire() as connection:
        raced = await tables(connection)
        for name in raced:
            await connection.execute(f"truncate {name}")
        await fold(connection, log.records, [5])
        assert await tables(connection) == raced
    assert sum(lost) > 0, "nobody ever lost: this test says nothing"


async def test_emptied_tables_are_not_begun_in_the_middle(pool: Pool, log: Log) -> None:
    async with pool.acquire() as connection:
        with pytest.raises(Conflict):
            await advance(connection, ALL, log.records[10:], {projection.name: 10 for projection in ALL})
        assert await connection.fetchval("select count(*) from generation_queue") == 0


@pytest.mark.fault("C1")
async def test_an_older_code_never_moves_a_newer_checkpoint(pool: Pool, log: Log) -> None:
    newer: Any = Projection("queue", version=2, tables=queue.tables)
    newer.handlers = queue.handlers
    async with pool.acquire() as connection:
        await fold(connection, log.records[:3], [3], [newer])
        assert await queue.position(connection) == 0
        with pytest.raises(Conflict):
            await fold(connection, log.records[:6], [6], [queue])
        assert await newer.position(connection) == 3
