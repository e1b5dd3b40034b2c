"""Ports for servers that are told theirs, and take it again when they are started again."""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import suppress

_LOWEST, _HIGHEST, _EACH = 10_000, 32_767, 350
"""Below those that the kernel gives to whoever asks for any: one of those might be taken by the time its
server listens, or while it is down."""

_BLOCKS = (_HIGHEST - _LOWEST) // _EACH
_first = _LOWEST + os.getpid() % _BLOCKS * _EACH  # tests run in several processes beside each other
_next = itertools.cycle(range(_first, _first + _EACH))


def free_port() -> int:
    """One where nobody listens, and that this process gives out to nobody else for long."""
    for port in itertools.islice(_next, _EACH):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"all ports from {_first} on are taken")
