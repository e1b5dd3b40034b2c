"""Streams, subjects and consumers: declared once as data under ``nats/``, turned from ids into subjects here.

A subject token is a consistency boundary. What an append expects is either the literal subject of a ledger
(a user's admissions, a session's bytes), which costs the server nothing however long it grows, or a filter
with a literal prefix (a job's facts, a character's assets): see decision 2 in ``docs/adr``.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
from nats.aio.client import Client

from forge.broker import BrokerRefused, request
from forge.errors import LogUnavailable, NotSetUp, TopologyDiffers
from forge.events.assets import (
    AssetFault,
    AssetGivenUp,
    AssetPin,
    AssetReady,
    AssetsAccessed,
    AssetStored,
    SessionReleased,
)
from forge.events.catalogue import Event
from forge.events.cleanup import CleanupFinished, CleanupHeld, CleanupRequested
from forge.events.jobs import JobRetried, JobSubmitted
from forge.events.keys import KeyCreated, KeyRevoked
from forge.events.system import DiskCrossed, MetricSampled
from forge.events.uploads import UploadExpired, UploadRenewed, UploadStored

log = logging.getLogger("forge.topology")

EVENTS = "FORGE_EVENTS"
DISPATCH = "FORGE_DISPATCH"
METRICS = "FORGE_METRICS"
ASSETS_READY = "FORGE_ASSETS_READY"
GENERATION = "generation"
CLEANUP = "cleanup"
GENERATION_CONSUMER = f"{DISPATCH}.{GENERATION}"
CLEANUP_CONSUMER = f"{EVENTS}.{CLEANUP}"

POOL = "main"
"""The one pool of places there is: one preferred ComfyUI and its fallbacks."""

ALL_EVENTS = "forge.evt.>"
ALL_ADMISSIONS = "forge.evt.admission.*"
ALL_JOB_FACTS = "forge.evt.job.>"
ALL_CANCELLATIONS = "forge.evt.job.*.*.*.cancelled"
ALL_READY = "forge.evt.asset.*.*.*.*.ready"
ALL_STORED = "forge.evt.session.*"
ALL_UPLOADS = "forge.evt.upload.>"
DISK_CROSSED = "forge.evt.disk.crossed"
ALL_KEYS = "forge.evt.key.>"
ALL_DELETED = "forge.evt.asset.*.*.*.*.deleted"
ALL_FAULTS = "forge.evt.store.*.*"
ALL_ACCESSES = "forge.evt.access.*"
ALL_METRICS = "forge.metric.>"
ALL_PROGRESS = "forge.live.job.*"
CHECKPOINT = "forge.live.checkpoint"
BACKENDS = "forge.live.backends"
ORDER_DONE = f"$JS.EVENT.METRIC.CONSUMER.ACK.{DISPATCH}.{GENERATION}"

NOT_FOUND = (10059, 10014)  # stream, consumer

_PLAIN = re.compile(r"[A-Za-z0-9_-]+")


# ------------------------------------------------------------------ subjects


@lru_cache(maxsize=10_000)
def token(text: str | UUID | None) -> str:
    """Any id as one subject token; ``-`` stands for none, other signs become ``=XX``."""
    if text is None:
        return "-"
    text = str(text)
    if _PLAIN.fullmatch(text) and text != "-":
        return text
    plain = "".join(
        chr(byte) if _PLAIN.fullmatch(chr(byte)) and byte < 128 and text != "-" else f"={byte:02X}"
        for byte in text.encode()
    )
    return plain or "="


def admissions(user: str) -> str:
    """The ledger of what a user was granted."""
    return f"forge.evt.admission.{token(user)}"


def job(user: str, job_id: UUID) -> str:
    """The filter of one job's facts."""
    return f"forge.evt.job.{token(user)}.{job_id}.>"


def job_of_anybody(job_id: UUID) -> str:
    """The filter of one job's facts where its user is not known; costs the server more."""
    return f"forge.evt.job.*.{job_id}.>"


def session(session_id: str | None) -> str:
    """The ledger of a session's bytes."""
    return f"forge.evt.session.{token(session_id)}"


def character(character_id: str) -> str:
    """The filter of what happened to a character's assets."""
    return f"forge.evt.asset.{token(character_id)}.>"


def asset(character_id: str | None, asset_type: str, asset_id: UUID) -> str:
    """The filter of one asset's facts under one character."""
    return f"forge.evt.asset.{token(character_id)}.{token(asset_type)}.{asset_id}.>"


def reference(character_id: str | None, asset_type: str, asset_id: UUID, job_id: UUID) -> str:
    """The filter of what happened to one job's references to an asset."""
    return f"forge.evt.asset.{token(character_id)}.{token(asset_type)}.{asset_id}.{job_id}.*"


def upload(user: str, upload_id: UUID) -> str:
    """The filter of one upload's facts."""
    return f"forge.evt.upload.{token(user)}.{upload_id}.>"


def uploads_of(content_hash: str) -> str:
    """The filter of all facts about one content, whoever uploaded it."""
    return f"forge.evt.upload.*.*.{token(content_hash)}.*"


def key(key_id: str) -> str:
    """The filter of one API key's facts."""
    return f"forge.evt.key.{token(key_id)}.*"


def access(source: str) -> str:
    """The ledger of the reads that one API counted."""
    return f"forge.evt.access.{token(source)}"


def character_or_pins(character_id: str) -> str:
    """The filter of a character's assets and of what is pinned of them."""
    return f"forge.evt.*.{token(character_id)}.*.*.*.*"


def reference_or_pins(character_id: str | None, asset_type: str, asset_id: UUID, job_id: UUID) -> str:
    """The filter of one job's references to an asset and of their being pinned."""
    return f"forge.evt.*.{token(character_id)}.{token(asset_type)}.{asset_id}.{job_id}.*"


def pins(character_id: str | None, asset_type: str, asset_id: UUID) -> str:
    """The filter of an asset's being pinned under one character."""
    return f"forge.evt.pin.{token(character_id)}.{token(asset_type)}.{asset_id}.>"


def pins_of_anybody(asset_id: UUID) -> str:
    """The filter of an asset's being pinned by anybody; as costly as :func:`references`."""
    return f"forge.evt.pin.*.*.{asset_id}.>"


def faults(asset_id: UUID) -> str:
    """The filter of what was found where an asset's file should be."""
    return f"forge.evt.store.{asset_id}.*"


def references(asset_id: UUID) -> str:
    """The filter of everybody's references to an asset; the server looks through all of them for it."""
    return f"forge.evt.asset.*.*.{asset_id}.>"


def order(job_id: UUID) -> str:
    return f"forge.dispatch.{POOL}.{job_id}"


def progress(job_id: UUID) -> str:
    return f"forge.live.job.{job_id}"


def public(asset_type: str) -> str:
    """The filter of what other services hear of one type of asset."""
    return f"forge.public.asset.{token(asset_type)}.*.ready"


def ticket_office(office: str) -> str:
    """Where an API process is asked about the tickets it gave."""
    return f"forge.live.ticket.{office}"


def subject(event: Event) -> str:
    """Where an event belongs; its last token is the fact's name."""
    match event:
        case JobSubmitted() | JobRetried():
            return admissions(event.user_id)
        case AssetStored() | SessionReleased():
            return session(event.session_id)
        case AssetReady() | AssetGivenUp():
            place = f"{token(event.character_id)}.{token(event.asset_type)}.{event.asset_id}.{event.job_id}"
            return f"forge.evt.asset.{place}.{_fact(event)}"
        case UploadStored() | UploadRenewed() | UploadExpired():
            place = f"{token(event.user_id)}.{event.upload_id}.{token(event.content_hash)}"
            return f"forge.evt.upload.{place}.{_fact(event)}"
        case AssetPin():
            place = f"{token(event.character_id)}.{token(event.asset_type)}.{event.asset_id}.{event.job_id}"
            return f"forge.evt.pin.{place}.{_fact(event)}"
        case AssetFault():
            return f"forge.evt.store.{event.asset_id}.{_fact(event)}"
        case CleanupHeld():
            return f"forge.evt.cleanup.held.{token('-'.join(event.reasons))}"
        case CleanupRequested() | CleanupFinished():
            return f"forge.evt.cleanup.{_fact(event)}"
        case DiskCrossed():
            return DISK_CROSSED
        case KeyCreated() | KeyRevoked():
            return f"forge.evt.key.{token(event.key_id)}.{_fact(event)}"
        case AssetsAccessed():
            return access(event.source)
        case MetricSampled():
            return f"forge.metric.{token(event.metric_type)}"
    attempt: int | None = getattr(event, "attempt", None)
    job_id: UUID | None = getattr(event, "job_id", None)
    user: str | None = getattr(event, "user_id", None)
    if attempt is None or job_id is None or user is None:
        raise TypeError(f"{event.type_name()} has no subject: give it one in topology.subject")
    return f"forge.evt.job.{token(user)}.{job_id}.{attempt}.{_fact(event)}"


def matches(filter_: str, subject_: str) -> bool:
    """Whether a filter covers a subject, by the server's rules."""
    wanted, given = filter_.split("."), subject_.split(".")
    for nth, part in enumerate(wanted):
        if part == ">":
            return len(given) > nth
        if nth >= len(given) or part not in ("*", given[nth]):
            return False
    return len(wanted) == len(given)


def _fact(event: Event) -> str:
    return event.type.rpartition(".")[2]


# ------------------------------------------------------------------ applying


def files() -> Path:
    """The folder that holds ``nats/`` and ``migrations/``: in the package, or the checkout around it."""
    package = Path(__file__).parent / "files"
    return package if package.exists() else Path(__file__).parents[2]


class Change(msgspec.Struct, frozen=True):
    """What applying did to one stream or consumer: ``created``, ``updated`` or ``unchanged``."""

    name: str
    outcome: str


async def apply(nc: Client, folder: Path | None = None, *, replicas: int | None = None) -> list[Change]:
    """Bring the server to what ``streams.json`` and ``consumers.json`` say; may be repeated.

    ``replicas`` is how many servers of a cluster hold each stream; None leaves it as it is.

    Raises:
        TopologyDiffers: the server refuses a change; says which fields differ and why it refused.
        LogUnavailable: no answer.
    """
    declared = _declared(folder)
    if replicas is not None:
        for path, body in declared.items():
            if _kind(path) == "STREAM":
                body["num_replicas"] = replicas
    return [await _apply(nc, path, body) for path, body in declared.items()]


async def await_leader(nc: Client, within: float = 30.0) -> None:
    """Wait until the servers of a cluster that have just started have agreed on who leads the log.

    Raises:
        LogUnavailable: they have not.
    """
    deadline, told = asyncio.get_running_loop().time() + within, False
    while True:
        try:
            await request(nc, f"STREAM.INFO.{EVENTS}", timeout=2.0)
        except BrokerRefused as refused:
            if refused.err_code in NOT_FOUND:  # who says that there is none yet leads, too
                return
            raise
        except LogUnavailable:
            if asyncio.get_running_loop().time() > deadline:
                raise
            if not told:
                told = True
                log.warning("waiting: no server leads the log")
            await asyncio.sleep(0.2)
        else:
            return


async def await_setup(nc: Client, needed: Sequence[str], within: float = 30.0) -> None:
    """Wait until streams (``FORGE_EVENTS``) and consumers (``FORGE_EVENTS.cleanup``) are there.

    One that is not as the files say is worth a warning: during a roll-out the versions differ for a while.

    Raises:
        NotSetUp: something is missing; says what, and what to do.
        LogUnavailable: no answer.
    """
    deadline, told = asyncio.get_running_loop().time() + within, False
    bodies = {path: body for path, body in _declared().items() if path in needed}
    while True:
        there = [await _standing(nc, path, body) for path, body in bodies.items()]
        missing = [standing.path for standing in there if standing.info is None]
        if not missing:
            break
        what = f"{', '.join(missing)} missing on the NATS server: run `forge setup`"
        if asyncio.get_running_loop().time() > deadline:
            raise NotSetUp(what)
        if not told:
            told = True
            log.warning("waiting: %s", what)
        await asyncio.sleep(0.1)
    for standing in there:
        if standing.differs:
            log.warning("%s differs in %s: run `forge setup`", standing.path, ", ".join(standing.differs))


def declared(stream: str) -> dict[str, Any]:
    """A stream as its file says."""
    return _declared()[stream]


def _declared(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """Path → body of the request that makes it, streams first."""
    folder = folder or files() / "nats"
    streams: list[dict[str, Any]] = msgspec.json.decode((folder / "streams.json").read_bytes())
    consumers: list[dict[str, Any]] = msgspec.json.decode((folder / "consumers.json").read_bytes())
    named = {f"{entry['stream_name']}.{entry['config']['durable_name']}": entry for entry in consumers}
    return {config["name"]: config for config in streams} | named


class Standing(msgspec.Struct, frozen=True):
    """A stream (``FORGE_EVENTS``) or consumer (``FORGE_EVENTS.cleanup``) as the server has it: the fields in
    which it differs from its file, and what the server says of it, None where it has none. ``silent`` is why
    nobody says anything of it: in a cluster none of the servers that hold it leads."""

    path: str
    differs: tuple[str, ...]
    info: dict[str, Any] | None
    silent: str = ""


async def standings(nc: Client, *, timeout: float = 2.0) -> tuple[Standing, ...]:
    """Every stream and consumer of the files, streams first; changes nothing."""

    async def looked(path: str, body: dict[str, Any]) -> Standing:
        try:
            return await _standing(nc, path, body, timeout)
        except (BrokerRefused, LogUnavailable) as error:
            return Standing(path, (), None, error.detail)

    return tuple(await asyncio.gather(*(looked(path, body) for path, body in _declared().items())))


async def _standing(nc: Client, path: str, body: dict[str, Any], timeout: float = 5.0) -> Standing:
    try:
        info = msgspec.json.decode(await request(nc, f"{_kind(path)}.INFO.{path}", timeout=timeout))
    except BrokerRefused as refused:
        if refused.err_code in NOT_FOUND:
            return Standing(path, (), None)
        raise
    return Standing(path, tuple(sorted(_differing(_config(path, body), info["config"]))), info)


async def places(nc: Client) -> int:
    """How many jobs may run at once: what the stream of orders holds."""
    info = msgspec.json.decode(await request(nc, f"STREAM.INFO.{DISPATCH}"))
    return int(info["config"]["max_msgs"])


async def _apply(nc: Client, path: str, body: dict[str, Any]) -> Change:
    kind, config = _kind(path), _config(path, body)
    there = await _existing(nc, path)
    if there is None:
        verb, outcome = f"{kind}.CREATE.{path}", "created"
    else:
        differing = _differing(config, there)
        if not differing:
            return Change(path, "unchanged")
        # the server keeps fields this file does not name: send them back as they are
        merged = {**there, **config}
        body = merged if kind == "STREAM" else {**body, "config": merged}
        verb, outcome = (
            (f"STREAM.UPDATE.{path}" if kind == "STREAM" else f"CONSUMER.CREATE.{path}"),
            "updated",
        )
    try:
        await request(nc, verb, body)
    except BrokerRefused as refused:
        fields = "" if there is None else f" (differs in {', '.join(sorted(differing))})"
        raise TopologyDiffers(
            f"{kind.lower()} {path}{fields}: {refused.detail}. "
            "Change the file back, or remove what is on the server if it may be lost."
        ) from refused
    return Change(path, outcome)


def _kind(path: str) -> str:
    return "CONSUMER" if "." in path else "STREAM"


def _config(path: str, body: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = body["config"] if _kind(path) == "CONSUMER" else body
    return config


def _differing(config: dict[str, Any], there: dict[str, Any]) -> set[str]:
    return {key for key, value in config.items() if not _same(value, there.get(key))}


async def _existing(nc: Client, path: str) -> dict[str, Any] | None:
    try:
        answer = msgspec.json.decode(await request(nc, f"{_kind(path)}.INFO.{path}"))
    except BrokerRefused as refused:
        if refused.err_code in NOT_FOUND:
            return None
        raise
    config: dict[str, Any] = answer["config"]
    return config


def _same(wanted: Any, given: Any) -> bool:
    """Equal, where the server leaves out what is empty and fills in what was not said."""
    if isinstance(wanted, dict):
        return isinstance(given, dict) and all(_same(value, given.get(key)) for key, value in wanted.items())
    if isinstance(wanted, list):
        return (
            isinstance(given, list)
            and len(given) == len(wanted)
            and all(_same(a, b) for a, b in zip(wanted, given, strict=True))
        )
    return bool(wanted == given) or (not wanted and not given)
