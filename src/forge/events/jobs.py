"""What can happen to a job.

A job is admitted (submitted, or retried after a failure), attempted, and ends in exactly one of completed,
failed or cancelled. Every attempt has a number that is never used twice: results of an older one are refused.
"""

from __future__ import annotations

from typing import Any, Literal
from uuid import UUID

import msgspec

from forge.events.catalogue import Event, Moment, event


class Produced(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One picture of a completed job; equal pictures share an asset."""

    asset_id: UUID
    asset_type: str
    content_hash: str
    format: str
    size_bytes: int


Regenerated = Literal["identical", "identical_pixels", "other_pixels"]
"""What drawing an asset again gave: the same bytes, the same pixels in other bytes, or another picture."""


class Original(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The picture that a job is to draw again, as it was stored; ``position`` among its job's pictures."""

    asset_id: UUID
    content_hash: str
    pixel_hash: str
    position: int


@event("job.submitted")
class JobSubmitted(Event, frozen=True, kw_only=True):
    """A user asked for pictures and the request was admitted.

    ``recipe`` names everything the pictures follow from: equal recipes draw the same. ``pictures`` is how
    many it will bring. ``regenerates`` is what is drawn again, where that was asked for.
    """

    job_id: UUID
    user_id: str
    job_type: str
    asset_type: str
    params: dict[str, Any]
    workflow_version: str
    priority: int
    fingerprint: str
    max_attempts: int = 3
    session_id: str | None = None
    character_id: str | None = None
    batch_id: UUID | None = None
    ttl_seconds: int | None = None
    recipe: str = ""
    pictures: int = 1
    regenerates: Original | None = None


@event("job.retried")
class JobRetried(Event, frozen=True, kw_only=True):
    """A failed job was asked for again; it may be attempted until ``max_attempts``, after ``attempt``."""

    job_id: UUID
    user_id: str
    job_type: str
    priority: int
    submitted_seq: int
    attempt: int
    max_attempts: int
    asset_type: str = ""
    session_id: str | None = None
    character_id: str | None = None
    recipe: str = ""
    pictures: int = 1


@event("job.started")
class JobStarted(Event, frozen=True, kw_only=True):
    """A worker took the job's order and is about to submit it to ComfyUI.

    ``reason`` says why this job was next and why on this backend. ``submitted_seq`` is where the job's
    request stands in the log.
    """

    job_id: UUID
    user_id: str
    job_type: str
    attempt: int
    worker: str
    backend: str
    reason: str
    submitted_seq: int


@event("job.adopted")
class JobAdopted(Event, frozen=True, kw_only=True):
    """Another worker took over a running attempt, because the order was delivered again."""

    job_id: UUID
    user_id: str
    attempt: int
    adoption: int
    worker: str


@event("job.redirected")
class JobRedirected(Event, frozen=True, kw_only=True):
    """The backend of a running attempt took no connection, so nothing was sent: the attempt goes to another.

    ``redirection`` counts them within the attempt; ``reason`` says why it is this backend now.
    """

    job_id: UUID
    user_id: str
    attempt: int
    redirection: int
    worker: str
    backend: str
    reason: str


@event("job.attempt_failed")
class JobAttemptFailed(Event, frozen=True, kw_only=True):
    """An attempt came to nothing; the job waits again, not before ``retry_at``."""

    job_id: UUID
    user_id: str
    attempt: int
    code: str
    message: str
    retry_at: Moment


@event("job.completed")
class JobCompleted(Event, frozen=True, kw_only=True):
    """The pictures are stored. Milliseconds: waited before the last start, run from that start to the end.

    A ``cached`` job got the pictures of an earlier one with the same recipe, and no attempt was started.
    ``submitted_seq`` is where its request stands, 0 when it was answered at once: then its request, and a
    stored and a ready for each picture, stand right before this event. ``regenerated`` compares with what
    the job was to draw again.
    """

    job_id: UUID
    user_id: str
    job_type: str
    attempt: int
    assets: list[Produced]
    waited_ms: int
    run_ms: int
    cached: bool = False
    recipe: str = ""
    submitted_seq: int = 0
    regenerated: Regenerated | None = None


@event("job.failed")
class JobFailed(Event, frozen=True, kw_only=True):
    """The job is given up: its attempts are used up, or it can never succeed."""

    job_id: UUID
    user_id: str
    job_type: str
    attempt: int
    code: str
    message: str


@event("job.cancelled")
class JobCancelled(Event, frozen=True, kw_only=True):
    """Somebody no longer wants the job; a result that still arrives is thrown away."""

    job_id: UUID
    user_id: str
    job_type: str
    attempt: int
    submitted_seq: int


Admission = JobSubmitted | JobRetried
JobFact = JobStarted | JobAdopted | JobRedirected | JobAttemptFailed | JobCompleted | JobFailed | JobCancelled
Terminal = JobCompleted | JobFailed | JobCancelled
