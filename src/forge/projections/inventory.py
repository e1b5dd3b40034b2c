"""``asset_inventory`` (D1): one row for each content, with ``asset_reference`` for who refers to it and
``asset_usage`` (D4) for who fetched it."""

from __future__ import annotations

from collections.abc import Iterable

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
