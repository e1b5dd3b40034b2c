"""Jobs and assets as clients see them, from rows of the tables or from the log."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import asyncpg

from forge.api.places import Places
from forge.api.schemas import AssetView, JobAsset, JobError, JobView, Regeneration, UploadView
from forge.commands import Loaded
from forge.domain.jobs import Status
from forge.domain.uploads import Upload
from forge.events.jobs import JobAttemptFailed, JobCompleted, JobFailed, Regenerated, Terminal

ROOT = "/api/v1/comfyui"


def asset_url(asset_id: UUID | str) -> str:
    return f"{ROOT}/assets/{asset_id}/file"


def thumbnail_url(asset_id: UUID | str) -> str:
    return f"{ROOT}/assets/{asset_id}/thumbnail?width=256"


def job_of_row(row: asyncpg.Record, places: Places | None) -> JobView:
    """A job as the tables have it."""
    code = row["error_code"]
    error = None if code is None else JobError(code=code, message=row["error_message"] or "")
    again = _regeneration(row["regenerates"], row["regenerated"], row["status"], error)
    return JobView(
        id=row["id"],
        status=row["status"],
        job_type=row["job_type"],
        params=row["job_params"],
        priority=row["priority"],
        user_id=row["user_id"],
        session_id=row["session_id"],
        character_id=row["character_id"],
        batch_id=row["batch_id"],
        attempts=row["attempts"],
        max_attempts=row["max_attempts"],
        position=places.of(row["id"]) if places and row["status"] == Status.PENDING else None,
        created_at=row["created_at"],
        started_at=row["started_at"],
        completed_at=row["completed_at"],
        error=error,
        cached=row["cached"],
        assets=[_job_asset(asset["asset_id"], asset["content_hash"]) for asset in row["assets"]],
        regenerates=again,
        seq=row["seq"],
    )


def job_of_log(places: Places, loaded: Loaded) -> JobView:
    """A job as the log has it."""
    job, request = loaded.job, loaded.request
    last = next((fact for fact in reversed(loaded.facts) if fact.seq > job.admitted_seq), None)
    event = last.event if last else None
    failed = event if isinstance(event, JobFailed | JobAttemptFailed) else None
    done = event if isinstance(event, JobCompleted) else None
    error = JobError(code=failed.code, message=failed.message) if failed else None
    original = request.regenerates.asset_id if request.regenerates else None
    again = _regeneration(original, done.regenerated if done else None, job.status, error)
    return JobView(
        id=job.id,
        status=job.status,
        job_type=job.job_type,
        params=request.params,
        priority=job.priority,
        user_id=job.user_id,
        session_id=request.session_id,
        character_id=request.character_id,
        batch_id=request.batch_id,
        attempts=job.attempt,
        max_attempts=job.max_attempts,
        position=places.of(job.id) if job.status is Status.PENDING else None,
        created_at=loaded.requested.at,
        started_at=job.started_at,
        completed_at=last.meta.at if last and isinstance(event, Terminal) else None,
        error=error,
        cached=done.cached if done else False,
        assets=[_job_asset(asset.asset_id, asset.content_hash) for asset in done.assets] if done else [],
        regenerates=again,
        seq=max(job.admitted_seq, loaded.seq),  # the second counts its facts only
    )


def _regeneration(
    asset_id: UUID | None, result: Regenerated | None, status: str, error: JobError | None
) -> Regeneration | None:
    """What a job that was to draw an asset again has to say about that."""
    if asset_id is None:
        return None
    if status == Status.FAILED and error is not None:
        return Regeneration(asset_id=asset_id, result="cannot", reason=f"{error.code}: {error.message}")
    return Regeneration(asset_id=asset_id, result=result)


def _job_asset(asset_id: UUID | str, content_hash: str) -> JobAsset:
    id_ = UUID(str(asset_id))
    return JobAsset(id=id_, url=asset_url(id_), thumbnail_url=thumbnail_url(id_), content_hash=content_hash)


def asset_of_row(row: asyncpg.Record) -> AssetView:
    """An asset with one of its references."""
    values: dict[str, Any] = dict(row)
    return AssetView(**values, url=asset_url(row["id"]), thumbnail_url=thumbnail_url(row["id"]))


def upload_of_log(upload: Upload, seq: int) -> UploadView:
    """An upload as the log has it; its last event stands at ``seq``."""
    return _upload({name: getattr(upload, name) for name in upload.__struct_fields__} | {"seq": seq})


def upload_of_row(row: asyncpg.Record) -> UploadView:
    """An upload as the table has it."""
    return _upload(dict(row))


def _upload(values: dict[str, Any]) -> UploadView:
    url = f"{ROOT}/uploads/{values['id']}/file"
    own = {name: values[name] for name in UploadView.__struct_fields__ if name in values}
    return UploadView(**own, format="png", url=url)
