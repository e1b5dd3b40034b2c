"""Acts on uploads: keep a picture that a user sent, let it live on while it is used, end it.

Whether an upload is there is read from its own facts in the log, so sending and using pictures works while
Postgres is down, and using and expiring at one moment never both succeed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from uuid import UUID

from forge.domain import uploads as rules
from forge.domain.ids import new_id
from forge.domain.uploads import Upload
from forge.errors import Conflict, FieldError, Invalid, LogUnavailable, UploadGone
from forge.events.catalogue import Event
from forge.events.uploads import UploadStored
from forge.eventstore import Entry, EventStore, drafts_of
from forge.topology import upload as facts_of
from forge.topology import uploads_of

_TRIES = 20
_CLIENT_SECONDS = 0.8  # how long somebody who waits for an answer waits for the log


class Uploads:
    """Takes uploads through their lives, over one log."""

    def __init__(self, store: EventStore) -> None:
        self.store = store

    async def find(self, user: str, upload_id: UUID, *, timeout: float = 2.0) -> Upload:
        """The upload as the log tells it.

        Raises:
            UploadGone: the user has none of that id, or it expired.
            LogUnavailable: no answer.
        """
        known, _ = await self._load(user, upload_id, timeout)
        if known is None:
            raise UploadGone
        return known

    async def keep(self, stored: UploadStored, *, actor: str) -> tuple[Upload, int, bool]:
        """Record that a picture is on disk, or lives on; the upload, its last event, and whether it is new.

        Raises:
            LogUnavailable: whether it is recorded is unknown; sending it again is harmless.
        """
        before, upload, seq = await self._act(
            stored.user_id, stored.upload_id, lambda known: rules.store(known, stored), "store", actor
        )
        assert upload is not None
        return upload, seq, before is None

    async def use(self, user: str, named: Mapping[str, UUID], *, actor: str) -> None:
        """Let the uploads live on that a request names, by field.

        Raises:
            Invalid: names the fields whose upload the user does not have.
            LogUnavailable: no answer.
        """
        gone: set[UUID] = set()
        for upload_id in set(named.values()):
            try:
                await self._act(
                    user, upload_id, lambda known: rules.use(known, datetime.now(UTC)), "use", actor
                )
            except UploadGone:
                gone.add(upload_id)
        if gone:
            message = "you have no such upload; it may have expired"
            raise Invalid([FieldError(field, message) for field, id_ in named.items() if id_ in gone])

    async def expire(self, user: str, upload_id: UUID, now: datetime, *, actor: str) -> bool:
        """End an upload whose time is up; whether it was.

        Raises:
            LogUnavailable: whether it is recorded is unknown.
        """
        before, after, _ = await self._act(
            user, upload_id, lambda known: rules.expire(known, now), "expire", actor
        )
        return before is not None and after is None

    async def referred(self, content_hash: str) -> bool:
        """Whether anybody's upload has this content, as the log tells it.

        Raises:
            LogUnavailable: no answer, or too many have had it for one.
        """
        facts = await self.store.load(uploads_of(content_hash))
        by_upload: dict[str, list[Event]] = {}
        for record in facts.events:
            by_upload.setdefault(record.subject.rpartition(".")[0], []).append(record.event)
        return any(rules.fold(events) for events in by_upload.values())

    async def _load(self, user: str, upload_id: UUID, timeout: float) -> tuple[Upload | None, int]:
        facts = await self.store.load(facts_of(user, upload_id), timeout=timeout)
        return rules.fold(record.event for record in facts.events), facts.seq

    async def _act(
        self,
        user: str,
        upload_id: UUID,
        decide: Callable[[Upload | None], list[Event]],
        name: str,
        actor: str,
    ) -> tuple[Upload | None, Upload | None, int]:
        """The upload before and after what was decided, and where its last event stands."""
        boundary = facts_of(user, upload_id)
        # new each time: two that do the same at once are two, and only one of them is written
        command = f"{upload_id}/{name}/{new_id()}"
        for _ in range(_TRIES):
            known, seq = await self._load(user, upload_id, _CLIENT_SECONDS)
            events = decide(known)
            if not events:
                return known, known, seq
            [event] = events
            drafts = drafts_of([Entry(event, boundary, seq)], f"{command}/{seq}", actor, upload_id)
            try:
                [record] = await self.store.append(drafts, within=_CLIENT_SECONDS)
            except Conflict:
                continue
            return known, rules.fold(events, known), record.seq
        raise LogUnavailable(f"upload {upload_id} changes faster than can be decided")
