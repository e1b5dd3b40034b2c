"""How long forge waits for ComfyUI, in one place, so that a test can be in a hurry."""

from __future__ import annotations

import msgspec


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """Every time-out and interval of the ComfyUI client, in seconds unless said otherwise."""

    connect: float = 3.0
    """Opening a connection."""
    read: float = 30.0
    """An answer. Loading a large checkpoint holds ComfyUI's only event loop for seconds."""
    fetch: float = 120.0
    """One whole picture, however slowly it trickles."""

    poll: tuple[float, float] = (2.0, 5.0)
    """Between two looks at a prompt while the socket tells about it; drawn at random between the two."""
    poll_deaf: tuple[float, float] = (0.5, 1.0)
    """The same while the socket is down, not trusted, or the prompt was submitted by somebody else."""
    poll_first: float = 0.05
    """The first look at a prompt the socket does not tell about; doubles up to `poll_deaf`."""

    settle: float = 0.25
    """Between two looks that must agree that a prompt is unknown."""
    history: float = 2.0
    """How long history may lag behind the news that a prompt is over."""
    lost_answer: float = 10.0
    """How long to look for a prompt whose POST was not answered."""
    unreachable: float = 30.0
    """How long nothing may answer before waiting for a prompt is given up."""
    cancel: float = 60.0
    """How long a cancelled prompt may go on: nodes that load a model cannot be interrupted."""
    queue_factor: float = 10.0
    """Waiting behind other prompts may take this many times the prompt's own time-out. A factor."""

    first_socket: float = 1.0
    """How long a submission waits for the very first socket connection."""
    silence: float = 5.0
    """A socket that said nothing for so long while HTTP saw something happen is deaf."""
    reconnect: tuple[float, float] = (0.1, 5.0)
    """Back-off between two socket connections: first and longest."""
    ping: tuple[float, float] = (20.0, 60.0)
    """Between two pings on the socket, and how long the pong may take."""

    health_interval: float = 2.0
    """Between two health probes of a server that answers."""
    health_retry: float = 0.5
    """Between two health probes of a server that does not, or that is coming back."""
    health_timeout: float = 1.5
    """The answer to one health probe."""
    failures_to_leave: int = 2
    """Probes in a row that must fail before a server is left. A count."""
    answers_to_return: int = 2
    """Probes in a row that must succeed before a server is used again. A count."""
    quarantine: float = 900.0
    """How long a wedged server that proves nothing is not chosen."""


def patience(*, unreachable: float, cancel: float, quarantine: float) -> Patience:
    """The usual patience with what operators set, in seconds; no answer takes longer than `unreachable`."""
    usual = Patience()
    return Patience(
        connect=min(usual.connect, unreachable),
        read=min(usual.read, unreachable),
        unreachable=unreachable,
        cancel=cancel,
        quarantine=quarantine,
    )
