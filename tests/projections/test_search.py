"""Words are found wherever they stand: by trigrams, by Chinese signs, and without either index."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from factories import Log, after, job_id, stored
from folding import fold
from forge import database
from forge.database import Connection, Pool, migrate
from forge.embedded import EmbeddedPostgres
from forge.errors import MigrationFailed
from forge.projections import asset_lists
from forge.projections.asset_lists import Wanted
from forge.projections.reading import looking

PROMPTS = {
    "1": "a crane above the clouds, 100%_sure",
    "2": "青龙剑 in the rain",
    "3": "仙鹤,青山",
    "4": "玄武 and 龙 of jade 𠀀𠀁",
    "5": "みどりの竜 한국 dragon",
}
FINDS: dict[tuple[str, ...], set[str]] = {
    ("crane",): {"1"},
    ("crane", "the"): {"1"},
    ("crane", "rain"): set(),
    ("100%_sure",): {"1"},
    ("100%xsure",): set(),
    ("_sure", "a", "b", "c"): {"1"},
    ("龙",): {"2", "4"},
    ("青龙",): {"2"},
    ("龙剑",): {"2"},
    ("青龙剑",): {"2"},
    ("青剑",): set(),
    ("青",): {"2", "3"},
    ("青", "龙"): {"2"},
    ("鹤,青",): {"3"},
    ("武 and",): {"4"},
    ("龙", "jade"): {"4"},
    ("𠀀𠀁",): {"4"},
    ("どり",): {"5"},
    ("한국", "dragon"): {"5"},
    ("凤",): set(),
}


async def filled(connection: Connection, newer: Sequence[str] = ()) -> None:
    log = Log()
    for name, prompt in PROMPTS.items():
        log.add(stored(job_id(int(name)), content_hash=name * 64, generation_params={"prompt": prompt}))
    for nth, prompt in enumerate(newer):
        params = {"prompt": prompt}
        hash_, at = f"{nth:064}", after(1 + nth)
        log.add(stored(job_id(100 + nth), content_hash=hash_, created_at=at, generation_params=params))
    await fold(connection, log.records)


async def found(connection: Connection, words: Sequence[str], tenant: str | None) -> set[str]:
    wanted = Wanted(words=tuple(words))
    rows = await asset_lists.page(connection, tenant, wanted, "-created_at", None, 50)
    assert await asset_lists.estimate(connection, tenant, wanted) == len(rows)
    return {row["content_hash"][0] for row in rows}


@pytest.mark.parametrize("indexed", [True, False], ids=["by index", "by reading all"])
async def test_words_are_found(pool: Pool, indexed: bool) -> None:
    async with pool.acquire() as connection:
        await filled(connection)
    async with looking(pool) as tables:
        await tables.connection.execute(f"set local enable_seqscan = {'off' if indexed else 'on'}")
        for words, expected in FINDS.items():
            for tenant in (None, "mei"):
                assert await found(tables.connection, words, tenant) == expected, words
            assert await found(tables.connection, words, "lan") == set()


@pytest.mark.parametrize(("word", "index"), [("crane", "search"), ("龙", "signs"), ("青龙剑", "signs")])
async def test_an_index_serves_them(pool: Pool, word: str, index: str) -> None:
    told: list[str] = []
    async with looking(pool) as tables:
        # as a table of a hundred thousand would be read; here there is nothing in it
        await tables.connection.execute("set local enable_seqscan = off; set local enable_indexscan = off")
        sought = asset_lists._sought([word], [word])
        rows = await asset_lists._fetched(
            tables.connection, lambda at: f"explain select {asset_lists._assets(at)}", sought
        )
        told = [row[0] for row in rows]
    assert f"asset_inventory_{index}" in "\n".join(told)


@pytest.mark.parametrize("order", asset_lists.ORDERS)
async def test_finds_nearby_and_far_off_follow_one_another(pool: Pool, order: str) -> None:
    """A page of one is full with the first find, the last page is empty."""
    wanted, key = Wanted(words=("jade",)), order.removeprefix("-")
    async with pool.acquire() as connection:
        await filled(connection, ["a jade ring"] * 4)
        places: list[tuple[Any, UUID]] = []
        while len(places) < 9 and (
            page := await asset_lists.page(connection, None, wanted, order, (places or [None])[-1], 1)
        ):
            places.append((page[0][key], page[0]["id"]))
    assert len(places) == 5
    assert places == sorted(places, reverse=order.startswith("-"))


async def test_what_most_assets_have_is_looked_for_in_the_rows_that_rarer_words_leave(pool: Pool) -> None:
    words = ("jade", "of", "crane", "青龙")
    async with pool.acquire() as connection:
        await filled(connection, ["a jade 青龙 of old"] * 40)
        least, sought = await asset_lists._rare(connection, words)
        assert least == 1
        assert sought == {"part_0": "jade", "part_1": "of", "like_2": "%crane%", "part_3": "青龙"}


async def test_finds_are_counted_while_few_and_weighed_when_many(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asset_lists, "_WEIGHED", 20)
    async with pool.acquire() as connection:
        await filled(connection, ["a jade ring"] * 40)
        await connection.execute("analyze asset_inventory")
    async with looking(pool) as tables:

        async def estimate(*words: str, **facets: str) -> int:
            return await asset_lists.estimate(tables.connection, None, Wanted(words=words, **facets))

        assert await estimate("crane") == 1
        assert await estimate("jade", "rings") == 0
        assert await estimate("jade", "ring") == 45, (
            "all of the newest, so all that Postgres believes there are"
        )
        assert await estimate("jade", category="none such") == 0


async def test_a_postgres_without_trigrams_searches_all_the_same(
    postgres_server: EmbeddedPostgres, empty_database_dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A database where forge may make tables but no extension."""
    name = empty_database_dsn.rpartition("/")[2].partition("?")[0]
    admin = await asyncpg.connect(empty_database_dsn)
    await admin.execute(
        f"create role guest_{name} login; grant create, usage on schema public to guest_{name}"
    )
    dsn = empty_database_dsn.replace("postgresql://postgres@", f"postgresql://guest_{name}@")
    assert dsn != empty_database_dsn
    try:
        with pytest.raises(MigrationFailed, match=f"create schema forge_log authorization guest_{name}"):
            await migrate(dsn)
        await admin.execute(f"create schema forge_log authorization guest_{name}")
        assert (await migrate(dsn))[0] == "0006_log_archive.sql"
        assert "pg_trgm is not there" in "".join(str(r.__dict__.get("reason", "")) for r in caplog.records)
        assert await migrate(dsn) == []
        async with database.opened(dsn) as pool:
            async with pool.acquire() as connection:
                await filled(connection)
            async with looking(pool) as tables:
                for words, expected in FINDS.items():
                    assert await found(tables.connection, words, None) == expected, words
    finally:
        await admin.execute(f"drop owned by guest_{name} cascade; drop role guest_{name}")
        await admin.close()


async def test_two_who_migrate_at_once_make_one_index(empty_database_dsn: str) -> None:
    await asyncio.gather(migrate(empty_database_dsn), migrate(empty_database_dsn))
    connection = await asyncpg.connect(empty_database_dsn)
    names = await connection.fetch("select indexname from pg_indexes where tablename = 'asset_inventory'")
    await connection.close()
    assert {"asset_inventory_search", "asset_inventory_signs"} <= {row[0] for row in names}
