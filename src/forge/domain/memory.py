"""When memory is short: how close a process may come to what it, its container or its machine may use.

Below the line everything is taken; above it work is refused while reading goes on, until enough has been
given back. Between both lines it stays as it was: a process at the edge does not say yes and no in turns.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

RECOVER = 0.05
"""Shedding ends this part of a limit below where it began."""

MACHINE_BYTES = 4 * 1024**3
"""Of a larger machine only the last so many bytes count: with a tenth of a terabyte free nothing is short."""


class Bound(msgspec.Struct, frozen=True):
    """One limit on memory, by its name: ``process``, ``container`` or ``machine``. Bytes."""

    name: str
    used: int
    limit: int

    @property
    def ratio(self) -> float:
        return self.used / self.limit if self.limit > 0 else 1.0


def machine(total: int, available: int) -> Bound:
    """The machine's memory as a bound, where ``available`` can still be had."""
    limit = min(total, MACHINE_BYTES)
    return Bound("machine", max(0, limit - available), limit)


def tightest(bounds: Iterable[Bound]) -> Bound:
    """The bound that is the closest to its limit.

    Raises:
        ValueError: there is none.
    """
    return max(bounds, key=lambda bound: bound.ratio)


def short(bounds: Iterable[Bound], shed: float, was: bool = False) -> bool:
    """Whether work is to be refused: a bound is used up to the part ``shed``; ``was``: it was so before."""
    return tightest(bounds).ratio >= (shed - RECOVER if was else shed)
