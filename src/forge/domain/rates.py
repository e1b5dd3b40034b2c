"""So many in a while: token buckets, one for each of many askers, in bounded memory.

A bucket is one number, the moment from which it is full again. Each taken token moves that moment on, and a
bucket that would be full later than its whole burst from now is empty. No clock: the time is an argument.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

_ROUNDING = 1e-9


class Rate(msgspec.Struct, frozen=True):
    """``per_second`` tokens come back; ``burst`` may be taken at once."""

    per_second: float
    burst: int


def take(rate: Rate, full_at: float, now: float) -> tuple[float, float]:
    """Take a token from a bucket that is full at ``full_at``.

    Returns:
        The seconds to wait, 0 where the token was there, and when the bucket is full after that.
    """
    full_at = max(full_at, now)
    wait = full_at - now - (rate.burst - 1) / rate.per_second
    if wait > _ROUNDING:
        return wait, full_at
    return 0.0, full_at + 1 / rate.per_second


class Buckets:
    """A bucket for each key. The ``most`` recent are remembered: who is forgotten begins with a full one."""

    def __init__(self, rate: Rate, most: int = 10_000) -> None:
        self.rate = rate
        self._most = most
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, key: str, now: float) -> float:
        """Take a token; the seconds to wait, 0 where it was there."""
        wait, self._full_at[key] = take(self.rate, self._full_at.get(key, now), now)
        self._full_at.move_to_end(key)
        if len(self._full_at) > self._most:
            self._full_at.popitem(last=False)
        return wait
