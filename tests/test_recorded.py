"""What forge of 25 November 2026 wrote, and the tables it had of it: this one makes the same of the same log.

`recordings/log-*.gz` is what `forge log export` wrote beside a forge of that day that did a bit of all;
`recordings/tables-*.jsonl` are the rows that its own Postgres had then. Neither is ever made again.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from folding import fold
from forge import logfile
from forge.database import Pool
from forge.domain.dispatch import Line
from forge.events.envelope import Recorded, open_envelope

RECORDINGS = Path(__file__).parent / "recordings"
DAY = "2026-11-25"
CHAIN = "e57afe20229b5cf7beb2abb3a9d7796fbb7447ac90261c965f24453ecadc0959"


@pytest.fixture
def log() -> list[Recorded]:
    entries = [entry for page in logfile.read(RECORDINGS / f"log-{DAY}.gz") for entry in page]
    return [open_envelope(entry.seq, entry.subject, entry.headers, entry.data) for entry in entries]


@pytest.fixture
def old_tables() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (RECORDINGS / f"tables-{DAY}.jsonl").read_text().splitlines():
        told = json.loads(line)
        found[told["table"]].append(told["row"])
    return found


def test_its_chain_of_hashes_is_the_one_of_today() -> None:
    assert logfile.check(RECORDINGS / f"log-{DAY}.gz")[0].hash.hex() == CHAIN


@pytest.mark.fault("C1")
@pytest.mark.parametrize("size", [1, 1000])
async def test_an_old_log_gives_the_rows_it_gave_then(
    size: int, log: list[Recorded], old_tables: dict[str, list[dict[str, Any]]], pool: Pool
) -> None:
    """In every column that there was: what came since may have more."""
    async with pool.acquire() as connection:
        await fold(connection, log, [size])
        for table, then in old_tables.items():
            rows = await connection.fetch(f"select to_jsonb(t) as row from {table} t")
            now = [{column: row["row"][column] for column in then[0]} for row in rows]
            assert sorted(now, key=json.dumps) == sorted(then, key=json.dumps), table


def test_in_an_old_log_everything_is_over_that_was_over(log: list[Recorded]) -> None:
    line = Line()
    for record in log:
        line.apply(record)
    assert line.jobs == {}
    assert len({record.event.type for record in log}) == 18
