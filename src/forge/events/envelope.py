"""The envelope: who, when, why, as CloudEvents 1.0 headers around an event's body (binary mode).

Event ids derive from the command's id and the event's position in its decision, so publishing twice is
harmless: the log recognises the id.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

import msgspec
from uuid_utils.compat import uuid5

from forge.errors import LogUnreadable
from forge.events.catalogue import Event, decode

SOURCE = "/forge"
_NAMESPACE = UUID("6f726765-0000-5000-8000-000000000001")


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What surrounds a fact.

    ``actor`` did it, ``correlation`` is the request it was done for, ``causation`` the event or command
    that led to it, ``traceparent`` the W3C trace it is part of.
    """

    id: UUID
    at: datetime
    actor: str
    correlation: str
    causation: str = ""
    traceparent: str = ""


class Recorded(msgspec.Struct, frozen=True):
    """One event as the log holds it: position, subject, envelope and fact."""

    seq: int
    subject: str
    meta: Meta
    event: Event


def event_id(command: str, position: int) -> UUID:
    """The id of the ``position``-th event that ``command`` decided."""
    return uuid5(_NAMESPACE, f"{command}/{position}")


def headers(event: Event, meta: Meta, subject: str) -> dict[str, str]:
    """The headers of one message: CloudEvents attributes, and the id once more for the server's own check."""
    id_ = str(meta.id)
    made = {
        "ce-specversion": "1.0",
        "ce-id": id_,
        "ce-type": event.type_name(),
        "ce-source": SOURCE,
        "ce-subject": subject,
        "ce-time": meta.at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "ce-actor": meta.actor,
        "ce-correlationid": meta.correlation,
        "content-type": "application/json",
        "Nats-Msg-Id": id_,
    }
    if meta.causation:
        made["ce-causationid"] = meta.causation
    if meta.traceparent:
        made["traceparent"] = meta.traceparent
    return made


def open_envelope(seq: int, subject: str, given: Mapping[str, str] | None, body: bytes) -> Recorded:
    """Read one message of the log.

    Raises:
        LogUnreadable: names the sequence and what is wrong with it.
    """
    given = given or {}
    try:
        meta = Meta(
            id=msgspec.convert(given["ce-id"], UUID),  # three times as quick as UUID(…)
            at=_moment(given["ce-time"]),
            actor=given.get("ce-actor", ""),
            correlation=given.get("ce-correlationid", ""),
            causation=given.get("ce-causationid", ""),
            traceparent=given.get("traceparent", ""),
        )
        return Recorded(seq, subject, meta, decode(given["ce-type"], body))
    except KeyError as missing:
        raise LogUnreadable(f"message {seq} on {subject} has no header {missing}") from None
    except (ValueError, LogUnreadable) as error:
        raise LogUnreadable(f"message {seq} on {subject}: {error}") from error


def _moment(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"ce-time {text!r} has no offset")
    return at
