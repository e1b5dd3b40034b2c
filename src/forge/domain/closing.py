"""How far the book may be closed, and what closed events are about."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import msgspec

MARK = "forge_closed"
"""In the metadata of the log's stream: up to which event it was closed, and the copy's chain there."""

_BITS_EACH = 16
_PLACES = 4


class Mark(msgspec.Struct, frozen=True):
    """The book is closed through this event, whose place in the copy's chain has this hash, in hex."""

    through: int = 0
    chain: str = ""

    def text(self) -> str:
        """As it stands in the metadata; :func:`mark_of` reads it."""
        return f"{self.through} {self.chain}"


def mark_of(metadata: dict[str, str]) -> Mark:
    """The mark among a stream's metadata; of none, that nothing is closed."""
    through, _, chain = metadata.get(MARK, "0 ").partition(" ")
    return Mark(int(through), chain)


class Bound(msgspec.Struct, frozen=True):
    """Somebody or something that needs every event behind ``seq`` in the stream itself."""

    whose: str
    seq: int


def refusal(through: int, last: int, bounds: Iterable[Bound]) -> str | None:
    """Why the book cannot be closed through an event; None if it can."""
    if through < 1:
        return "there is nothing before that"
    if through >= last:
        return f"the log ends at event {last}, and its newest stays"
    nearest = min(bounds, key=lambda bound: bound.seq, default=None)
    if nearest is not None and nearest.seq < through:
        return f"{nearest.whose} is at event {nearest.seq}: no further than that"
    return None


class Known:
    """Tokens of the subjects of closed events, as a Bloom filter: of what it does not know there is nothing.

    So many bits are set in ``bits`` for each token, at places that its hash says.
    """

    def __init__(self, bits: bytearray) -> None:
        self.bits = bits

    @classmethod
    def of(cls, events: int) -> Known:
        """An empty one, with room for so many events."""
        return cls(bytearray(max(64, events * _BITS_EACH // 8)))

    def add(self, subject: str) -> None:
        """Take in all tokens of a subject."""
        for token in subject.split("."):
            for place in self._places(token):
                self.bits[place >> 3] |= 1 << (place & 7)

    def may_have(self, filter_: str) -> bool:
        """Whether a filter may cover a subject that was taken in; False is sure."""
        tokens = (token for token in filter_.split(".") if token not in ("*", ">"))
        return all(self.bits[place >> 3] >> (place & 7) & 1 for t in tokens for place in self._places(t))

    def _places(self, token: str) -> list[int]:
        said, room = blake2b(token.encode(), digest_size=8 * _PLACES).digest(), len(self.bits) * 8
        return [int.from_bytes(said[at : at + 8], "big") % room for at in range(0, len(said), 8)]
