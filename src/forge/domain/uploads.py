"""The life of an upload: state, and what may happen to it next. No I/O, no clock.

::

    (nothing) ──store──▶ alive ──expire──▶ expired ──store──▶ alive
                          │  ▲
                          ╰──╯ store or use again: lives on from now

Whether an upload is alive is decided by its events alone: one whose time is up lives until the log says that
it expired, so that no wrong clock takes a picture from under a job.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from uuid import UUID

import msgspec

from forge.errors import UploadGone
from forge.events.catalogue import Event
from forge.events.uploads import UploadExpired, UploadRenewed, UploadStored

_RENEWALS = 10
"""A life is lengthened in steps of this part of it, so that much use makes few events."""


MOST_STRAYS, FEW_STRAYS, STRAY_SHARE = 1000, 20, 0.2
"""Files without an upload that may be removed at once: so many, always so few, or this share of all."""


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """One user's picture as the log tells it."""

    id: UUID
    user_id: str
    content_hash: str
    file_size_bytes: int
    width: int
    height: int
    ttl_seconds: int
    created_at: datetime
    expires_at: datetime


def fold(events: Iterable[Event], upload: Upload | None = None) -> Upload | None:
    """The upload after these events, the last of each type at least, in order; None when it is not alive."""
    for event in events:
        match event:
            case UploadStored():
                upload = Upload(
                    id=event.upload_id,
                    user_id=event.user_id,
                    content_hash=event.content_hash,
                    file_size_bytes=event.file_size_bytes,
                    width=event.width,
                    height=event.height,
                    ttl_seconds=event.ttl_seconds,
                    created_at=event.created_at,
                    expires_at=event.expires_at,
                )
            case UploadRenewed() if upload:
                upload = msgspec.structs.replace(upload, expires_at=event.expires_at)
            case UploadExpired():
                upload = None
    return upload


def too_many_strays(strays: int, files: int) -> bool:
    """Whether so many files without an upload are more likely a lost log than dead processes."""
    return strays > MOST_STRAYS or (strays > FEW_STRAYS and strays > files * STRAY_SHARE)


def store(upload: Upload | None, stored: UploadStored) -> list[Event]:
    """What follows from receiving the picture: it is stored, or lives on where it already is."""
    return [stored] if upload is None else use(upload, stored.created_at)


def use(upload: Upload | None, now: datetime) -> list[Event]:
    """What follows from using it: its life begins anew, unless little of it has passed.

    Raises:
        UploadGone: there is none.
    """
    if upload is None:
        raise UploadGone
    life = timedelta(seconds=upload.ttl_seconds)
    if now + life - upload.expires_at < life / _RENEWALS:
        return []
    return [
        UploadRenewed(
            upload_id=upload.id,
            user_id=upload.user_id,
            content_hash=upload.content_hash,
            expires_at=now + life,
        )
    ]


def expire(upload: Upload | None, now: datetime) -> list[Event]:
    """What follows from its time being up; nothing if it is not."""
    if upload is None or now < upload.expires_at:
        return []
    return [UploadExpired(upload_id=upload.id, user_id=upload.user_id, content_hash=upload.content_hash)]
