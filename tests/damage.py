"""Damage to what a stopped nats-server keeps of the log."""

from __future__ import annotations

from pathlib import Path

from forge.embedded import EmbeddedNats
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
