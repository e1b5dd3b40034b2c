"""Folders of ended attempts that are still at ComfyUI: removed, and counted where they cannot be.

Whoever ends an attempt removes what it left. This finds what a killed worker, an unreachable or a wedged
server kept: a folder ``forge/<job>/<attempt>`` of a job that the log knows, whose attempt is not under way
there. What another forge keeps there is not touched.

Options: ``FORGE_COMFYUI_DIRS`` says where ComfyUI's folders are; ``FORGE_SCAN_SECONDS``, how often to look.
Emits the sample ``comfyui_leftovers``: folders that could not be removed, by server in ``details``, with null
for a server whose folders forge cannot see.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from forge.broker import exchange
from forge.comfyui.folders import Left, shared
from forge.domain.ids import new_id
from forge.domain.jobs import held_at
from forge.errors import ForgeError
from forge.events.catalogue import encode
from forge.events.envelope import Meta, headers
from forge.events.system import MetricSampled
from forge.eventstore import EventStore
from forge.topology import job_of_anybody, subject

log = logging.getLogger("forge.leftovers")

MOST = 500
"""Folders looked at in one sweep of one server; the others wait for the next."""


class Leftovers:
    """The duty of one scheduler; two of them only find less."""

    def __init__(self, store: EventStore, urls: Sequence[str], directories: Sequence[Path | None]) -> None:
        self._nc, self._store = store.nc, store
        self._urls, self._folders = urls, shared(urls, directories)

    async def sweep(self) -> None:
        """Remove what can be removed, tell what cannot; a server that is away costs the round, not more."""
        try:
            stuck = {url: await self._swept(url) for url in self._urls}
            await self._tell(stuck)
        except ForgeError as error:
            log.warning("no sweep of ComfyUI this time", extra={"error": error.detail})

    async def _swept(self, url: str) -> int | None:
        """How many folders could not be removed; None where nobody can say."""
        folders = self._folders.get(url)
        if folders is None:
            return None
        try:
            left = await asyncio.to_thread(folders.left)
        except OSError as error:
            log.warning("ComfyUI's folders cannot be read", extra={"backend": url, "error": str(error)})
            return None
        stuck = removed = 0
        for one in left[:MOST]:
            if not await self._over(url, one):
                continue
            try:
                await asyncio.to_thread(folders.remove, one.job_id, one.attempt)
                removed += 1
            except OSError as error:
                stuck += 1
                log.warning(
                    "stuck at ComfyUI", extra={"folder": f"{one.job_id}/{one.attempt}", "error": str(error)}
                )
        if removed:
            log.info("swept ComfyUI", extra={"backend": url, "folders": removed})
        return stuck

    async def _over(self, url: str, left: Left) -> bool:
        """Whether the log knows the job and this attempt of it is not under way on this server.

        The folder was seen before the log is read, so the start of its attempt is in there.
        """
        facts = (await self._store.load(job_of_anybody(left.job_id))).events
        return bool(facts) and held_at((record.event for record in facts), left.attempt) != url

    async def _tell(self, stuck: dict[str, int | None]) -> None:
        event = MetricSampled(
            metric_type="comfyui_leftovers",
            value=sum(filter(None, stuck.values())),
            unit="folders",
            details={"by_backend": stuck},
        )
        meta = Meta(id=new_id(), at=datetime.now(UTC), actor="scheduler", correlation="")
        where = subject(event)
        await exchange(self._nc, where, encode(event), headers(event, meta, where), 2.0)
