"""Thumbnails of what was just stored, made when its job is concluded: nobody waits for them.

They hold no place and are promised nowhere. Those that a worker did not make, because it ended, had too many
to make or thought them too small, the API makes when somebody asks for them.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context, copy_context

from forge.canonical import THUMBNAIL_WIDTHS
from forge.errors import ForgeError
from forge.events.assets import AssetStored
from forge.images import Workshop
from forge.store import Store
from forge.telemetry import span

log = logging.getLogger("forge.generation")

MOST = 200
"""Pictures that may wait for their thumbnails."""


class Thumbnails:
    """One role's: makes them one picture after the other, so that a picture that is developed waits for one
    at most."""

    def __init__(self, store: Store, workshop: Workshop) -> None:
        self.store, self.workshop = store, workshop
        self._wanted: asyncio.Queue[tuple[AssetStored, Context]] = asyncio.Queue(MOST)

    def want(self, picture: AssetStored) -> None:
        """Have them made soon, unless too many wait or it is so small that whoever asks will hardly wait."""
        small = max(picture.width, picture.height) <= min(THUMBNAIL_WIDTHS)
        if not small and not self._wanted.full():
            self._wanted.put_nowait((picture, copy_context()))

    async def run(self) -> None:
        """Make what is wanted, for ever."""
        while True:
            picture, of_job = await self._wanted.get()
            await asyncio.create_task(self._attend(picture), context=of_job)

    async def _attend(self, picture: AssetStored) -> None:
        try:
            with span("forge.picture.thumbnails"):
                await self._make(picture.content_hash, picture.format)
        except (ForgeError, OSError) as error:
            fields = {"asset": str(picture.asset_id), "error": str(error)}
            log.warning("no thumbnails: the API will try again", extra=fields)

    async def _make(self, content_hash: str, fmt: str) -> None:
        store = self.store
        if all(store.thumbnail_path(content_hash, width).exists() for width in THUMBNAIL_WIDTHS):
            return
        async with store.workspace(f"thumbnails-{content_hash[:16]}") as folder:
            made = await self.workshop.thumbnails(store.path(content_hash, fmt), folder)
            await store.keep_thumbnails(content_hash, fmt, made)
