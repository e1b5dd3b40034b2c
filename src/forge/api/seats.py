"""How many sockets are open: in all, and of each user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class AllTaken(Exception):
    """There is no seat left; ``own`` if it is the user's own sockets that took them."""

    def __init__(self, *, own: bool) -> None:
        self.own = own


class Seats:
    """``total`` sockets, ``each`` for one user."""

    def __init__(self, total: int, each: int) -> None:
        self._total, self._each = total, each
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, user: str) -> Iterator[None]:
        """Hold a seat for a while.

        Raises:
            AllTaken: there is none.
        """
        if self._taken[user] >= self._each:
            raise AllTaken(own=True)
        if self._taken.total() >= self._total:
            raise AllTaken(own=False)
        self._taken[user] += 1
        try:
            yield
        finally:
            self._taken[user] -= 1
            if not self._taken[user]:
                del self._taken[user]
