"""What workers would write, written by hand: a job's start, its end, and the assets it made."""

from __future__ import annotations

import hashlib
import io
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

from PIL import Image

from forge.api.parts import Parts
from forge.commands import Loaded
from forge.domain.assets import regenerated
from forge.domain.ids import asset_id
from forge.domain.jobs import Complete, FailAttempt, Start
from forge.events.assets import AssetStored
from forge.events.jobs import Produced
from waiting import wait_until


async def load(parts: Parts, user: str, job: dict[str, Any]) -> Loaded:
    async def in_line() -> Any:  # a retry stands there when it was read back
        return parts.admissions.line.jobs.get(UUID(job["id"]))

    waiting = await wait_until(in_line, what="the job stands in line")
    return await parts.jobs.load(user, waiting.id, waiting.submitted_seq, waiting.admitted_seq)


async def started(parts: Parts, user: str, job: dict[str, Any]) -> Loaded:
    loaded = await load(parts, user, job)
    attempt = loaded.job.attempt + 1
    return await parts.jobs.act(
        loaded, Start(attempt, "worker-a", "http://comfy", "first"), actor="worker", name=f"{attempt}/start"
    )


async def failed(parts: Parts, user: str, job: dict[str, Any], *, final: bool = True) -> Loaded:
    loaded = await started(parts, user, job)
    command = FailAttempt(loaded.job.attempt, "prompt_failed", "out of memory", final, datetime.now(UTC))
    return await parts.jobs.act(loaded, command, actor="worker", name=f"{loaded.job.attempt}/fail")


async def completed(
    parts: Parts, user: str, job: dict[str, Any], *, color: str = "#336699", size: int = 600, **labels: Any
) -> Loaded:
    """End a job with one picture of one colour, really on the volume."""
    loaded = await started(parts, user, job)
    content = picture(color, size)
    content_hash = hashlib.sha256(content).hexdigest()
    path = parts.blobs.path(content_hash, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    id_ = asset_id(content_hash)
    now = datetime.now(UTC)
    request = loaded.request
    common: dict[str, Any] = {
        "asset_id": id_,
        "job_id": loaded.job.id,
        "user_id": user,
        "asset_type": request.asset_type,
        "content_hash": content_hash,
        "format": "png",
        "file_size_bytes": len(content),
        "width": size,
        "height": size,
        "session_id": request.session_id,
        "character_id": request.character_id,
    } | labels
    stored = AssetStored(
        **common,
        pixel_hash=hashlib.sha256(color.encode()).hexdigest(),
        file_path=str(path.relative_to(parts.blobs.root)),
        dominant_color=color,
        position=0,
        generation_params=dict(request.params),
        created_at=now,
        expires_at=now + timedelta(days=7),
    )
    produced = Produced(
        asset_id=id_,
        asset_type=request.asset_type,
        content_hash=content_hash,
        format="png",
        size_bytes=len(content),
    )
    return await parts.jobs.act(
        loaded,
        Complete(
            loaded.job.attempt, "worker-a", (produced,), now, regenerated(request.regenerates, [stored])
        ),
        actor="worker",
        name=f"{loaded.job.attempt}/complete",
        before=partial(parts.library.entries, [stored]),
    )


def picture(color: str, size: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, "PNG")
    return buffer.getvalue()


def some_id() -> UUID:
    return uuid4()
