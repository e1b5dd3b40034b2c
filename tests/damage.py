"""Damage to what a stopped nats-server keeps of the log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from forge.broker import connect
from forge.embedded import EmbeddedNats
from forge.eventstore import EventStore
from forge.topology import EVENTS


def blocks(server: EmbeddedNats) -> list[Path]:
    """The files of the log's messages, oldest first."""
    found = server.state.rglob(f"streams/{EVENTS}/msgs/*.blk")
    return sorted(found, key=lambda path: int(path.stem))


def flip(server: EmbeddedNats, word: bytes) -> None:
    """Flip a bit in the first place where these bytes stand; the newest block is not compressed."""
    path = blocks(server)[-1]
    kept = bytearray(path.read_bytes())
    kept[kept.index(word)] ^= 1
    path.write_bytes(kept)


def cut(server: EmbeddedNats, ratio: float = 0.5) -> None:
    """Cut off the end of the newest block."""
    path = blocks(server)[-1]
    kept = path.read_bytes()
    path.write_bytes(kept[: int(len(kept) * ratio)])


def lose(server: EmbeddedNats) -> None:
    """Remove a block."""
    blocks(server)[0].unlink()


@asynccontextmanager
async def after(
    server: EmbeddedNats, harm: Callable[[EmbeddedNats], None] = lambda _: None
) -> AsyncIterator[EventStore]:
    """The log of a server that was harmed while it was stopped, over a new connection."""
    server.stop()
    harm(server)
    server.start()
    nc = await connect(server.url, "after")
    try:
        yield EventStore(nc)
    finally:
        await nc.close()
