"""``asset_inventory`` (D1): one row for each content, with ``asset_reference`` for who refers to it and
``asset_usage`` (D4) for who fetched it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from forge.database import Connection
from forge.events.assets import (
    AssetDeleted,
    AssetExpired,
    AssetGivenUp,
    AssetPinned,
    AssetsAccessed,
    AssetStored,
    AssetUnpinned,
)
from forge.events.envelope import Recorded
from forge.projections.projection import Change, Create, Projection, Run, Table

ASSETS = Table("asset_inventory", ("id",))
REFERENCES = Table("asset_reference", ("asset_id", "job_id", "position"))
USAGE = Table("asset_usage", ("asset_id", "user_id"))
inventory = Projection("inventory", version=1, tables=[ASSETS, REFERENCES, USAGE])

_DROP_REFERENCE = """
delete from asset_reference r using unnest($1::uuid[], $2::uuid[]) as gone (asset_id, job_id)
where r.asset_id = gone.asset_id and r.job_id = gone.job_id
"""

_DROP_UNREFERENCED = """
with gone as (
    delete from asset_inventory a
    where a.id = any($1::uuid[]) and not exists (select from asset_reference r where r.asset_id = a.id)
    returning a.id
)
delete from asset_usage u using gone where u.asset_id = gone.id
"""

# Fetches of what is gone by now are dropped.
_ACCESSED = """
with reads as (
    select * from unnest(
        $1::uuid[], $2::text[], $3::bigint[], $4::timestamptz[], $5::timestamptz[], $6::bigint[]
    ) as r (asset_id, user_id, reads, first_at, last_at, seq)
), total as (
    update asset_inventory a
    set access_count = a.access_count + t.reads,
        last_accessed_at = greatest(a.last_accessed_at, t.last_at),
        accessed_seq = t.seq
    from (
        select asset_id, sum(reads) as reads, max(last_at) as last_at, max(seq) as seq
        from reads group by asset_id
    ) t
    where a.id = t.asset_id
    returning a.id
)
insert into asset_usage as u (asset_id, user_id, reads, first_at, last_at, seq)
select r.asset_id, r.user_id, sum(r.reads), min(r.first_at), max(r.last_at), max(r.seq)
from reads r join total t on t.id = r.asset_id
group by r.asset_id, r.user_id
on conflict (asset_id, user_id) do update
set reads = u.reads + excluded.reads,
    first_at = least(u.first_at, excluded.first_at),
    last_at = greatest(u.last_at, excluded.last_at),
    seq = excluded.seq
"""

_PIN_REFERENCE = """
update asset_reference r set pinned = given.pinned
from unnest($1::uuid[], $2::uuid[], $3::boolean[]) as given (asset_id, job_id, pinned)
where r.asset_id = given.asset_id and r.job_id = given.job_id
"""

# A row is pinned while a reference is, and lives as long as the longest of them.
_SUM_UP = """
update asset_inventory a set pinned = r.pinned, expires_at = r.expires_at
from (
    select asset_id, bool_or(pinned) as pinned,
           case when bool_or(expires_at is null) then null else max(expires_at) end as expires_at
    from asset_reference where asset_id = any($1::uuid[]) group by asset_id
) r
where a.id = r.asset_id and (a.pinned, a.expires_at) is distinct from (r.pinned, r.expires_at)
"""


@inventory.on(AssetStored)
def stored(event: AssetStored, record: Recorded) -> Iterable[Change]:
    yield Create(
        ASSETS,
        {
            "id": event.asset_id,
            "asset_type": event.asset_type,
            "category": event.category,
            "archetype_id": event.archetype_id,
            "variant_key": event.variant_key,
            "file_path": event.file_path,
            "file_size_bytes": event.file_size_bytes,
            "format": event.format,
            "width": event.width,
            "height": event.height,
            "content_hash": event.content_hash,
            "pixel_hash": event.pixel_hash,
            "dominant_color": event.dominant_color,
            "generation_params": event.generation_params,
            "access_count": 0,
            "created_at": event.created_at,
            "expires_at": event.expires_at,
            "search": _searchable(event),
            "seq": record.seq,
        },
        latest=("expires_at",),
    )
    yield Create(
        REFERENCES,
        {
            "asset_id": event.asset_id,
            "job_id": event.job_id,
            "position": event.position,
            "user_id": event.user_id,
            "session_id": event.session_id,
            "character_id": event.character_id,
            "file_size_bytes": event.file_size_bytes,
            "created_at": event.created_at,
            "expires_at": event.expires_at,
            "seq": record.seq,
        },
    )


@inventory.on(AssetDeleted)
def deleted(event: AssetDeleted, record: Recorded) -> Iterable[Change]:
    return _given_up(event)


@inventory.on(AssetExpired)
def expired(event: AssetExpired, record: Recorded) -> Iterable[Change]:
    return _given_up(event)


def _given_up(event: AssetGivenUp) -> Iterable[Change]:
    asset = event.asset_id
    yield Run(_DROP_REFERENCE, asset, (asset, event.job_id))
    yield Run(_DROP_UNREFERENCED, asset, (asset,))
    yield Run(_SUM_UP, asset, (asset,))


@inventory.on(AssetPinned)
def pinned(event: AssetPinned, record: Recorded) -> Iterable[Change]:
    yield Run(_PIN_REFERENCE, event.asset_id, (event.asset_id, event.job_id, True))
    yield Run(_SUM_UP, event.asset_id, (event.asset_id,))


@inventory.on(AssetUnpinned)
def unpinned(event: AssetUnpinned, record: Recorded) -> Iterable[Change]:
    yield Run(_PIN_REFERENCE, event.asset_id, (event.asset_id, event.job_id, False))
    yield Run(_SUM_UP, event.asset_id, (event.asset_id,))


@inventory.on(AssetsAccessed)
def accessed(event: AssetsAccessed, record: Recorded) -> Iterable[Change]:
    for read in event.reads:
        told = (read.asset_id, read.user_id, read.count, read.first_at, read.last_at, record.seq)
        yield Run(_ACCESSED, read.asset_id, told)


def _searchable(event: AssetStored) -> str:
    """What ``?q=`` looks through: the labels and every word of the params."""
    words = [event.asset_type, event.category, event.archetype_id, event.variant_key, event.character_id]
    words += [str(value) for value in event.generation_params.values() if isinstance(value, str)]
    return " ".join(word for word in words if word).lower()


# -------------------------------------------------------------------- reading

MOST_WORDS = 8


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which assets a list holds; None does not matter.

    ``words`` are lower-case, at most ``MOST_WORDS``, and must all occur.
    """

    asset_type: str | None = None
    category: str | None = None
    archetype_id: str | None = None
    variant_key: str | None = None
    character_id: str | None = None
    session_id: str | None = None
    created_after: Any = None
    created_before: Any = None
    words: tuple[str, ...] = ()


_COLUMNS = """
select a.id, a.asset_type, a.category, a.archetype_id, a.variant_key, a.file_path, a.file_size_bytes,
       a.dimensions, a.format, a.width, a.height, a.content_hash, a.pixel_hash, a.dominant_color,
       a.generation_params, r.job_id, r.user_id, r.session_id, r.character_id
"""

_FACETS = """
  and ($2::text is null or a.asset_type = $2)
  and ($3::text is null or a.category = $3)
  and ($4::text is null or a.archetype_id = $4)
  and ($5::text is null or a.variant_key = $5)
""" + "".join(  # word by word, for no index serves `like all`; what depends on the word alone is decided once
    f"""
  and (($8::text[])[{nth}] is null or a.search like ($8::text[])[{nth}])
  and (($8::text[])[{nth}] is null or forge_signs(($8::text[])[{nth}]) = '{{}}'
       or forge_signs(a.search) @> forge_signs(($8::text[])[{nth}]))
"""
    for nth in range(1, MOST_WORDS + 1)
)

# A tenant's list is a list of references: an asset is as old as the tenant's newest one, whoever had the
# same picture before.
_MINE = f"""
from asset_reference r join asset_inventory a on a.id = r.asset_id
left join asset_usage u on u.asset_id = r.asset_id and u.user_id = r.user_id
where r.user_id = $1
  and ($6::text is null or r.character_id = $6)
  and ($7::text is null or r.session_id = $7)
  and ($9::timestamptz is null or r.created_at > $9)
  and ($10::timestamptz is null or r.created_at < $10)
  and not exists (
      select from asset_reference n
      where n.asset_id = r.asset_id and n.user_id = $1
        and ($6::text is null or n.character_id = $6)
        and ($7::text is null or n.session_id = $7)
        and (n.created_at, n.job_id, n.position) > (r.created_at, r.job_id, r.position)
  ){_FACETS}"""

# Everybody's list goes along the assets, or, where a character or session is wanted, along their references:
# no plan would find by itself that these are few.
_ALL = f"""
from asset_inventory a join lateral (
    select * from asset_reference n
    where n.asset_id = a.id
    order by n.created_at desc, n.job_id desc, n.position desc limit 1
) r on true
where $1::text is null and $6::text is null and $7::text is null
  and ($9::timestamptz is null or a.created_at > $9)
  and ($10::timestamptz is null or a.created_at < $10){_FACETS}"""

_ALL_REFERRED = f"""
from (
    select distinct on (n.asset_id) n.* from asset_reference n
    where ($6::text is null or n.character_id = $6)
      and ($7::text is null or n.session_id = $7)
    order by n.asset_id, n.created_at desc, n.job_id desc, n.position desc
) r join asset_inventory a on a.id = r.asset_id
where $1::text is null
  and ($9::timestamptz is null or a.created_at > $9)
  and ($10::timestamptz is null or a.created_at < $10){_FACETS}"""

# Pinned is what the caller sees as pinned: a tenant's list, by any reference of the tenant's.
_PINNED = "exists (select from asset_reference p where p.asset_id = a.id and p.user_id = $1 and p.pinned)"

# A tenant sees its own dates and its own fetches, and no sign of anybody else's.
_OWN = {
    _MINE: f""", r.created_at, r.expires_at, {_PINNED} as pinned, coalesce(u.reads, 0) as access_count,
       u.last_at as last_accessed_at, greatest(a.seq, r.seq, u.seq) as seq""",
    **dict.fromkeys(
        (_ALL, _ALL_REFERRED),
        """, a.created_at, a.expires_at, a.pinned, a.access_count, a.last_accessed_at,
       greatest(a.seq, r.seq, a.accessed_seq) as seq""",
    ),
}

# order → (key of a tenant's list, key of everybody's, its type, direction)
_ORDERS = {
    "-created_at": ("r.created_at", "a.created_at", "timestamptz", "desc"),
    "created_at": ("r.created_at", "a.created_at", "timestamptz", "asc"),
    "-file_size_bytes": ("a.file_size_bytes", "a.file_size_bytes", "bigint", "desc"),
    "file_size_bytes": ("a.file_size_bytes", "a.file_size_bytes", "bigint", "asc"),
}
ORDERS = tuple(_ORDERS)

MOST_COUNTED = 1001
"""What an estimate says at most: counting is dearer than the page itself."""

_COUNTED = {  # every asset has a reference, so where none is asked about none need be found
    _MINE: _MINE,
    _ALL: f"from asset_inventory a {_ALL[_ALL.index('where $1') :]}",
    _ALL_REFERRED: _ALL_REFERRED,
}
_ESTIMATE = {
    rows: f"select count(*) from (select 1 {counted} limit {MOST_COUNTED}) c"
    for rows, counted in _COUNTED.items()
}

_REFERENCES = """
select r.job_id, r.user_id, r.session_id, r.character_id, r.seq, r.file_size_bytes, a.asset_type,
       a.content_hash, a.format
from asset_reference r join asset_inventory a on a.id = r.asset_id
where r.asset_id = $1 and ($2::text is null or r.user_id = $2)
order by r.seq
"""

_USAGE = """
select user_id, reads, first_at, last_at from asset_usage
where asset_id = $1 and ($2::text is null or user_id = $2)
order by last_at desc, user_id limit 1000
"""

_STORED = """
select asset_type, count(*) as assets, sum(file_size_bytes)::bigint as bytes
from asset_inventory group by asset_type order by asset_type
"""


def _arguments(tenant: str | None, wanted: Wanted) -> list[Any]:
    return [
        tenant,
        wanted.asset_type,
        wanted.category,
        wanted.archetype_id,
        wanted.variant_key,
        wanted.character_id,
        wanted.session_id,
        [f"%{_literal(word)}%" for word in wanted.words] or None,
        wanted.created_after,
        wanted.created_before,
    ]


def _literal(word: str) -> str:
    for sign in ("\\", "%", "_"):
        word = word.replace(sign, f"\\{sign}")
    return word


def _rows(tenant: str | None, wanted: Wanted) -> str:
    if tenant is not None:
        return _MINE
    return _ALL if wanted.character_id is None and wanted.session_id is None else _ALL_REFERRED


async def page(
    connection: Connection,
    tenant: str | None,
    wanted: Wanted,
    order: str,
    after: tuple[Any, UUID] | None,
    limit: int,
) -> list[asyncpg.Record]:
    """Assets in one of ``ORDERS`` behind the place of ``after``, each with its newest reference."""
    rows = _rows(tenant, wanted)
    mine, all_, kind, direction = _ORDERS[order]
    key, beyond = all_ if tenant is None else mine, "<" if direction == "desc" else ">"
    place = f"and ($11::{kind} is null or ({key}, a.id) {beyond} ($11, $12::uuid))"
    sql = f"{_COLUMNS}{_OWN[rows]}{rows} {place} order by {key} {direction}, a.id {direction} limit $13"
    return await connection.fetch(sql, *_arguments(tenant, wanted), *(after or (None, None)), limit)


async def estimate(connection: Connection, tenant: str | None, wanted: Wanted) -> int:
    """How many assets the list holds, at most ``MOST_COUNTED``, which stands for more."""
    count: int = await connection.fetchval(_ESTIMATE[_rows(tenant, wanted)], *_arguments(tenant, wanted))
    return count


async def asset(connection: Connection, id_: UUID, tenant: str | None) -> asyncpg.Record | None:
    """One asset with its newest reference, if the tenant has one."""
    rows = _rows(tenant, Wanted())
    sql = f"{_COLUMNS}{_OWN[rows]}{rows} and a.id = $11"
    return await connection.fetchrow(sql, *_arguments(tenant, Wanted()), id_)


async def references(connection: Connection, id_: UUID, tenant: str | None) -> list[asyncpg.Record]:
    """Who refers to an asset, oldest first; of the tenant's only."""
    return await connection.fetch(_REFERENCES, id_, tenant)


async def used(connection: Connection, id_: UUID, tenant: str | None) -> list[asyncpg.Record]:
    """Who fetched an asset, latest first, at most a thousand; the tenant itself only."""
    return await connection.fetch(_USAGE, id_, tenant)


async def stored_bytes(connection: Connection) -> dict[str, tuple[int, int]]:
    """Asset type → assets and their bytes."""
    rows = await connection.fetch(_STORED)
    return {row["asset_type"]: (row["assets"], row["bytes"]) for row in rows}
