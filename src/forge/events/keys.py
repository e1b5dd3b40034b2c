"""What can happen to an API key. The secret itself never enters the log."""

from __future__ import annotations

from forge.events.catalogue import Event, event


@event("key.created")
class KeyCreated(Event, frozen=True, kw_only=True):
    """An operator let somebody in; ``digest`` is the SHA-256 of the whole key, in hex."""

    key_id: str
    role: str
    user_id: str
    digest: str
    label: str | None = None


@event("key.revoked")
class KeyRevoked(Event, frozen=True, kw_only=True):
    """A key opens nothing any more, for ever."""

    key_id: str


KeyFact = KeyCreated | KeyRevoked
