"""Assets as lists have them: by facets, by words, in pages; read from the tables of
:mod:`~forge.projections.inventory`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from forge.database import Connection

MOST_WORDS = 8
MOST_COUNTED = 1001
"""What an estimate says at most: counting is dearer than the page itself."""

SIGNS = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Signs of which one or two are a word already; the tables index them one by one and in pairs."""

_TRIGRAM = re.compile(r"[^\W_]{3}")


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


# A statement names what its list is asked for and nothing else, and is planned for that alone. What it is
# given goes by name, and in the SQL by its place: {"category": "$2"}.
Given = dict[str, Any]
Places = dict[str, str]

_COLUMNS = """
select a.id, a.asset_type, a.category, a.archetype_id, a.variant_key, a.file_path, a.file_size_bytes,
       a.dimensions, a.format, a.width, a.height, a.content_hash, a.pixel_hash, a.dominant_color,
       a.generation_params, r.job_id, r.user_id, r.session_id, r.character_id"""

# A tenant sees its own dates and its own fetches, and no sign of anybody else's. Pinned is what it sees as
# pinned: by any reference of its own.
_OWN = f"""{_COLUMNS}, r.created_at, r.expires_at, exists (
           select from asset_reference p where p.asset_id = a.id and p.user_id = r.user_id and p.pinned
       ) as pinned, coalesce(u.reads, 0) as access_count, u.last_at as last_accessed_at,
       greatest(a.seq, r.seq, u.seq) as seq"""

_EVERYBODYS = f"""{_COLUMNS}, a.created_at, a.expires_at, a.pinned, a.access_count, a.last_accessed_at,
       greatest(a.seq, r.seq, a.accessed_seq) as seq"""

_NEWEST_REFERENCE = """join lateral (
    select * from asset_reference n
    where n.asset_id = a.id
    order by n.created_at desc, n.job_id desc, n.position desc limit 1
) r on true"""


def _mine(at: Places) -> str:
    """A tenant's list is a list of references: an asset is as old as the tenant's newest one, whoever had the
    same picture before."""
    return f"""
from asset_reference r join asset_inventory a on a.id = r.asset_id
left join asset_usage u on u.asset_id = r.asset_id and u.user_id = r.user_id
where not exists (
    select from asset_reference n
    where n.asset_id = r.asset_id{_referred("n", at)}
      and (n.created_at, n.job_id, n.position) > (r.created_at, r.job_id, r.position)
){_referred("r", at)}{_created("r", at)}{_facets(at)}{_words(at)}"""


def _all_referred(at: Places) -> str:
    """Where a character or session is wanted everybody's list goes along their references: no plan would find
    by itself that these are few."""
    return f"""
from (
    select distinct on (n.asset_id) n.* from asset_reference n
    where true{_referred("n", at)}
    order by n.asset_id, n.created_at desc, n.job_id desc, n.position desc
) r join asset_inventory a on a.id = r.asset_id
where true{_listed(at)}{_words(at)}"""


def _all(at: Places) -> str:
    """Everybody's list goes along the assets."""
    return f"""
from asset_inventory a {_NEWEST_REFERENCE}
where true{_listed(at)}{_words(at)}"""


def _assets(at: Places) -> str:
    """Every asset has a reference, so where none is asked about none need be found."""
    return f"""
from asset_inventory a
where true{_listed(at)}{_words(at)}"""


def _listed(at: Places) -> str:
    return f"{_created('a', at)}{_facets(at)}"


def _referred(table: str, at: Places) -> str:
    return _equal(table, at, "user_id", "character_id", "session_id")


def _facets(at: Places) -> str:
    return _equal("a", at, "id", "asset_type", "category", "archetype_id", "variant_key")


def _equal(table: str, at: Places, *columns: str) -> str:
    return "".join(f" and {table}.{column} = {at[column]}" for column in columns if column in at)


def _created(table: str, at: Places) -> str:
    bounds = {"created_after": ">", "created_before": "<"}
    return "".join(
        f" and {table}.created_at {sign} {at[name]}" for name, sign in bounds.items() if name in at
    )


def _words(at: Places) -> str:
    """An index serves ``like`` and ``signs``; rows that are found otherwise are searched for a ``part``."""
    forms = {
        "like": "a.search like {}",
        "signs": "forge_signs(a.search) @> forge_signs({})",
        "part": "strpos(a.search, {}) > 0",
    }
    named = ((name.partition("_")[0], place) for name, place in at.items())
    return "".join(f" and {forms[form].format(place)}" for form, place in named if form in forms)


# order → (key of a tenant's list, key of everybody's, direction)
_ORDERS = {
    "-created_at": ("r.created_at", "a.created_at", "desc"),
    "created_at": ("r.created_at", "a.created_at", "asc"),
    "-file_size_bytes": ("a.file_size_bytes", "a.file_size_bytes", "desc"),
    "file_size_bytes": ("a.file_size_bytes", "a.file_size_bytes", "asc"),
}
ORDERS = tuple(_ORDERS)


class _Order(msgspec.Struct, frozen=True):
    """How a list goes on from where a page ended."""

    key: str
    direction: str

    def behind(self, at: Places) -> str:
        beyond = "<" if self.direction == "desc" else ">"
        return f" and ({self.key}, a.id) {beyond} ({at['after']}, {at['after_id']})" if "after" in at else ""

    @property
    def by(self) -> str:
        return f"order by {self.key} {self.direction}, a.id {self.direction}"


def _given(tenant: str | None, wanted: Wanted, **more: Any) -> Given:
    facets = {name: getattr(wanted, name) for name in wanted.__struct_fields__ if name != "words"}
    given = {"user_id": tenant, **facets, **more}
    return {name: value for name, value in given.items() if value is not None}


def _sought(words: Iterable[str], by_index: Collection[str]) -> Given:
    given: Given = {}
    for nth, word in enumerate(words):
        if word in by_index and SIGNS.search(word):
            given[f"signs_{nth}"] = word
        if word in by_index and _TRIGRAM.search(word):
            given[f"like_{nth}"] = f"%{_literal(word)}%"
        else:
            given[f"part_{nth}"] = word
    return given


def _literal(word: str) -> str:
    for sign in ("\\", "%", "_"):
        word = word.replace(sign, f"\\{sign}")
    return word


def _is_search(tenant: str | None, wanted: Wanted) -> bool:
    """Whether words are looked for among everybody's assets."""
    return bool(tenant is None and wanted.words and not _along_references(wanted))


def _along_references(wanted: Wanted) -> bool:
    return wanted.character_id is not None or wanted.session_id is not None


async def page(
    connection: Connection,
    tenant: str | None,
    wanted: Wanted,
    order: str,
    after: tuple[Any, UUID] | None,
    limit: int,
) -> list[asyncpg.Record]:
    """Assets in one of ``ORDERS`` behind the place of ``after``, each with its newest reference."""
    mine, all_, direction = _ORDERS[order]
    ordered = _Order(all_ if tenant is None else mine, direction)
    key, id_ = after or (None, None)
    given = _given(tenant, wanted, after=key, after_id=id_, limit=limit)
    if _is_search(tenant, wanted):
        return await _found(connection, wanted.words, given, ordered)

    def listed(at: Places) -> str:
        return f"{_rows(tenant, wanted, at)}{ordered.behind(at)} {ordered.by} limit {at['limit']}"

    return await _fetched(connection, listed, given | _sought(wanted.words, wanted.words))


def _rows(tenant: str | None, wanted: Wanted, at: Places) -> str:
    if tenant is not None:
        return f"{_OWN}{_mine(at)}"
    return f"{_EVERYBODYS}{_all_referred(at) if _along_references(wanted) else _all(at)}"


async def _fetched(
    connection: Connection, sql: Callable[[Places], str], given: Given
) -> list[asyncpg.Record]:
    at = {name: f"${nth}" for nth, name in enumerate(given, 1)}
    return await connection.fetch(sql(at), *given.values())


async def estimate(connection: Connection, tenant: str | None, wanted: Wanted) -> int:
    """How many assets the list holds, at most ``MOST_COUNTED``, which stands for more; of a search with many
    finds it is what the newest assets suggest."""
    given = _given(tenant, wanted)
    if _is_search(tenant, wanted):
        return await _finds(connection, wanted.words, given)
    rows = _mine if tenant is not None else _all_referred if _along_references(wanted) else _assets

    def counted(at: Places) -> str:
        return f"select count(*) from (select {rows(at)} limit {MOST_COUNTED}) c"

    [row] = await _fetched(connection, counted, given | _sought(wanted.words, wanted.words))
    return int(row[0])


# ------------------------------------------------------------ searching for words
# Common words are found soonest by reading the newest assets, rare ones by an index; no plan knows well
# enough which they are. So some of the newest are read, more where that promises to be enough, and only then
# is an index asked, and only about the rarer words: to look up those that most assets have is dearer than to
# look into the rows that the others leave.

_NEAR, _FURTHER, _FURTHEST = 1_000, 20_000, 100_000
_SAMPLE = 500
_RARE = 5
"""A word that no more of the sample have is soonest found by an index."""

_MUCH_COMMONER = 8

_WEIGHED = 2_000
_TELLING = 10
"""So many finds among the newest ``_WEIGHED`` say well enough how many there are of all."""

_SHARES = f"""
with newest as materialized (
    select search from asset_inventory order by created_at desc, id desc limit {_SAMPLE}
)
select (select count(*) from newest where strpos(search, word) > 0)
from unnest($1::text[]) with ordinality given (word, nth) order by nth
"""


async def _found(
    connection: Connection, words: tuple[str, ...], given: Given, order: _Order
) -> list[asyncpg.Record]:
    """A page of a search, wherever its assets are found soonest."""

    def near(at: Places) -> str:
        return f"""{_EVERYBODYS} from (
    select * from asset_inventory a
    where true{_listed(at)}{order.behind(at)} {order.by} limit {at["reach"]}
) a {_NEWEST_REFERENCE} where true{_words(at)} {order.by} limit {at["limit"]}"""

    def far(at: Places) -> str:
        return f"""{_far(at)} {_EVERYBODYS} from (
    select * from found a where true{order.behind(at)} {order.by} limit {at["limit"]}
) a {_NEWEST_REFERENCE} {order.by}"""

    async def nearby(reach: int) -> list[asyncpg.Record]:
        return await _fetched(connection, near, given | _sought(words, ()) | {"reach": reach})

    dated, limit = order.key == "a.created_at", given["limit"]
    if dated and len(rows := await nearby(_NEAR)) == limit:
        return rows
    least, sought = await _rare(connection, words)
    if dated and least > _RARE:
        rows = await nearby(_FURTHER)
        if len(rows) < limit <= len(rows) * _FURTHEST // _FURTHER:  # as many are to be expected there
            rows = await nearby(_FURTHEST)
        if len(rows) == limit:
            return rows
    return await _fetched(connection, far, given | sought)


def _far(at: Places) -> str:
    """Fenced off, so that no plan reads the whole table in the hope of soon having enough of it."""
    return f"with found as materialized (select * {_assets(at)})"


async def _rare(connection: Connection, words: tuple[str, ...]) -> tuple[int, Given]:
    """How many of a sample have the rarest word; and the words, of which an index is to find that one, and
    others unless they are much commoner."""
    rows = await connection.fetch(_SHARES, words)
    shares = {word: row[0] for word, row in zip(words, rows, strict=True) if _indexable(word)}
    least = min(shares.values(), default=_SAMPLE)
    most = _MUCH_COMMONER * (least + 1)
    return least, _sought(words, [word for word, share in shares.items() if share <= most])


def _indexable(word: str) -> bool:
    return bool(_TRIGRAM.search(word) or SIGNS.search(word))


async def _finds(connection: Connection, words: tuple[str, ...], given: Given) -> int:
    """Counted where an index finds them, else weighed: their share of the newest, and of all in the list."""

    def newest(at: Places) -> str:
        return f"""
select count(*) as seen, count(*) filter (where true{_words(at)}) as found from (
    select search from asset_inventory a
    where true{_listed(at)} order by created_at desc, id desc limit {at["reach"]}
) a"""

    def counted(at: Places) -> str:
        return f"{_far(at)} select count(*) from (select from found limit {MOST_COUNTED}) c"

    def planned(at: Places) -> str:
        return f"explain (format json) select {_assets(at)}"

    for reach in (_WEIGHED, _FURTHER):
        weighed = given | _sought(words, ()) | {"reach": reach}
        [(seen, found)] = await _fetched(connection, newest, weighed)
        if seen < reach:
            return min(int(found), MOST_COUNTED)
        if found >= _TELLING:
            break
        least, sought = await _rare(connection, words)
        if least <= _RARE:
            [(found,)] = await _fetched(connection, counted, given | sought)
            return int(found)
    [([plan],)] = await _fetched(connection, planned, given)
    return min(int(found * max(seen, plan["Plan"]["Plan Rows"]) // seen), MOST_COUNTED)


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


async def asset(connection: Connection, id_: UUID, tenant: str | None) -> asyncpg.Record | None:
    """One asset with its newest reference, if the tenant has one."""
    rows = await _fetched(
        connection, lambda at: _rows(tenant, Wanted(), at), _given(tenant, Wanted(), id=id_)
    )
    return rows[0] if rows else None


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
