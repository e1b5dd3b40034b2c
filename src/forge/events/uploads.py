"""What can happen to an upload: a user's own picture, there to be used as a param."""

from __future__ import annotations

from uuid import UUID

from forge.events.catalogue import Event, Moment, event


@event("upload.stored")
class UploadStored(Event, frozen=True, kw_only=True):
    """A user's picture was drawn anew and may be used; it lives ``ttl_seconds`` from its last use on."""

    upload_id: UUID
    user_id: str
    content_hash: str
    file_path: str
    file_size_bytes: int
    width: int
    height: int
    ttl_seconds: int
    created_at: Moment
    expires_at: Moment


@event("upload.renewed")
class UploadRenewed(Event, frozen=True, kw_only=True):
    """The picture was sent again, or a job was asked for that uses it."""

    upload_id: UUID
    user_id: str
    content_hash: str
    expires_at: Moment


@event("upload.expired")
class UploadExpired(Event, frozen=True, kw_only=True):
    """Nobody used the picture for its lifetime; its file goes when no upload of anybody has that content."""

    upload_id: UUID
    user_id: str
    content_hash: str


UploadFact = UploadStored | UploadRenewed | UploadExpired
