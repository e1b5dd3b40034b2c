"""What was seen of an installation, and what could not be."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from forge.comfyui.protocol import Health
from forge.comfyui.workflows import Workflow
from forge.database import Migration
from forge.domain.disk import Disk, Lines
from forge.domain.keys import Key
from forge.domain.memory import Bound
from forge.settings import Settings
from forge.topology import Standing

T = TypeVar("T")


class Away(msgspec.Struct, frozen=True):
    """Something that could not be looked at; ``behind`` is the check that tells the cause, ``remedy`` what
    mends it where that is known."""

    why: str
    behind: str = ""
    remedy: str = ""


class Unseen(Exception):
    """A check wants what could not be looked at."""

    def __init__(self, away: Away) -> None:
        super().__init__(away.why)
        self.away = away


def seen(part: T | Away) -> T:
    """The part.

    Raises:
        Unseen: it could not be looked at.
    """
    if isinstance(part, Away):
        raise Unseen(part)
    return part


class Server(msgspec.Struct, frozen=True):
    """A server that answers."""

    where: str
    version: tuple[int, ...]


class Greeting(msgspec.Struct, frozen=True):
    """What a nats-server says of itself to whoever connects; ``cluster`` is empty where it stands alone."""

    name: str
    version: tuple[int, ...]
    cluster: str


class Follower(msgspec.Struct, frozen=True):
    """A server that holds a copy of a stream and does not lead it: what it lacks, in messages, and what it
    lacked a moment later; ``moving`` where more came in between, ``away`` where its leader hears nothing of
    it."""

    stream: str
    server: str
    lag: int
    later: int
    moving: bool
    away: bool


class Ends(msgspec.Struct, frozen=True):
    """The first and the last event of the log: why one cannot be read."""

    unreadable: tuple[str, ...]


class Samples(msgspec.Struct, frozen=True):
    """The newest word of a scheduler: how old in seconds (None: never), and the folders at ComfyUI it could
    not remove."""

    age: float | None
    stuck: int


class Applied(msgspec.Struct, frozen=True):
    """The migrations forge knows, the checksums of those the database has, and whether it has trigrams."""

    known: tuple[Migration, ...]
    checksums: dict[int, str]
    trigrams: bool


class Position(msgspec.Struct, frozen=True):
    """Where a projection stands, where its stream ends, and where it stood a moment later."""

    stream: str
    seq: int
    head: int
    later: int

    @property
    def stuck(self) -> bool:
        """Behind, and not coming on."""
        return self.later < self.head and self.later == self.seq


class Line(msgspec.Struct, frozen=True):
    """Jobs whose turn could come now, and seconds since the oldest was admitted."""

    pending: int
    oldest: float


class AssetVolume(msgspec.Struct, frozen=True):
    """The folder of the asset volume; ``disk`` is None where there is no such folder."""

    root: Path
    marker: bool
    writable: bool
    disk: Disk | None
    temporary: int


class Answer(msgspec.Struct, frozen=True):
    """What stands at the API's address; ``wrong`` are the checks of its own that fail."""

    url: str
    is_forge: bool
    wrong: dict[str, str]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was looked at. ``nats_servers`` are, by address of FORGE_NATS_URL, what answers there,
    and ``nats`` the connection to one of them. ``*_clock`` is how far a server's is ahead of this machine's,
    ``damage`` what the log's guard says; ``nodes``, by address of a ComfyUI, what it says of the node classes
    in use; ``comfyui_dirs``, its directory and what is wrong with that."""

    settings: Settings
    invalid: tuple[str, ...]
    strange: dict[str, str]
    dev_url: str | None
    tested_nats: tuple[int, ...]
    job_types: dict[str, Workflow] | Away
    nats_servers: dict[str, Greeting | Away]
    nats: Server | Away
    standings: tuple[Standing, ...] | Away
    followers: tuple[Follower, ...] | Away
    damage: str | Away
    ends: Ends | Away
    keys: tuple[Key, ...] | Away
    samples: Samples | Away
    begun: bool | Away
    nats_clock: timedelta | Away
    postgres: Server | Away
    applied: Applied | Away
    positions: dict[str, Position] | Away
    line: Line | Away
    postgres_clock: timedelta | Away
    volume: AssetVolume | Away
    comfyui_dirs: dict[str, tuple[Path, str]] | Away
    comfyui: dict[str, Health]
    nodes: dict[str, dict[str, dict[str, Any]] | Away]
    api: Answer | Away
    memory: tuple[Bound, ...]

    @property
    def lines(self) -> Lines:
        """Where the volume is short of room, by the settings."""
        s = self.settings
        return Lines(s.disk_warn_ratio, s.disk_clean_ratio, s.disk_reserve_bytes)

    def stream(self, path: str) -> dict[str, Any]:
        """What the server says of a stream.

        Raises:
            Unseen: there is none.
        """
        found = next((of.info for of in seen(self.standings) if of.path == path), None)
        return seen(found or Away(f"no stream {path}", behind="streams"))

    def missing(self, path: str) -> bool:
        """Whether the server says that there is no such stream."""
        return not isinstance(self.standings, Away) and any(
            of.path == path and of.info is None for of in self.standings
        )
