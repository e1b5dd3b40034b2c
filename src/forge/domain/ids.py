"""Ids that follow from what they name, so that saying a thing twice names it once."""

from __future__ import annotations

import hashlib
from uuid import UUID, uuid5

import uuid_utils.compat

_ATTEMPT = UUID("6f726765-0000-5000-8000-000000000002")


def new_id() -> UUID:
    """A fresh, time-ordered id (UUIDv7)."""
    return uuid_utils.compat.uuid7()


def derived_id(kind: str, *names: str) -> UUID:
    """The one id of these names: shaped like a UUIDv7, but its time bits are a hash and not a time.

    Clients see ids of one shape only, and a name gives the same id for ever.
    """
    digest = hashlib.sha256("\0".join((kind, *names)).encode()).digest()
    bits = int.from_bytes(digest[:16], "big")
    bits = (bits & ~(0xF << 76)) | (7 << 76)
    bits = (bits & ~(0x3 << 62)) | (2 << 62)
    return UUID(int=bits)


def keyed_job_id(user: str, key: str) -> UUID:
    """The job that this user's Idempotency-Key stands for."""
    return derived_id("job", user, key)


def asset_id(content_hash: str) -> UUID:
    """The asset that holds this content."""
    return derived_id("asset", content_hash)


def upload_id(user: str, content_hash: str) -> UUID:
    """This user's upload of this content."""
    return derived_id("upload", user, content_hash)


def prompt_id(job: UUID, attempt: int) -> UUID:
    """The prompt of one attempt: a redelivered order finds it instead of drawing twice."""
    return uuid5(_ATTEMPT, f"{job}/{attempt}")
