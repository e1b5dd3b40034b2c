"""What is there to be checked: log, tables, disk, the simulators' own records. Nothing of forge's code."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import nats
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

TERMINAL = ("forge.job.completed.v1", "forge.job.failed.v1", "forge.job.cancelled.v1")
_CHECKPOINT = "select min(seq) from projection_checkpoint where projection <> 'usage'"

ADMISSION = ("forge.job.submitted.v1", "forge.job.retried.v1")


@dataclass(frozen=True)
class Message:
    """One message of a stream."""

    seq: int
    subject: str
    headers: dict[str, str]
    data: dict[str, Any]

    @property
    def type(self) -> str:
        return self.headers.get("ce-type", "")

    @property
    def at(self) -> datetime:
        return datetime.fromisoformat(self.headers["ce-time"])


@dataclass
class Evidence:
    """Everything at one moment."""

    events: list[Message] = field(default_factory=list)
    public: list[Message] = field(default_factory=list)
    orders: list[str] = field(default_factory=list)
    checkpoints: dict[str, int] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    assets: dict[str, dict[str, Any]] = field(default_factory=dict)
    references: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    """Path below the volume → SHA-256 of what is in it."""
    thumbnails: set[str] = field(default_factory=set)
    uploads: dict[str, dict[str, Any]] = field(default_factory=dict)
    upload_files: dict[str, str] = field(default_factory=dict)
    """As `files`, of pictures that users sent."""
    leftovers: list[str] = field(default_factory=list)
    left_at_comfyui: dict[str, list[str]] = field(default_factory=dict)
    """Simulator → folders of forge's that are still in its output or input."""
    simulators: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Witness:
    """Reads streams and tables with plain clients; the log only from where it was read last."""

    def __init__(
        self, nats_url: str, dsn: str, assets: Path, records: dict[str, Path], files: dict[str, Path]
    ) -> None:
        self._nats_url, self._dsn, self._assets, self._records = nats_url, dsn, assets, records
        self._files = files
        self._streams: dict[str, list[Message]] = {"FORGE_EVENTS": [], "FORGE_ASSETS_READY": []}

    async def __aenter__(self) -> Witness:
        self._nc = await nats.connect(
            self._nats_url, max_reconnect_attempts=-1, reconnect_time_wait=0.2, error_cb=_nothing
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._nc.close()

    async def events(self) -> list[Message]:
        """The log from its beginning until now."""
        return await self._stream("FORGE_EVENTS")

    async def public(self) -> list[Message]:
        """What other services were told."""
        return await self._stream("FORGE_ASSETS_READY")

    async def jobs(self) -> dict[str, list[Message]]:
        """Job → its events in order."""
        found: dict[str, list[Message]] = {}
        for event in await self.events():
            if event.type.startswith("forge.job."):
                found.setdefault(event.data["job_id"], []).append(event)
        return found

    async def orders(self) -> list[str]:
        """What lies in the dispatch queue."""
        info = await self._nc.jetstream().stream_info("FORGE_DISPATCH", subjects_filter=">")
        return sorted(info.state.subjects or {})

    async def purge_orders(self) -> None:
        """What no forge does: take all orders away."""
        await self._nc.jetstream().purge_stream("FORGE_DISPATCH")

    async def checkpoint(self) -> int:
        """Up to where the tables follow the log."""
        connection = await asyncpg.connect(self._dsn, timeout=5)
        try:
            found = await connection.fetchval(_CHECKPOINT)
            return int(found or 0)
        finally:
            await connection.close()

    def leftovers(self) -> list[str]:
        """What lies in the volume's temporary folder."""
        return sorted(path.name for path in (self._assets / "tmp").iterdir())

    def left_at_comfyui(self) -> dict[str, list[str]]:
        """What forge's prompts drew, or were given, and is still at each simulator."""
        return {
            name: sorted(str(path.relative_to(root)) for path in root.glob("*put/forge/*"))
            for name, root in self._files.items()
        }

    def simulator(self, name: str) -> list[dict[str, Any]]:
        """What a simulator wrote down; a killed one may leave half a line."""
        lines = []
        for line in self._records[name].read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    async def everything(self) -> Evidence:
        evidence = Evidence(
            events=list(await self.events()),
            public=list(await self.public()),
            orders=await self.orders(),
            leftovers=self.leftovers(),
            left_at_comfyui=self.left_at_comfyui(),
            simulators={name: self.simulator(name) for name in self._records},
        )
        await self._read_tables(evidence)
        self._read_volume(evidence)
        return evidence

    async def _read_tables(self, evidence: Evidence) -> None:
        connection = await asyncpg.connect(self._dsn, timeout=5)
        try:
            async with connection.transaction(isolation="repeatable_read"):
                rows = await connection.fetch("select projection, seq from projection_checkpoint")
                evidence.checkpoints = {row["projection"]: row["seq"] for row in rows}
                jobs = await connection.fetch("select * from generation_queue")
                evidence.jobs = {str(row["id"]): dict(row) for row in jobs}
                assets = await connection.fetch("select * from asset_inventory")
                evidence.assets = {str(row["id"]): dict(row) for row in assets}
                references = await connection.fetch("select * from asset_reference")
                evidence.references = [dict(row) for row in references]
                uploads = await connection.fetch("select * from upload")
                evidence.uploads = {str(row["id"]): dict(row) for row in uploads}
        finally:
            await connection.close()

    def _read_volume(self, evidence: Evidence) -> None:
        root = self._assets
        for kind, found in (("assets", evidence.files), ("uploads", evidence.upload_files)):
            for path in (root / kind).rglob("*"):
                if path.is_file():
                    found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
        evidence.thumbnails = {
            str(path.relative_to(root)) for path in (root / "thumbs").rglob("*") if path.is_file()
        }

    async def _stream(self, name: str) -> list[Message]:
        known = self._streams[name]
        js = self._nc.jetstream()
        state = (await js.stream_info(name)).state
        last = known[-1].seq if known else 0
        if state.last_seq <= last:
            return known
        config = ConsumerConfig(
            ack_policy=AckPolicy.NONE,
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=last + 1,
            mem_storage=True,
            inactive_threshold=30,
        )
        subscription = await js.pull_subscribe("", stream=name, config=config)
        try:
            while last < state.last_seq:
                for message in await subscription.fetch(min(500, state.last_seq - last), timeout=5):
                    last = message.metadata.sequence.stream
                    headers = dict(message.headers or {})
                    known.append(Message(last, message.subject, headers, json.loads(message.data)))
        finally:
            await subscription.unsubscribe()
        return known


async def _nothing(_error: Exception) -> None:
    """Servers are killed here: a lost connection is no news."""
