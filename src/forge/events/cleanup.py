"""What can happen to a clean-up: asked for, held back because it would take too much, done."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from forge.events.catalogue import Event, Moment, event


@event("cleanup.requested")
class CleanupRequested(Event, frozen=True, kw_only=True):
    """Somebody asked for a clean-up, was shown what would go, and nothing beyond it goes.

    Everything is judged as of ``asked_at``; ``before`` is the youngest age asked for, ``owner`` whose things
    they are (None: everybody's). ``assets`` and ``size_bytes`` are what was shown. Who asked is the actor.
    ``executor`` carries it out: the role ``cleanup``, or the command that asked.
    """

    request_id: UUID
    reasons: list[str]
    asked_at: Moment
    assets: int
    size_bytes: int
    executor: Literal["cleanup", "command"]
    before: Moment | None = None
    asset_type: str | None = None
    owner: str | None = None


@event("cleanup.held")
class CleanupHeld(Event, frozen=True, kw_only=True):
    """A sweep would take ``assets`` of ``of``, more than may go unseen: an operator decides."""

    reasons: list[str]
    assets: int
    size_bytes: int
    of: int


@event("cleanup.finished")
class CleanupFinished(Event, frozen=True, kw_only=True):
    """A clean-up is over; ``request_id`` is None for forge's own. What went, by reason."""

    assets: dict[str, int]
    size_bytes: dict[str, int]
    request_id: UUID | None = None
