"""What was drawn before: recipe → where in the log the newest job that followed it was completed.

A fold of the log, bounded by the number of recipes it remembers. Whether the pictures are still there only
the volume knows: see :meth:`forge.library.Library.recall`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from forge.events.envelope import Recorded
from forge.events.jobs import JobCompleted

REMEMBERED = 50_000


class Results:
    """Feed it the log with :meth:`apply`."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._where: OrderedDict[str, int] = OrderedDict()

    def apply(self, record: Recorded) -> None:
        """Take in one event of the log."""
        event = record.event
        if isinstance(event, JobCompleted) and event.recipe and event.assets:
            self._where[event.recipe] = record.seq
            self._where.move_to_end(event.recipe)
            if len(self._where) > self._remembered:
                self._where.popitem(last=False)

    def state(self) -> dict[str, int]:
        """What was taken in so far, the longest ago first, for a :class:`forge.snapshots.Snapshot`."""
        return dict(self._where)

    def restore(self, state: Mapping[str, int]) -> None:
        """Know what another one knew."""
        self._where = OrderedDict(state)

    def find(self, recipe: str) -> int | None:
        """Where the completion of a job with this recipe stands."""
        return self._where.get(recipe)
