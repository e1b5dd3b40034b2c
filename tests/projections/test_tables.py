"""What each event does to the tables."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from factories import (
    JOB,
    NOW,
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
    pinned,
    produced,
    reads,
    redirected,
    retried,
    sampled,
    started,
    stored,
    submitted,
    unpinned,
    upload_expired,
    upload_renewed,
    upload_stored,
)
from folding import fold, tables
from forge.database import Connection, Pool
from forge.domain.ids import asset_id, upload_id
from forge.events.catalogue import Event
from forge.projections import uploads
from forge.projections.stats import bucket, milliseconds
from forge.projections.usage import usage


@pytest.fixture
async def connection(pool: Pool) -> AsyncIterator[Connection]:
    async with pool.acquire() as connection:
        yield connection


async def told(connection: Connection, *events: Event) -> None:
    """Take in events; the n-th stands at sequence n, n seconds after `NOW`."""
    log = Log()
    for event in events:
        log.add(event)
    await fold(connection, log.records)


async def job(connection: Connection) -> dict[str, Any]:
    row = await connection.fetchrow("select * from generation_queue where id = $1", JOB)
    assert row is not None
    return dict(row)


def subset(row: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    return {column: row[column] for column in expected}


# -------------------------------------------------------------------- queue

BACK_OFF = {
    "status": "pending",
    "error_code": "prompt_failed",
    "retry_at": after(60),
    "locked_by": None,
}
RUNNING = {"status": "running", "attempts": 1, "locked_by": "worker-a", "started_at": after(2), "seq": 2}


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (
            [],
            {
                "status": "pending",
                "priority": 2,
                "user_id": "mei",
                "job_params": {"prompt": "a crane above the clouds", "seed": 7},
                "created_at": after(1),
                "attempts": 0,
                "max_attempts": 3,
                "submitted_seq": 1,
                "admitted_seq": 1,
                "assets": [],
            },
        ),
        ([started()], RUNNING | {"locked_at": after(2), "backend": "http://comfy", "reason": "its turn"}),
        (
            [started(), adopted()],
            {"status": "running", "locked_by": "worker-b", "locked_at": after(3), "attempts": 1},
        ),
        ([started(), redirected()], RUNNING | {"backend": "http://other", "seq": 3}),
        ([started(), attempt_failed(retry_at=after(60))], BACK_OFF | {"completed_at": None}),
        (
            [started(), attempt_failed(), started(attempt=2)],
            {"status": "running", "attempts": 2, "error_code": None, "error_message": None, "retry_at": None},
        ),
        (
            [started(), completed(cached=True)],
            {"status": "completed", "completed_at": after(3), "locked_by": None, "cached": True, "seq": 3},
        ),
        (
            [started(), failed(attempt=1)],
            {
                "status": "failed",
                "completed_at": after(3),
                "error_message": "out of memory",
                "locked_at": None,
            },
        ),
        ([cancelled()], {"status": "cancelled", "completed_at": after(2), "attempts": 0}),
        ([started(), attempt_failed(), cancelled(attempt=1)], {"status": "cancelled", "retry_at": None}),
        (
            [started(), failed(attempt=1), retried(attempt=1, max_attempts=4)],
            {
                "status": "pending",
                "attempts": 1,
                "max_attempts": 4,
                "completed_at": None,
                "error_message": None,
                "submitted_seq": 1,
                "admitted_seq": 4,
            },
        ),
    ],
    ids=lambda value: " ".join(e.type.partition(".")[2] for e in value) if isinstance(value, list) else "",
)
async def test_a_job_stands_in_the_queue_as_its_events_tell(
    connection: Connection, events: list[Event], expected: dict[str, Any]
) -> None:
    await told(connection, submitted(priority=2), *events)
    assert subset(await job(connection), expected) == expected


async def test_a_completed_job_names_its_pictures(connection: Connection) -> None:
    await told(connection, submitted(), started(), completed())
    [asset] = (await job(connection))["assets"]
    assert asset == {
        "asset_id": str(produced().asset_id),
        "asset_type": "npc_bust",
        "content_hash": "ab" * 32,
        "format": "png",
        "size_bytes": 1200,
    }


# ---------------------------------------------------------------- inventory


async def inventory(connection: Connection) -> list[tuple[Any, ...]]:
    """Each content with when it goes and who refers to it."""
    rows = await connection.fetch(
        """select a.content_hash, a.expires_at, array_agg(r.job_id order by r.job_id) as jobs
        from asset_inventory a left join asset_reference r on r.asset_id = a.id
        group by a.id order by a.seq"""
    )
    return [(row["content_hash"][:2], row["expires_at"], row["jobs"]) for row in rows]


async def test_equal_pictures_are_one_asset_that_lives_as_long_as_the_longest(connection: Connection) -> None:
    await told(
        connection,
        stored(job_id(1), expires_at=after(60)),
        stored(job_id(2), "lin", expires_at=after(3600)),
        stored(job_id(3), "wu", expires_at=after(5)),
        stored(job_id(3), "wu", content_hash="cd" * 32),
    )
    assert await inventory(connection) == [
        ("ab", after(3600), [job_id(1), job_id(2), job_id(3)]),
        ("cd", after(3600), [job_id(3)]),
    ]


async def test_a_picture_goes_with_its_last_reference(connection: Connection) -> None:
    await told(connection, stored(job_id(1)), stored(job_id(2), "lin"), deleted(job_id(1)))
    assert await inventory(connection) == [("ab", after(3600), [job_id(2)])]
    assert await connection.fetchval("select count(*) from asset_reference") == 1


async def test_a_picture_without_reference_is_gone_and_may_come_again(connection: Connection) -> None:
    await told(connection, stored(job_id(1)), deleted(job_id(1)), deleted(job_id(1)))
    assert await inventory(connection) == []
    await connection.execute("truncate projection_checkpoint")
    await told(connection, stored(job_id(1)), deleted(job_id(1)), stored(job_id(2), expires_at=after(9)))
    assert await inventory(connection) == [("ab", after(9), [job_id(2)])]


async def test_a_row_is_pinned_while_one_of_its_references_is(connection: Connection) -> None:
    async def flags(*events: Event) -> tuple[bool, list[bool]]:
        await connection.execute("truncate projection_checkpoint, asset_inventory, asset_reference")
        await told(connection, *events)
        rows = await connection.fetch("select pinned from asset_reference order by job_id")
        return await connection.fetchval("select pinned from asset_inventory"), [r["pinned"] for r in rows]

    both = (stored(job_id(1)), stored(job_id(2), "lin"))
    assert await flags(*both) == (False, [False, False])
    assert await flags(*both, pinned(job_id(1))) == (True, [True, False])
    assert await flags(*both, pinned(job_id(1)), unpinned(job_id(1))) == (False, [False, False])
    assert await flags(*both, pinned(job_id(1)), deleted(job_id(1))) == (False, [False])


async def test_a_row_lives_as_long_as_its_longest_reference_that_is_left(connection: Connection) -> None:
    await told(
        connection,
        stored(job_id(1), expires_at=after(60)),
        stored(job_id(2), "lin", expires_at=after(3600)),
        deleted(job_id(2), "lin"),
    )
    assert await inventory(connection) == [("ab", after(60), [job_id(1)])]


async def test_an_asset_row_holds_what_was_stored(connection: Connection) -> None:
    await told(connection, stored(category="military", variant_key="f_young_calm", character_id="Mei"))
    row = dict(await connection.fetchrow("select * from asset_inventory") or {})
    expected = {
        "id": asset_id("ab" * 32),
        "dimensions": "512x768",
        "dominant_color": "#336699",
        "generation_params": {"prompt": "a crane", "seed": 7},
        "created_at": NOW,
        "access_count": 0,
        "search": "npc_bust military f_young_calm mei a crane",
    }
    assert subset(row, expected) == expected


# ------------------------------------------------------------------- uploads


async def test_an_upload_is_there_from_its_storing_until_it_expires(connection: Connection) -> None:
    log = Log()
    mei = upload_id("mei", "ab" * 32)
    await fold(connection, [log.add(upload_stored()), log.add(upload_stored(user="lan"))])
    row = await uploads.upload(connection, mei, "mei")
    assert row is not None
    assert (row["width"], row["expires_at"], row["seq"]) == (512, after(1000), 1)
    assert await uploads.upload(connection, mei, "lan") is None, "another's"
    assert await uploads.stored_bytes(connection) == (1, 1200), "equal pictures are one file"

    await fold(connection, [log.add(upload_renewed(expires_at=after(5000)))])
    assert await uploads.due(connection, after(1000), 9) == [("lan", upload_id("lan", "ab" * 32))]
    assert await uploads.due(connection, after(999), 9) == []

    await fold(connection, [log.add(upload_expired())])
    assert await uploads.upload(connection, mei, None) is None
    assert await uploads.known(connection, ["ab" * 32, "cd" * 32]) == {"ab" * 32}, "lan has it still"

    await fold(connection, [log.add(upload_stored(width=7))])
    row = await uploads.upload(connection, mei, None)
    assert row is not None
    assert (row["width"], row["seq"]) == (7, 5)


async def used(connection: Connection) -> list[tuple[Any, ...]]:
    rows = await connection.fetch("select * from asset_usage order by user_id, reads desc")
    return [(r["user_id"], r["reads"], r["first_at"], r["last_at"], r["seq"]) for r in rows]


async def test_fetches_are_counted_for_each_asset_and_each_user(connection: Connection) -> None:
    await told(
        connection,
        stored(),
        stored(job_id(2), content_hash="cd" * 32),
        accessed(
            reads("mei", count=2, first_at=after(10), last_at=after(20)),
            reads("lan", last_at=after(15)),
            reads("mei", "cd" * 32),
        ),
        accessed(reads("mei", count=5, first_at=after(5), last_at=after(9))),
        accessed(reads("mei", "ee" * 32)),  # gone by now, or never seen
    )
    rows = await connection.fetch("select * from asset_inventory order by seq")
    counted = [(r["access_count"], r["last_accessed_at"], r["expires_at"], r["accessed_seq"]) for r in rows]
    assert counted == [(8, after(20), after(3600), 4), (1, NOW, after(3600), 3)]
    assert await used(connection) == [
        ("lan", 1, NOW, after(15), 3),
        ("mei", 7, after(5), after(20), 4),
        ("mei", 1, NOW, NOW, 3),
    ]


async def test_what_is_known_of_fetches_goes_with_the_asset(connection: Connection) -> None:
    await told(connection, stored(job_id(1)), stored(job_id(2), "lan"), accessed(), deleted(job_id(1)))
    assert len(await used(connection)) == 1
    await connection.execute("truncate projection_checkpoint")
    await told(connection, deleted(job_id(2)), accessed(), stored(job_id(3)))
    assert await used(connection) == []
    assert await connection.fetchval("select access_count from asset_inventory") == 0


# ------------------------------------------------------------ stats and usage


async def test_outcomes_are_counted_by_hour_and_duration(connection: Connection) -> None:
    await told(
        connection,
        *(submitted(job_id(n)) for n in (1, 2, 3, 4)),
        completed(job_id(1), run_ms=1000, waited_ms=50),
        completed(job_id(2), run_ms=1010, waited_ms=150),
        completed(job_id(3), cached=True),
        cancelled(job_id(4)),
    )
    rows = await connection.fetch("select * from generation_stats order by outcome")
    assert {row["hour"] for row in rows} == {NOW}
    counted = [(r["outcome"], r["duration_bucket"], r["jobs"], r["run_ms"], r["waited_ms"]) for r in rows]
    assert counted == [
        ("cached", 0, 1, 0, 0),
        ("cancelled", 0, 1, 0, 0),
        ("completed", bucket(1000), 2, 2010, 200),
        ("submitted", 0, 4, 0, 0),
    ]


@pytest.mark.parametrize("duration", [1, 2, 3, 10, 999, 12_345, 3_600_000])
def test_a_duration_is_read_back_to_within_three_percent(duration: int) -> None:
    assert milliseconds(bucket(duration)) == pytest.approx(duration, rel=0.03)
    assert (bucket(0), milliseconds(0)) == (0, 0.0)


async def test_samples_are_kept_one_by_one(connection: Connection) -> None:
    log = Log()
    for value in (1, 2**50):
        log.add(sampled(value=value, details={"limit": 2**53}))
    await fold(connection, log.records, [2], [usage])
    rows = await connection.fetch('select * from resource_usage_log order by "timestamp"')
    assert [(r["metric_type"], r["metric_value"], r["details"], r["timestamp"]) for r in rows] == [
        ("disk_usage", 1, {"limit": 2**53}, after(1)),
        ("disk_usage", 2**50, {"limit": 2**53}, after(2)),
    ]


async def test_samples_are_forgotten_before_the_stream_forgets_them(connection: Connection) -> None:
    log = Log()
    for nth in range(250):  # a sample every eight hours, so that the table holds three months if nothing goes
        log.add(sampled(value=nth), at=NOW + nth * timedelta(hours=8))
    await fold(connection, log.records, [7], [usage])
    values = await connection.fetch("select metric_value from resource_usage_log order by 1")
    kept = [row["metric_value"] for row in values]
    assert kept == list(range(199 - 29 * 3, 250)), "at the last hundredth, 29 days were kept"
    live = await tables(connection, [usage])
    await connection.execute("truncate resource_usage_log, projection_checkpoint")
    await fold(connection, log.records[100:], [1000], [usage])  # as from a stream that has lost its beginning
    assert await tables(connection, [usage]) == live
