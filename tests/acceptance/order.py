"""The order of starts, told from the log alone by the rule as it is documented.

The lowest level first; a waiting job rises by one level for every 20 starts it has seen. Within a level the
user whose turn is the longest ago, within a user first in, first out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from acceptance.evidence import Message

AGEING = 20
PLACES = 3


@dataclass(frozen=True)
class Waiting:
    """A job in the line."""

    id: str
    user: str
    priority: int
    seq: int


def out_of_turn(events: Sequence[Message]) -> Iterator[str]:
    """Starts that no dispatcher following the rule would have given; for a log whose jobs were all submitted
    before the first start and were each started once.

    A job is given while up to two others are on their way to their own start, in any order, so each start is
    held against every such moment.
    """
    line = [
        Waiting(e.data["job_id"], e.data["user_id"], e.data["priority"], e.seq)
        for e in events
        if e.type == "forge.job.submitted.v1"
    ]
    users = {job.id: job.user for job in line}
    starts = [e.data["job_id"] for e in events if e.type == "forge.job.started.v1"]
    for nth, started in enumerate(starts):
        later = starts[nth + 1 : nth + PLACES]
        moments = (
            (starts[:base], [*starts[base:nth], *ahead])
            for base in range(max(0, nth - PLACES + 1), nth + 1)
            for size in range(PLACES - (nth - base))
            for ahead in combinations(later, size)
        )
        if not any(_next(line, users, told, given) == started for told, given in moments):
            yield f"start {nth} is {started} of {users[started]}, which was not next"


def _next(
    line: Sequence[Waiting], users: dict[str, str], told: Sequence[str], given: Collection[str]
) -> str | None:
    """The next job where these starts are in the log, and these orders out."""
    turns = {users[id_]: turn for turn, id_ in enumerate([*told, *given], 1)}
    taken = {*told, *given}
    waiting = [job for job in line if job.id not in taken]
    best = min(
        waiting,
        default=None,
        key=lambda job: (max(1, job.priority - len(told) // AGEING), turns.get(job.user, 0), job.seq),
    )
    return best.id if best else None
