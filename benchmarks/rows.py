"""Tables filled as forge fills them: assets of many users, with the labels and words that real ones have.

Everything about row ``n`` follows from ``n``, so that readers know what they may ask for.
"""

from __future__ import annotations

import asyncpg

TYPES = ("character_portrait", "npc_bust", "fate_card", "ui_icon")
CATEGORIES = ("cultivator", "monk", "merchant", "spirit", "beast", "guard", "scholar")
WORDS = ("jade", "cherry", "lantern", "sword", "mist", "phoenix", "lotus", "thunder", "bamboo", "crane")
USERS_PER_ROW = 50
"""A user for each fifty assets: a table that is larger has more users, not busier ones."""

_GIN = ("asset_inventory_search", "asset_inventory_signs")

_ASSETS = """
insert into asset_inventory (id, asset_type, category, archetype_id, variant_key, file_path, file_size_bytes,
    format, width, height, content_hash, pixel_hash, dominant_color, generation_params, access_count,
    created_at, expires_at, search, seq)
select md5('asset' || n)::uuid, kind, category, archetype, variant,
       'assets/' || substr(hash, 1, 2) || '/' || substr(hash, 3, 2) || '/' || hash || '.png',
       900000 + n % 700001, 'png', 1024, 1024, hash, md5('pixels' || n) || md5('sl' || n),
       '#' || substr(hash, 1, 6),
       jsonb_build_object('prompt', words, 'gender', 'female', 'age', 'adult', 'expression', 'stern',
           'category', category, 'archetype_id', archetype, 'seed', n * 7919),
       n % 5, $2::timestamptz - make_interval(secs => n), $2::timestamptz + make_interval(days => 30),
       lower(concat_ws(' ', kind, category, archetype, variant, 'npc-' || n / 20, words, 'female adult')), n
from generate_series(1, $1::bigint) n
cross join lateral (
    select ($3::text[])[1 + n % 4] as kind, ($4::text[])[1 + n % 7] as category,
           'archetype-' || n % 500 as archetype, 'adult/stern/' || n % 40 as variant,
           md5('content' || n) || md5('ent' || n) as hash,
           'a ' || ($5::text[])[1 + n % 10] || ' hairpin, ' || ($5::text[])[1 + n / 10 % 10]
               || ' blossoms drifting by, portrait ' || to_hex(n) as words
) row
"""

_REFERENCES = """
insert into asset_reference (asset_id, job_id, position, user_id, session_id, character_id, file_size_bytes,
    created_at, expires_at, seq)
select md5('asset' || n)::uuid, md5('job' || n)::uuid, 0, 'user-' || n % greatest(1, $1::bigint / $3),
       'session-' || n / 30, 'npc-' || n / 20, 900000 + n % 700001,
       $2::timestamptz - make_interval(secs => n), $2::timestamptz + make_interval(days => 30), n
from generate_series(1, $1::bigint) n
"""


async def fill(connection: asyncpg.Connection, count: int) -> None:
    """So many assets with a reference each. The slow indexes are made anew afterwards, which is quicker."""
    now = await connection.fetchval("select now()")
    query = "select indexname, indexdef from pg_indexes where indexname = any($1)"
    slow = {row["indexname"]: row["indexdef"] for row in await connection.fetch(query, _GIN)}
    for name in slow:
        await connection.execute(f"drop index {name}")
    await connection.execute(_ASSETS, count, now, list(TYPES), list(CATEGORIES), list(WORDS), timeout=None)
    await connection.execute(_REFERENCES, count, now, USERS_PER_ROW, timeout=None)
    await connection.execute("set maintenance_work_mem = '512MB'")
    for definition in slow.values():
        await connection.execute(definition, timeout=None)
    await connection.execute("vacuum analyze", timeout=None)


def user(count: int, nth: int) -> str:
    """One of the users that have assets in a table of so many."""
    return f"user-{nth % max(1, count // USERS_PER_ROW)}"
