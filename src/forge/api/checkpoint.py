"""How far the tables are behind the log, so that readers can wait for what they wrote."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from forge.database import Pool
from forge.errors import Unavailable
from forge.projections import reading

WAIT_SECONDS = 5.0
"""How long a read with ``min_seq`` waits."""

_POLL_SECONDS = 0.5


class Checkpoint:
    """The position of the projections, as they tell it and as Postgres confirms it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._moved = asyncio.Condition()
        self.seq = 0

    async def reached(self, seq: int) -> None:
        """A projector says that it has come this far."""
        async with self._moved:
            self.seq = max(self.seq, seq)
            self._moved.notify_all()

    async def wait(self, seq: int, seconds: float) -> None:
        """Wait until the tables tell of this event.

        Raises:
            Unavailable: they do not within ``seconds``, or Postgres does not answer.
        """
        if seq <= self.seq:
            return
        try:
            async with asyncio.timeout(seconds):
                while seq > self.seq:
                    await self._ask()
                    await self._hear(seq)
        except TimeoutError:
            raise Unavailable(f"the tables are at {self.seq}, behind {seq}; come again") from None

    async def passed(self, seq: int, seconds: float) -> bool:
        """Whether the tables tell of this event, waiting for it if need be."""
        with suppress(Unavailable):
            await self.wait(seq, seconds)
            return True
        return False

    async def _ask(self) -> None:
        """The news is only published once: who missed it learns from the table."""
        await self.reached(await reading.position(self._pool))

    async def _hear(self, seq: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL_SECONDS), self._moved:
                await self._moved.wait_for(lambda: seq <= self.seq)
