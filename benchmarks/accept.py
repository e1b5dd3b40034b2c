"""How many requests forge accepts in a second, durably: ``python -m benchmarks.accept``.

Beside it, in the same rounds on the same NATS server (``sync_interval: always``):

- *route*: a bare Litestar route that decodes the same body and awaits one JetStream publish of a message as
  large as forge's. What forge does beyond it is its own cost: who asks, params resolved and checked, the
  line, an append with an expectation, the log read back, the job as answer.
- *publish*: awaited publishes alone, as many at a time as there are clients.

We want at least 0.7 of the route.
"""

from __future__ import annotations

import asyncio
from typing import Any

import nats
from rich.table import Table

from benchmarks import harness, servers
from benchmarks.asked import SUBMIT, bust, user
from benchmarks.harness import Figure, Measured
from benchmarks.wire import connect, post

CLIENTS = (1, 10, 100)
WANTED = 0.7

Rounds = dict[int, dict[str, list[Measured]]]


def main() -> None:
    given = harness.command(__doc__.splitlines()[0] if __doc__ else "", rounds=7, seconds=2.0)
    with servers.place(given.dir) as place, servers.forge_api(place) as forge:
        where = harness.environment(place.root)
        size = asyncio.run(_message_bytes(forge, place.environ["FORGE_NATS_URL"]))
        with servers.bare_route(place, size) as route:
            rounds = asyncio.run(_rounds(given.rounds, given.seconds, place, forge, route, size))
    where["message_bytes"] = size
    harness.report(given, "accept", where, [_table(rounds), _costs(rounds)], rounds, _figures(rounds))


async def _rounds(
    count: int, seconds: float, place: servers.Place, forge: str, route: str, size: int
) -> Rounds:
    raw = {"url": place.environ["FORGE_NATS_URL"], "subject": "bench.raw", "size": size}
    subjects: dict[str, tuple[str, dict[str, Any]]] = {
        "forge": ("load_http", {"url": forge}),
        "route": ("load_http", {"url": route}),
        "publish": ("load_publish", raw),
    }
    rounds: Rounds = {clients: {name: [] for name in subjects} for clients in CLIENTS}
    for _ in range(count):
        for clients, found in rounds.items():
            for name, (module, options) in subjects.items():
                measured = await harness.measure(
                    module, place.pids, clients=clients, seconds=seconds, **options
                )
                found[name].append(measured)
    return rounds


async def _message_bytes(forge: str, nats_url: str) -> int:
    """How large forge's own message is, headers and all; asked of the log after a warm-up."""
    connection = await connect(forge)
    for nth in range(50):
        status, body = await connection.insist(post(forge, SUBMIT, bust(0, nth), user(0, nth), f"{nth}"))
        if status not in (200, 202):
            raise SystemExit(f"forge answered {status}: {body[:500]!r}")
    connection.close()
    nc = await nats.connect(nats_url)
    jetstream = nc.jetstream(timeout=harness.PATIENCE_SECONDS)
    last = await jetstream.get_last_msg("FORGE_EVENTS", "forge.evt.>")
    await jetstream.add_stream(name="BENCH_RAW", subjects=["bench.raw"])
    await nc.close()
    headers = sum(len(name) + len(value) + 4 for name, value in (last.headers or {}).items())
    return len(last.data or b"") + headers


def _table(rounds: Rounds) -> Table:
    table = Table(title="accepted requests, durable")
    columns = ["clients", "forge /s", "503", "route /s", "publish /s", "of the route"]
    columns += [f"{which} {who} ms" for which in ("p50", "p95") for who in ("forge", "route")]
    for column in columns:
        table.add_column(column, justify="right")
    for clients, found in rounds.items():
        rates = {name: [one.rate for one in mine] for name, mine in found.items()}

        def latency(name: str, which: str, found: Any = found) -> str:
            return harness.spread([getattr(one, which) for one in found[name]]).shown(2)

        table.add_row(
            str(clients),
            harness.spread(rates["forge"]).shown(0),
            str(sum(one.refused for one in found["forge"])),
            *(harness.spread(rates[name]).shown(0) for name in ("route", "publish")),
            harness.ratio(rates["forge"], rates["route"]).shown(2),
            latency("forge", "p50_ms"),
            latency("route", "p50_ms"),
            latency("forge", "p95_ms"),
            latency("route", "p95_ms"),
        )
    return table


def _figures(rounds: Rounds) -> list[Figure]:
    figures = []
    for clients, found in rounds.items():
        rates = {name: [one.rate for one in mine] for name, mine in found.items()}
        medians = {name: harness.spread(mine).median for name, mine in rates.items()}
        figures.append(
            harness.figure(
                f"accepted requests of the bare route, {clients} clients",
                harness.ratio(rates["forge"], rates["route"]),
                runs=len(found["forge"]),
                beside="{forge:.0f} of {route:.0f} /s; publish {publish:.0f}".format(**medians),
                at_least=WANTED,
            )
        )
    return figures


def _costs(rounds: Rounds) -> Table:
    table = Table(title="CPU milliseconds for one request")
    for column in (
        "clients",
        "forge api",
        "route",
        "api of the route",
        "nats for forge",
        "nats for the route",
    ):
        table.add_column(column, justify="right")
    for clients, found in rounds.items():
        api = [one.cpu_ms["api"] for one in found["forge"]]
        route = [one.cpu_ms["route"] for one in found["route"]]
        nats_for = [harness.spread([one.cpu_ms["nats"] for one in found[who]]) for who in ("forge", "route")]
        table.add_row(
            str(clients),
            harness.spread(api).shown(3),
            harness.spread(route).shown(3),
            harness.ratio(api, route).shown(2),
            *(one.shown(3) for one in nats_for),
        )
    return table


if __name__ == "__main__":
    main()
