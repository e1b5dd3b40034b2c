"""Events and logs for tests: every field has a value, a test names only what it is about."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from uuid import UUID

from forge.admissions import JobRequest
from forge.domain.ids import asset_id, upload_id
from forge.events.assets import (
    AssetDeleted,
    AssetExpired,
    AssetLost,
    AssetPinned,
    AssetReady,
    AssetsAccessed,
    AssetStored,
    AssetUnpinned,
    Reads,
    SessionReleased,
)
from forge.events.catalogue import Event
from forge.events.cleanup import CleanupFinished, CleanupHeld, CleanupRequested
from forge.events.envelope import Meta, Recorded, event_id
from forge.events.jobs import (
    JobAdopted,
    JobAttemptFailed,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobRedirected,
    JobRetried,
    JobStarted,
    JobSubmitted,
    Produced,
)
from forge.events.keys import KeyCreated, KeyRevoked
from forge.events.system import DiskCrossed, MetricSampled
from forge.events.uploads import UploadExpired, UploadRenewed, UploadStored
from forge.topology import subject

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
JOB = UUID("0199c0de-0000-7000-8000-000000000001")


def job_id(number: int) -> UUID:
    """The id of the test's ``number``-th job."""
    return UUID(int=JOB.int + number - 1)


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


# -------------------------------------------------------------------- jobs


def submitted(job: UUID = JOB, user: str = "mei", priority: int = 5, **fields: Any) -> JobSubmitted:
    given: dict[str, Any] = {
        "job_type": "npc_bust",
        "asset_type": "npc_bust",
        "params": {"prompt": "a crane above the clouds", "seed": 7},
        "workflow_version": "v1",
        "fingerprint": "0" * 64,
    }
    return JobSubmitted(job_id=job, user_id=user, priority=priority, **given | fields)


def retried(job: UUID = JOB, user: str = "mei", **fields: Any) -> JobRetried:
    given = {"job_type": "npc_bust", "priority": 5, "submitted_seq": 1, "attempt": 3, "max_attempts": 6}
    return JobRetried(job_id=job, user_id=user, **given | fields)


def started(job: UUID = JOB, user: str = "mei", attempt: int = 1, **fields: Any) -> JobStarted:
    given = {
        "job_type": "npc_bust",
        "worker": "worker-a",
        "backend": "http://comfy",
        "reason": "its turn",
        "submitted_seq": 1,
    }
    return JobStarted(job_id=job, user_id=user, attempt=attempt, **given | fields)


def adopted(job: UUID = JOB, user: str = "mei", attempt: int = 1, **fields: Any) -> JobAdopted:
    given = {"adoption": 1, "worker": "worker-b"}
    return JobAdopted(job_id=job, user_id=user, attempt=attempt, **given | fields)


def redirected(job: UUID = JOB, user: str = "mei", attempt: int = 1, **fields: Any) -> JobRedirected:
    given = {"redirection": 1, "worker": "worker-a", "backend": "http://other", "reason": "its turn"}
    return JobRedirected(job_id=job, user_id=user, attempt=attempt, **given | fields)


def attempt_failed(job: UUID = JOB, user: str = "mei", attempt: int = 1, **fields: Any) -> JobAttemptFailed:
    given = {"code": "prompt_failed", "message": "out of memory", "retry_at": after(2)}
    return JobAttemptFailed(job_id=job, user_id=user, attempt=attempt, **given | fields)


def completed(job: UUID = JOB, user: str = "mei", attempt: int = 1, **fields: Any) -> JobCompleted:
    given: dict[str, Any] = {
        "job_type": "npc_bust",
        "assets": [produced()],
        "waited_ms": 0,
        "run_ms": 0,
        "submitted_seq": 1,
    }
    return JobCompleted(job_id=job, user_id=user, attempt=attempt, **given | fields)


def failed(job: UUID = JOB, user: str = "mei", attempt: int = 3, **fields: Any) -> JobFailed:
    given = {"job_type": "npc_bust", "code": "prompt_failed", "message": "out of memory"}
    return JobFailed(job_id=job, user_id=user, attempt=attempt, **given | fields)


def cancelled(job: UUID = JOB, user: str = "mei", attempt: int = 0, **fields: Any) -> JobCancelled:
    given = {"job_type": "npc_bust", "submitted_seq": 1}
    return JobCancelled(job_id=job, user_id=user, attempt=attempt, **given | fields)


def request(**fields: Any) -> JobRequest:
    """A checked request, as the API hands it to admission."""
    given: dict[str, Any] = {
        "job_type": "npc_bust",
        "asset_type": "npc_bust",
        "params": {"prompt": "a crane", "seed": 7},
        "workflow_version": "v1",
        "fingerprint": "0" * 64,
    }
    return JobRequest(**given | fields)


# ------------------------------------------------------------------ assets

HASH = "ab" * 32


def produced(content_hash: str = HASH) -> Produced:
    return Produced(
        asset_id=asset_id(content_hash),
        asset_type="npc_bust",
        content_hash=content_hash,
        format="png",
        size_bytes=1200,
    )


def stored(job: UUID = JOB, user: str = "mei", content_hash: str = HASH, **fields: Any) -> AssetStored:
    given: dict[str, Any] = {
        "asset_type": "npc_bust",
        "pixel_hash": "cd" * 32,
        "format": "png",
        "file_path": f"{content_hash[:2]}/{content_hash[2:4]}/{content_hash}.png",
        "file_size_bytes": 1200,
        "width": 512,
        "height": 768,
        "dominant_color": "#336699",
        "position": 0,
        "generation_params": {"prompt": "a crane", "seed": 7},
        "created_at": NOW,
        "expires_at": after(3600),
    }
    return AssetStored(
        asset_id=asset_id(content_hash), job_id=job, user_id=user, content_hash=content_hash, **given | fields
    )


def ready(job: UUID = JOB, user: str = "mei", content_hash: str = HASH, **fields: Any) -> AssetReady:
    id_ = asset_id(content_hash)
    given: dict[str, Any] = {
        "asset_type": "npc_bust",
        "format": "png",
        "width": 512,
        "height": 768,
        "file_size_bytes": 1200,
        "url": f"/api/v1/comfyui/assets/{id_}/file",
    }
    return AssetReady(asset_id=id_, job_id=job, user_id=user, content_hash=content_hash, **given | fields)


def deleted(job: UUID = JOB, user: str = "mei", content_hash: str = HASH, **fields: Any) -> AssetDeleted:
    given: dict[str, Any] = {"asset_type": "npc_bust", "format": "png", "reason": "asked"}
    return AssetDeleted(
        asset_id=asset_id(content_hash), job_id=job, user_id=user, content_hash=content_hash, **given | fields
    )


# ----------------------------------------------------------------- uploads


def upload_stored(user: str = "mei", content_hash: str = HASH, **fields: Any) -> UploadStored:
    given: dict[str, Any] = {
        "file_path": f"uploads/{content_hash[:2]}/{content_hash[2:4]}/{content_hash}.png",
        "file_size_bytes": 1200,
        "width": 512,
        "height": 768,
        "ttl_seconds": 1000,
        "created_at": NOW,
        "expires_at": after(1000),
    }
    return UploadStored(
        upload_id=upload_id(user, content_hash), user_id=user, content_hash=content_hash, **given | fields
    )


def upload_renewed(user: str = "mei", content_hash: str = HASH, **fields: Any) -> UploadRenewed:
    given = {"expires_at": after(2000)}
    return UploadRenewed(
        upload_id=upload_id(user, content_hash), user_id=user, content_hash=content_hash, **given | fields
    )


def upload_expired(user: str = "mei", content_hash: str = HASH) -> UploadExpired:
    return UploadExpired(upload_id=upload_id(user, content_hash), user_id=user, content_hash=content_hash)


def expired(job: UUID = JOB, user: str = "mei", content_hash: str = HASH, **fields: Any) -> AssetExpired:
    given: dict[str, Any] = {"asset_type": "npc_bust", "format": "png", "reason": "expired"}
    return AssetExpired(
        asset_id=asset_id(content_hash), job_id=job, user_id=user, content_hash=content_hash, **given | fields
    )


def released(job: UUID = JOB, user: str = "mei", content_hash: str = HASH, **fields: Any) -> SessionReleased:
    given: dict[str, Any] = {"session_id": "s-1", "released_bytes": 1200, "session_bytes": 0}
    return SessionReleased(asset_id=asset_id(content_hash), job_id=job, user_id=user, **given | fields)


def pinned(job: UUID = JOB, user: str = "mei", content_hash: str = HASH, **fields: Any) -> AssetPinned:
    given: dict[str, Any] = {"asset_type": "npc_bust"}
    return AssetPinned(asset_id=asset_id(content_hash), job_id=job, user_id=user, **given | fields)


def unpinned(job: UUID = JOB, user: str = "mei", content_hash: str = HASH, **fields: Any) -> AssetUnpinned:
    given: dict[str, Any] = {"asset_type": "npc_bust"}
    return AssetUnpinned(asset_id=asset_id(content_hash), job_id=job, user_id=user, **given | fields)


def lost(content_hash: str = HASH, **fields: Any) -> AssetLost:
    given: dict[str, Any] = {
        "asset_type": "npc_bust",
        "format": "png",
        "file_size_bytes": 1200,
        "found": "there is no file",
        "stored_seq": 1,
    }
    return AssetLost(asset_id=asset_id(content_hash), content_hash=content_hash, **given | fields)


def cleanup_requested(**fields: Any) -> CleanupRequested:
    given: dict[str, Any] = {
        "request_id": JOB,
        "reasons": ["expired"],
        "asked_at": NOW,
        "assets": 1,
        "size_bytes": 1200,
        "executor": "cleanup",
    }
    return CleanupRequested(**given | fields)


def cleanup_held(**fields: Any) -> CleanupHeld:
    given: dict[str, Any] = {"reasons": ["expired", "lost"], "assets": 30, "size_bytes": 36_000, "of": 40}
    return CleanupHeld(**given | fields)


def cleanup_finished(**fields: Any) -> CleanupFinished:
    given: dict[str, Any] = {"assets": {"expired": 1}, "size_bytes": {"expired": 1200}}
    return CleanupFinished(**given | fields)


def crossed(**fields: Any) -> DiskCrossed:
    given: dict[str, Any] = {"level": "warn", "above": True, "used_bytes": 900, "limit_bytes": 1000}
    return DiskCrossed(**given | fields)


def reads(user: str = "mei", content_hash: str = HASH, count: int = 1, **fields: Any) -> Reads:
    given: dict[str, Any] = {"first_at": NOW, "last_at": NOW}
    return Reads(asset_id=asset_id(content_hash), user_id=user, count=count, **given | fields)


def accessed(*counted: Reads, source: str = "api-8600") -> AssetsAccessed:
    return AssetsAccessed(source=source, reads=list(counted or [reads()]))


# -------------------------------------------------------------------- keys

KEY = "3f2a9c41d0b7e865"


def key_created(key_id: str = KEY, role: str = "player", user: str = "mei", **fields: Any) -> KeyCreated:
    given = {"digest": "ef" * 32}
    return KeyCreated(key_id=key_id, role=role, user_id=user, **given | fields)


def key_revoked(key_id: str = KEY) -> KeyRevoked:
    return KeyRevoked(key_id=key_id)


def sampled(**fields: Any) -> MetricSampled:
    given: dict[str, Any] = {"metric_type": "disk_usage", "value": 4096, "unit": "bytes", "details": {}}
    return MetricSampled(**given | fields)


# --------------------------------------------------------------------- log


def meta(command: str = "a command", position: int = 0, at: datetime = NOW, actor: str = "test") -> Meta:
    return Meta(id=event_id(command, position), at=at, actor=actor, correlation=str(JOB), causation=command)


class Log:
    """A log in memory: gives events their sequence, and a second each."""

    def __init__(self) -> None:
        self.records: list[Recorded] = []
        self._seqs = count(1)

    def add(self, event: Event, at: datetime | None = None) -> Recorded:
        seq = next(self._seqs)
        when = at or after(seq)
        record = Recorded(seq, subject(event), meta(f"event {seq}", at=when), event)
        self.records.append(record)
        return record
