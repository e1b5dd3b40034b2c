"""How long ``GET /assets`` takes with 10 k, 100 k and a million rows: ``python -m benchmarks.assets``.

Each size is a database and an API of its own on the same Postgres. One client asks, one request at a time, in
turn for the bare query of that very list on a connection of its own and over HTTP (A B A B …), size by size,
round by round. The bare query is the page alone; the route also counts the list, reads its checkpoint in the
same snapshot, and makes JSON.

We want the p99 to be flat within 1.5 times from the smallest to the largest, and at most twice the query's.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlencode, urlsplit

import asyncpg
import msgspec
from rich.table import Table

from benchmarks import harness, rows, servers
from benchmarks.harness import Figure, Spread
from benchmarks.wire import Connection, connect
from forge import database
from forge.projections import asset_lists
from forge.projections.reading import EACH_TIME, ONCE

SIZES = (10_000, 100_000, 1_000_000)
SHORT_SIZES = (1_000, 5_000)
LIMIT = 50
FLAT, OF_THE_QUERY = 1.5, 2.0


class Asked(msgspec.Struct, frozen=True):
    """One list: who asks, a user or the operator, and by what."""

    facets: dict[str, str] = {}
    tenant: str | None = None


Shape = Callable[[int, int], Asked]

SHAPES: dict[str, Shape] = {
    "newest of all": lambda _, nth: Asked(),
    "a type": lambda _, nth: Asked({"asset_type": rows.TYPES[nth % 4]}),
    "a player's": lambda size, nth: Asked(tenant=rows.user(size, 37 * nth)),
    "a character's": lambda size, nth: Asked({"character_id": f"npc-{37 * nth % (size // 20)}"}),
    "two words": lambda size, nth: Asked({"q": f"{rows.WORDS[nth % 10]} portrait {37 * nth % size:x}"}),
}

Found = dict[str, dict[int, dict[str, list[float]]]]
"""Shape → size → query or route → p99 of each round, in milliseconds."""


class Filled(msgspec.Struct, frozen=True):
    """A filled database, and the API in front of it."""

    size: int
    url: str
    connection: Any


def main() -> None:
    given = harness.command(
        __doc__.splitlines()[0] if __doc__ else "",
        5,
        0,
        ("--times", {"type": int, "default": 300, "help": "requests of a kind a round [%(default)s]"}),
        ("--sizes", {"type": lambda text: tuple(map(int, text.split(","))), "default": SIZES}),
    )
    if given.short:
        given.times, given.sizes = 15, SHORT_SIZES
    with servers.place(given.dir) as place, ExitStack() as stack:
        dsns = {size: asyncio.run(_filled(place, size)) for size in given.sizes}
        urls = {
            size: stack.enter_context(servers.forge_api(place, f"api-{size}", FORGE_POSTGRES_DSN=dsn))
            for size, dsn in dsns.items()
        }
        where = harness.environment(place.root)
        found = asyncio.run(_rounds(given.rounds, given.times, dsns, urls))
    how = f"{given.rounds} rounds of {given.times} requests of each kind, one client; p99 of each round"
    harness.show("assets", where, how, [_table(found)])
    harness.write(given.json, "assets", where, times=given.times, p99_ms=found, figures=_figures(found))


async def _filled(place: servers.Place, size: int) -> str:
    """The DSN of a database with so many assets."""
    base, name = place.environ["FORGE_POSTGRES_DSN"], f"assets_{size}"
    connection = await asyncpg.connect(base)
    await connection.execute(f"create database {name}")
    await connection.close()
    dsn = base.replace("/postgres?", f"/{name}?")
    await database.migrate(dsn)
    connection = await asyncpg.connect(dsn)
    await rows.fill(connection, size)
    await connection.close()
    return dsn


async def _rounds(count: int, times: int, dsns: dict[int, str], urls: dict[int, str]) -> Found:
    tables = [Filled(size, url, await asyncpg.connect(dsns[size])) for size, url in urls.items()]
    found: Found = {shape: {table.size: {"query": [], "route": []} for table in tables} for shape in SHAPES}
    for nth in range(-1, count):
        for shape, by_size in found.items():
            for table in tables:
                query, route = await _measured(table, SHAPES[shape], times, nth)
                if nth >= 0:  # one round is warm-up
                    by_size[table.size]["query"].append(query)
                    by_size[table.size]["route"].append(route)
    for table in tables:
        await table.connection.close()
    return found


async def _measured(table: Filled, shape: Shape, times: int, round_: int) -> tuple[float, float]:
    query, route = [], []
    wire = await connect(table.url)  # one that stays idle for long is hung up on
    plans = EACH_TIME if "q" in shape(table.size, 0).facets else ONCE
    await table.connection.execute(f"set plan_cache_mode = {plans}")  # as the route has it
    for nth in range(round_ * times, (round_ + 1) * times):
        asked = shape(table.size, abs(nth))
        wanted = _wanted(asked)
        request = _get(table.url, asked)
        began = time.perf_counter()
        page = await asset_lists.page(table.connection, asked.tenant, wanted, "-created_at", None, LIMIT + 1)
        query.append(time.perf_counter() - began)
        began = time.perf_counter()
        await _answered(wire, request, min(len(page), LIMIT))
        route.append(time.perf_counter() - began)
    wire.close()
    return _p99_ms(query), _p99_ms(route)


def _wanted(asked: Asked) -> asset_lists.Wanted:
    facets = dict(asked.facets)
    words = tuple(facets.pop("q", "").split())
    return asset_lists.Wanted(**facets, words=words)


def _get(url: str, asked: Asked) -> bytes:
    query = urlencode({**asked.facets, "limit": LIMIT})
    who = f"X-Forge-User: {asked.tenant}\r\n" if asked.tenant else ""
    head = f"GET /api/v1/comfyui/assets?{query} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n{who}\r\n"
    return head.encode()


async def _answered(wire: Connection, request: bytes, items: int) -> None:
    status, body = await wire.insist(request)
    if status != 200 or body.count(b'"content_hash"') != items:
        raise SystemExit(f"{request!r} was answered {status}, wanted {items} assets: {body[:500]!r}")


def _p99_ms(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100, method="inclusive")[98] * 1e3


# ------------------------------------------------------------------- the report


def _table(found: Found) -> Table:
    table = Table(title="p99 of GET /assets, milliseconds")
    for column in ("list", "rows", "query", "route", "of the query", "of the fewest rows"):
        table.add_column(column, justify="right")
    for shape, by_size in found.items():
        fewest = next(iter(by_size.values()))["route"]
        for size, one in by_size.items():
            table.add_row(
                shape,
                f"{size:,}".replace(",", " "),
                harness.spread(one["query"]).shown(2),
                harness.spread(one["route"]).shown(2),
                harness.ratio(one["route"], one["query"]).shown(2),
                harness.ratio(one["route"], fewest).shown(2),
            )
    return table


def _figures(found: Found) -> list[Figure]:
    figures = []
    for shape, by_size in found.items():
        fewest, most = next(iter(by_size)), list(by_size)[-1]
        small, large = by_size[fewest], by_size[most]
        runs = len(large["route"])
        flat: Spread = harness.ratio(large["route"], small["route"])
        p99 = {who: harness.spread(values).median for who, values in large.items()}
        before = harness.spread(small["route"]).median
        figures += [
            harness.figure(
                f"p99 of {shape}, {most} rows of {fewest}",
                flat,
                "×",
                runs=runs,
                beside=f"{p99['route']:.1f} of {before:.1f} ms",
                at_most=FLAT,
            ),
            harness.figure(
                f"p99 of {shape}, {most} rows, of the bare query",
                harness.ratio(large["route"], large["query"]),
                "×",
                runs=runs,
                beside=f"{p99['route']:.1f} of {p99['query']:.1f} ms",
                at_most=OF_THE_QUERY,
            ),
        ]
    return figures


if __name__ == "__main__":
    main()
