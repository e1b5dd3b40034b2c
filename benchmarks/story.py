"""A log as a busy forge writes it: jobs of all fates, their pictures, fetches, pins and expiries.

Everything follows from the number of the job, so that every run has the same log.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import islice
from typing import Any
from uuid import UUID, uuid5

import msgspec
from nats.aio.client import Client

from forge import topology
from forge.domain.ids import asset_id
from forge.events.assets import (
    AssetExpired,
    AssetPinned,
    AssetReady,
    AssetsAccessed,
    AssetStored,
    Reads,
    SessionReleased,
)
from forge.events.catalogue import Event
from forge.events.envelope import Meta, event_id
from forge.events.jobs import (
    JobAttemptFailed,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobStarted,
    JobSubmitted,
    Produced,
)
from forge.eventstore import MAX_BATCH, Draft, EventStore

BEGAN = datetime(2026, 5, 1, tzinfo=UTC)
WORDS = ("jade", "cherry", "lantern", "sword", "mist", "phoenix", "lotus", "thunder", "bamboo", "crane")
USERS = 500
_NAMESPACE = UUID("6f726765-0000-5000-8000-0000000000be")


def events() -> Iterator[tuple[Event, datetime]]:
    """For ever: each job's facts, and now and then what readers and the clean-up did."""
    nth = 0
    while True:
        at = BEGAN + timedelta(seconds=7 * nth)
        yield from ((fact, at + timedelta(seconds=place)) for place, fact in enumerate(_job(nth, at)))
        if nth % 20 == 19:
            yield _fetched(nth, at), at
        if nth % 2 and nth > 2000:
            yield from ((fact, at) for fact in _expired(nth - 2000))
        nth += 1


def _job(nth: int, at: datetime) -> Iterator[Event]:
    job, user, kind = _uuid("job", nth), f"user-{nth % USERS}", "npc_bust"
    params = {
        "prompt": f"a {WORDS[nth % 10]} hairpin, {WORDS[nth // 10 % 10]} blossoms drifting by, no {nth:x}",
        "gender": "female",
        "age": "adult",
        "expression": "stern",
        "seed": nth * 7919,
        "width": 1024,
        "height": 1024,
    }
    yield JobSubmitted(
        job_id=job,
        user_id=user,
        job_type=kind,
        asset_type=kind,
        priority=nth % 10 + 1,
        params=params,
        workflow_version="v1",
        fingerprint=sha256(job.bytes).hexdigest(),
        session_id=f"session-{nth // 30}",
        character_id=f"npc-{nth // 20}",
    )
    if nth % 25 == 7:
        yield JobCancelled(job_id=job, user_id=user, attempt=0, job_type=kind, submitted_seq=1)
        return
    for attempt in range(1, 4 if nth % 25 == 11 else 2):
        yield JobStarted(
            job_id=job,
            user_id=user,
            attempt=attempt,
            job_type=kind,
            worker="worker-1-abcdef",
            backend="http://127.0.0.1:8188",
            reason="its turn: the longest wait among the highest priority",
            submitted_seq=1,
        )
        if nth % 25 == 11:
            yield JobAttemptFailed(
                job_id=job,
                user_id=user,
                attempt=attempt,
                code="prompt_failed",
                message="out of memory",
                retry_at=at + timedelta(seconds=60),
            )
    if nth % 25 == 11:
        yield JobFailed(
            job_id=job, user_id=user, attempt=3, job_type=kind, code="prompt_failed", message="out of memory"
        )
        return
    yield from _drawn(nth, job, user, kind, params, at)


def _drawn(
    nth: int, job: UUID, user: str, kind: str, params: dict[str, Any], at: datetime
) -> Iterator[Event]:
    content, size = _content(nth), 900_000 + nth % 700_001
    about: dict[str, Any] = {
        "asset_id": asset_id(content),
        "job_id": job,
        "user_id": user,
        "asset_type": kind,
    }
    owned = {"session_id": f"session-{nth // 30}", "character_id": f"npc-{nth // 20}"}
    picture: dict[str, Any] = {
        "content_hash": content,
        "format": "png",
        "width": 1024,
        "height": 1024,
        "file_size_bytes": size,
        "category": "monk",
        "archetype_id": f"archetype-{nth % 500}",
        "variant_key": "female_adult_stern",
    }
    yield AssetStored(
        **about,
        **owned,
        **picture,
        position=0,
        file_path=f"assets/{content[:2]}/{content[2:4]}/{content}.png",
        pixel_hash=content[::-1],
        dominant_color="#7f6a51",
        generation_params=params,
        created_at=at,
        expires_at=at + timedelta(days=30),
        session_bytes=size,
    )
    url = f"/api/v1/comfyui/assets/{about['asset_id']}/file"
    yield AssetReady(**about, **owned, **picture, url=url, character_assets=nth % 20 + 1)
    made = Produced(
        asset_id=about["asset_id"], asset_type=kind, content_hash=content, format="png", size_bytes=size
    )
    yield JobCompleted(
        job_id=job,
        user_id=user,
        attempt=1,
        job_type=kind,
        assets=[made],
        waited_ms=900 + nth % 700,
        run_ms=4000 + nth % 3000,
        recipe=sha256(content.encode()).hexdigest(),
        submitted_seq=1,
    )
    if nth % 50 == 3:
        yield AssetPinned(**about, **owned)


def _expired(nth: int) -> Iterator[Event]:
    """What the clean-up says of one job's picture, if it drew any."""
    if nth % 25 in (7, 11):
        return
    content, job, user = _content(nth), _uuid("job", nth), f"user-{nth % USERS}"
    size, session = 900_000 + nth % 700_001, f"session-{nth // 30}"
    about: dict[str, Any] = {"asset_id": asset_id(content), "job_id": job, "user_id": user}
    yield AssetExpired(
        **about,
        asset_type="npc_bust",
        content_hash=content,
        format="png",
        reason="expired",
        file_size_bytes=size,
        session_id=session,
        character_id=f"npc-{nth // 20}",
        character_assets=0,
    )
    yield SessionReleased(**about, session_id=session, released_bytes=size, session_bytes=0)


def _fetched(nth: int, at: datetime) -> Event:
    """Twenty pictures of the last hours, as one API counted them in some seconds."""
    reads = [
        Reads(
            asset_id=asset_id(_content(max(0, nth - 17 * back))),
            user_id=f"user-{(nth - 17 * back) % USERS}",
            count=back % 3 + 1,
            first_at=at,
            last_at=at,
        )
        for back in range(20)
    ]
    return AssetsAccessed(source="api-8600", reads=reads)


def _content(nth: int) -> str:
    return sha256(b"%d" % nth).hexdigest()


def _uuid(kind: str, nth: int) -> UUID:
    return uuid5(_NAMESPACE, f"{kind} {nth}")


async def write(nc: Client, count: int, *, after: int = 0) -> None:
    """The events up to so many into a log that has those up to ``after``, a thousand at once."""
    log, facts, done = EventStore(nc), islice(events(), after, None), after
    while done < count:
        drafts = [
            Draft(fact, _meta(done + nth, at)) for nth, (fact, at) in enumerate(islice(facts, MAX_BATCH))
        ][: count - done]
        where = topology.subject(drafts[0].event)
        last = await log.last(where)
        drafts[0] = msgspec.structs.replace(drafts[0], boundary=where, expected=last.seq if last else 0)
        await log.append(drafts, within=60.0)
        done += len(drafts)


def _meta(nth: int, at: datetime) -> Meta:
    command = f"story {nth}"
    return Meta(
        id=event_id(command, 0),
        at=at,
        actor="service:game#3f2a9c41d0b7e865",
        correlation=str(_uuid("job", nth // 5)),
        causation=command,
    )
