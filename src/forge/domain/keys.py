"""API keys: what one looks like, who may have one, and which are good, folded from their events.

A key is ``forge_<id>_<secret>``. The id finds it, the SHA-256 of the whole proves it; an unknown key costs a
pattern, a look-up and a hash, whatever there is in the log.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import unicodedata
from datetime import datetime

import msgspec

from forge.errors import FieldError, Invalid
from forge.events.envelope import Recorded
from forge.events.keys import KeyCreated, KeyRevoked

ROLES = ("player", "service", "operator")
MAX_TEXT = 512
"""Characters of any key, bootstrap keys included; what is longer is not looked at."""

_FORM = re.compile(r"forge_([0-9a-f]{16})_[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{16}")
_MAX_NAME = 128


class Key(msgspec.Struct, frozen=True):
    """One key as its events tell it; ``seq`` is the last of them."""

    id: str
    role: str
    user_id: str
    label: str | None
    digest: bytes
    created_at: datetime
    created_by: str
    seq: int
    revoked_at: datetime | None = None
    revoked_by: str | None = None


class Keyring:
    """Every key there ever was; feed it the log in order. An event that was seen before changes nothing."""

    def __init__(self) -> None:
        self.keys: dict[str, Key] = {}

    def apply(self, record: Recorded) -> None:
        event, meta = record.event, record.meta
        if isinstance(event, KeyCreated):
            made = Key(
                event.key_id,
                event.role,
                event.user_id,
                event.label,
                bytes.fromhex(event.digest),
                meta.at,
                meta.actor,
                record.seq,
            )
            self.keys.setdefault(event.key_id, made)
        elif isinstance(event, KeyRevoked):
            key = self.keys.get(event.key_id)
            if key is not None and key.revoked_at is None:
                self.keys[key.id] = msgspec.structs.replace(
                    key, seq=record.seq, revoked_at=meta.at, revoked_by=meta.actor
                )

    def good(self, key_id: str) -> bool:
        """Whether the key of this id opens the door now."""
        key = self.keys.get(key_id)
        return key is not None and key.revoked_at is None

    def find(self, text: str) -> Key | None:
        """The good key that this text is. Unknown, false and revoked ones take the same work."""
        match = _FORM.fullmatch(text)
        if match is None:
            return None
        key = self.keys.get(match[1])
        same = hmac.compare_digest(digest(text), key.digest if key else _NO_DIGEST)
        return key if key is not None and same and key.revoked_at is None else None


_NO_DIGEST = bytes(32)


def has_form(text: str) -> bool:
    """Whether the log could hold such a key."""
    return _FORM.fullmatch(text) is not None


def is_id(text: str) -> bool:
    """Whether a key could have this id."""
    return _ID.fullmatch(text) is not None


def digest(text: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def created(key_id: str, secret: str, role: str, user: str, label: str | None) -> tuple[str, KeyCreated]:
    """A key's text, to be shown once, and the event that creates it.

    Args:
        key_id: 16 hexadecimal digits, at random.
        secret: 64 of them.

    Raises:
        Invalid: a role there is not, or a name that nobody can have.
    """
    wrong = [] if role in ROLES else [FieldError("role", f"must be one of {', '.join(ROLES)}")]
    for field, name in (("user", user), ("label", label)):
        if name is not None and not _is_name(name):
            wrong.append(FieldError(field, f"must have 1 to {_MAX_NAME} characters, none of them invisible"))
    if wrong:
        raise Invalid(wrong)
    text = f"forge_{key_id}_{secret}"
    return text, KeyCreated(key_id=key_id, role=role, user_id=user, digest=digest(text).hex(), label=label)


def _is_name(text: str) -> bool:
    visible = all(char == " " or unicodedata.category(char)[0] not in "CZ" for char in text)
    return visible and 1 <= len(text) <= _MAX_NAME and text.strip() == text
