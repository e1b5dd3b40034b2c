"""What goes in and out over HTTP."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

from forge.comfyui.workflows import CatalogueEntry
from forge.domain.limits import DEFAULT_PRIORITY, MAX_BATCH, PRIORITIES
from forge.events.system import Level

MAX_TTL_SECONDS = 10 * 366 * 86400

CleanupReason = Literal["expired", "old", "evicted", "lost", "damaged", "orphaned", "temporary"]

_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


# ------------------------------------------------------------------- requests


class SubmitJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for pictures; ``GET /catalogue`` says which job types there are and what params they take."""

    job_type: Annotated[str, msgspec.Meta(min_length=1, max_length=100, examples=["fate_card"])]
    params: dict[str, Any]
    priority: Annotated[
        int, msgspec.Meta(ge=PRIORITIES[0], le=PRIORITIES[-1], description="1 is the most urgent")
    ] = DEFAULT_PRIORITY
    session_id: _Id | None = None
    character_id: _Id | None = None
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1, le=MAX_TTL_SECONDS)] | None = None


class SubmitBatch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Several requests that are admitted together or not at all."""

    jobs: Annotated[list[SubmitJob], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]


class CleanUp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What should go: for these reasons, of this type, made or changed so long ago.

    Without reasons: everything but `evicted`, which makes room as a full disk would; `old` only with an age.
    """

    dry_run: bool = False
    reasons: Annotated[list[CleanupReason], msgspec.Meta(min_length=1, max_length=7)] | None = None
    older_than_seconds: Annotated[int, msgspec.Meta(ge=0, le=MAX_TTL_SECONDS)] | None = None
    asset_type: Annotated[str, msgspec.Meta(min_length=1, max_length=100)] | None = None
    confirm: Annotated[int, msgspec.Meta(ge=0)] | None = None


# ----------------------------------------------------------------------- jobs


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    """Why the last attempt came to nothing."""

    code: str
    message: str


class JobAsset(msgspec.Struct, frozen=True, kw_only=True):
    """One picture a job made."""

    id: UUID
    url: str
    thumbnail_url: str
    content_hash: str


class Regeneration(msgspec.Struct, frozen=True, kw_only=True):
    """The asset that a job draws again. ``result`` is null until the job is over: `identical` (the same
    bytes), `identical_pixels`, `other_pixels` (the same recipe gave another picture) or `cannot`, with the
    `reason`."""

    asset_id: UUID
    result: Literal["identical", "identical_pixels", "other_pixels", "cannot"] | None
    reason: str | None = None


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job; ``position`` counts from 1 and is null unless it waits for its turn."""

    id: UUID
    status: Annotated[str, msgspec.Meta(pattern="^(pending|running|completed|failed|cancelled)$")]
    job_type: str
    params: dict[str, Any]
    priority: int
    user_id: str
    session_id: str | None
    character_id: str | None
    batch_id: UUID | None
    attempts: int
    max_attempts: int
    position: int | None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    error: JobError | None
    cached: bool
    assets: list[JobAsset]
    regenerates: Regeneration | None
    seq: int


class QueuePage(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs, newest first. ``counts`` are the caller's jobs by status; 10001 stands for more than 10000."""

    items: list[JobView]
    next_cursor: str | None
    counts: dict[str, int]


class BatchAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that was just admitted; ``seq`` is its last job's."""

    batch_id: UUID
    jobs: list[JobView]
    seq: int


class BatchView(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a batch; ``status`` is pending, running, or how it ended: completed only if all did."""

    batch_id: UUID
    status: str
    total: int
    counts: dict[str, int]
    created_at: datetime
    completed_at: datetime | None
    jobs: list[JobView]
    seq: int


class HistoryItem(msgspec.Struct, frozen=True, kw_only=True):
    """One event, as the log holds it."""

    seq: int
    type: str
    at: datetime
    actor: str
    correlation: str
    """The `X-Request-Id` of the request that it was done for; where nobody asked, the job's id."""
    data: dict[str, Any]


class History(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that happened, in order."""

    items: list[HistoryItem]


# --------------------------------------------------------------------- assets


class AssetView(msgspec.Struct, frozen=True, kw_only=True):
    """A stored picture, with the caller's newest job that made it."""

    id: UUID
    asset_type: str
    category: str | None
    archetype_id: str | None
    variant_key: str | None
    file_path: str
    file_size_bytes: int
    dimensions: str
    format: str
    width: int
    height: int
    content_hash: str
    pixel_hash: str
    dominant_color: str
    generation_params: dict[str, Any]
    access_count: int
    last_accessed_at: datetime | None
    created_at: datetime
    expires_at: datetime | None
    pinned: bool
    url: str
    thumbnail_url: str
    job_id: UUID
    user_id: str
    session_id: str | None
    character_id: str | None
    seq: int


class AssetPage(msgspec.Struct, frozen=True, kw_only=True):
    """Assets in the asked order; a ``total_estimate`` of 1001 stands for more than 1000, and of a search that
    finds many it goes by their share of the newest assets."""

    items: list[AssetView]
    next_cursor: str | None
    total_estimate: int


# -------------------------------------------------------------------- uploads


class UploadView(msgspec.Struct, frozen=True, kw_only=True):
    """A picture of the caller's own; its id is the value of a param of type image. Hash and size are those of
    the PNG it was drawn into."""

    id: UUID
    user_id: str
    content_hash: str
    format: str
    file_size_bytes: int
    width: int
    height: int
    url: str
    created_at: datetime
    expires_at: datetime
    seq: int


class UserReads(msgspec.Struct, frozen=True, kw_only=True):
    """How often one user fetched an asset's file or a thumbnail of it, and when."""

    user_id: str
    reads: int
    first_at: datetime
    last_at: datetime


class AssetUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Who fetched an asset, latest first."""

    items: list[UserReads]


# ----------------------------------------------------------------------- keys


class CreateKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request for a key: a player's own, a service's, which may act for players, or an operator's."""

    role: Annotated[str, msgspec.Meta(pattern="^(player|service|operator)$")]
    user_id: _Id
    label: _Id | None = None


class KeyView(msgspec.Struct, frozen=True, kw_only=True):
    """A key without what opens the door; ``created_by`` and ``revoked_by`` are actors as in histories."""

    id: str
    role: str
    user_id: str
    label: str | None
    created_at: datetime
    created_by: str
    revoked_at: datetime | None
    revoked_by: str | None
    seq: int


class KeyCreatedView(KeyView, frozen=True, kw_only=True):
    """A key that was just created; ``key`` is told this once."""

    key: str


class KeyList(msgspec.Struct, frozen=True, kw_only=True):
    """Every key, oldest first."""

    items: list[KeyView]


class CleanupCount(msgspec.Struct, frozen=True, kw_only=True):
    """Assets, or files, and their bytes."""

    assets: int
    bytes: int


class CleanupView(msgspec.Struct, frozen=True, kw_only=True):
    """What goes, or would go with `dry_run`.

    `held`: it is much of the `of` assets there are, so nothing goes until `confirm` says `assets`. With an
    `id` it was asked for, and never more goes than is shown here; files follow after a grace.
    """

    dry_run: bool
    held: bool
    assets: int
    bytes: int
    of: int
    by_reason: dict[str, CleanupCount]
    by_type: dict[str, CleanupCount]
    id: UUID | None = None
    seq: int | None = None


# ----------------------------------------------------------------- operations


class TypeStats(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one job type in the window; durations of runs in milliseconds, null without any."""

    submitted: int = 0
    completed: int = 0
    cached: int = 0
    failed: int = 0
    cancelled: int = 0
    p50_ms: float | None = None
    p95_ms: float | None = None
    mean_ms: float | None = None
    mean_wait_ms: float | None = None


class StoredBytes(msgspec.Struct, frozen=True, kw_only=True):
    assets: int
    bytes: int


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs answered without drawing; ``ratio`` of all that ended well, null when none did."""

    hits: int
    ratio: float | None


class QueueStats(msgspec.Struct, frozen=True, kw_only=True):
    """The queue now, of all users; age of the job that waits the longest."""

    pending: int
    running: int
    oldest_seconds: float | None


class DiskStats(msgspec.Struct, frozen=True, kw_only=True):
    """The asset volume at the newest sample: bytes in all and by type, besides pictures also ``thumbnails``,
    ``temporary`` and ``unlisted`` files.

    ``level`` is how far it is: ok, warn, clean or full. ``growth_bytes_per_hour`` is over the window, null
    with too few samples. ``warn_at`` and ``clean_at`` are when the lines are reached at that pace, null for
    never.
    """

    sampled_at: datetime
    used_bytes: int
    limit_bytes: int
    free_bytes: int
    level: Literal["ok"] | Level
    bytes_by_type: dict[str, int]
    growth_bytes_per_hour: float | None
    warn_at: datetime | None
    clean_at: datetime | None


class StatsView(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of the whole service over the last ``window_hours``; ``disk`` is null before a first sample."""

    window_hours: int
    total: TypeStats
    by_type: dict[str, TypeStats]
    throughput_per_hour: float
    bytes_by_type: dict[str, StoredBytes]
    cache: CacheStats
    queue: QueueStats
    disk: DiskStats | None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of a resource."""

    timestamp: datetime
    metric_type: str
    metric_value: int
    metric_unit: str
    details: dict[str, Any]


class UsagePage(msgspec.Struct, frozen=True, kw_only=True):
    """Samples, newest first."""

    items: list[Sample]
    next_cursor: str | None


class LimitView(msgspec.Struct, frozen=True, kw_only=True):
    """What may be had and what of it is in use; ``resets_at`` where time alone gives some of it back.

    ``of`` says whose it is: the caller's, a session's, a character's, or everybody's together.
    """

    name: str
    of: str
    allowed: int
    used: int
    resets_at: datetime | None = None


class LimitsView(msgspec.Struct, frozen=True, kw_only=True):
    """The limits that the caller's next request meets."""

    user_id: str
    items: list[LimitView]


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    """What can be asked for; ``params`` of each entry is a JSON Schema."""

    items: list[CatalogueEntry]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing forge needs; ``detail`` says what is wrong."""

    ok: bool
    detail: str = ""


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether forge can do all of its work."""

    ready: bool
    checks: dict[str, Check]
