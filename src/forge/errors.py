"""Every error forge raises on purpose, in one tree.

::

    ForgeError
    ├── Refused                     the request cannot be granted as it stands
    │   ├── Invalid                 422, names every field
    │   ├── Malformed               400, could not be read at all
    │   ├── TooLarge                413
    │   ├── TooSlow                 408, the request did not come in time
    │   ├── AddressTooLong          414
    │   ├── HeadTooLarge            431
    │   ├── NotFound                404, also for what belongs to somebody else
    │   ├── Forbidden               403
    │   ├── Unauthenticated         401
    │   ├── KeyReused               422, same Idempotency-Key, other body
    │   ├── JobAlreadyOver          409
    │   ├── JobNotFailed            409
    │   ├── UploadGone              409, at submission told as the field that names it
    │   ├── Pinned                  409, it is to stay
    │   ├── CannotRegenerate        409, its recipe cannot be followed any more
    │   ├── LimitReached            429, somebody's own limit
    │   └── QueueFull               503, forge as a whole is full
    ├── Unavailable                 a server forge needs does not answer: 503, try again
    │   ├── LogUnavailable
    │   ├── DatabaseUnavailable
    │   │   └── TablesMissing       somebody emptied it: the tables are made again from the log
    │   ├── DiskFull                the asset volume has no room
    │   ├── Overloaded              memory is short
    │   ├── NothingDeletedNow       what would go cannot be known for certain
    │   └── NoBackend
    ├── StaleAttempt                a result came from an attempt that is no longer current
    ├── Conflict                    the log moved on since the decision was made: load, decide again
    ├── LogUnreadable               an event in the log cannot be decoded
    ├── LogDamaged                  events are missing from the log, or it is another one
    ├── ArchiveDamaged              the second copy of the log does not hold together
    ├── TopologyDiffers             a stream or consumer cannot be changed into what the file says
    ├── NotSetUp                    a stream or consumer is missing
    ├── NotLetIn                    NATS does not take the user and password
    ├── SettingInvalid              a variable of the environment has a bad value
    ├── WorkflowInvalid             a job type's two files are wrong
    ├── MigrationFailed             the database cannot be brought to this version
    ├── ReplayRefused               tables cannot be rebuilt, or what was rebuilt is not what is there
    ├── RestoreRefused              the log cannot be restored, or need not be
    ├── ClosingRefused              the book cannot be closed so far, or not now
    ├── FileUnfit                   a file is no whole copy of the log
    ├── ServerFailed                an embedded server did not start
    ├── PictureRefused              bytes that are not a picture forge accepts
    ├── StoreFailed                 the asset volume refused a write
    │   └── StoreMissing            it is not the asset volume: a lost mount
    └── ComfyError                  what ComfyUI did to a prompt
        ├── BackendUnreachable      no answer: look again before anything else
        │   └── NeverSent           not even a connection: it cannot have the prompt
        ├── BackendWedged           it answers but no longer executes
        ├── PromptRejected          it will never run: permanent
        ├── PromptFailed            it ran into an error
        ├── PromptInterrupted       somebody stopped it
        ├── PromptLost              ComfyUI no longer knows it
        └── PromptTimedOut          it ran longer than its job type allows

Whether to try again is decided by type (``retryable``), never by reading text.
"""

from __future__ import annotations

import errno
from datetime import datetime
from typing import ClassVar

import msgspec


class ForgeError(Exception):
    """Something forge knows how to name."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail or (type(self).__doc__ or "").split("\n")[0])

    @property
    def detail(self) -> str:
        return str(self.args[0])


class FieldError(msgspec.Struct, frozen=True):
    """One field of a request and what is wrong with it."""

    field: str
    message: str


class Refused(ForgeError):
    """The request cannot be granted."""

    code = "refused"


class Invalid(Refused):
    """The request was understood, but some fields are not acceptable."""

    code = "invalid"

    def __init__(self, errors: list[FieldError], detail: str = "") -> None:
        self.errors = errors
        super().__init__(
            detail or "; ".join(f"{e.field}: {e.message}" if e.field else e.message for e in errors[:5])
        )


class Malformed(Refused):
    """The request could not be read."""

    code = "malformed"


class TooLarge(Refused):
    """The request is larger than forge accepts."""

    code = "too_large"


class TooSlow(Refused):
    """The request did not arrive in time; send it again, faster."""

    code = "too_slow"


class AddressTooLong(Refused):
    """The path and query are longer than forge reads."""

    code = "address_too_long"


class HeadTooLarge(Refused):
    """The headers are more or larger than forge reads."""

    code = "head_too_large"


class NotFound(Refused):
    """There is no such thing here."""

    code = "not_found"


class Unauthenticated(Refused):
    """Send a valid key as `Authorization: Bearer KEY`."""

    code = "unauthenticated"


class Forbidden(Refused):
    """This key may not do that."""

    code = "forbidden"


class KeyReused(Refused):
    """This Idempotency-Key was used with another body; send a new key for a new request."""

    code = "idempotency_key_reused"


class JobAlreadyOver(Refused):
    """The job is already over."""

    code = "job_over"


class JobNotFailed(Refused):
    """Only a failed job can be retried."""

    code = "job_not_failed"


class UploadGone(Refused):
    """The uploaded picture is not there any more; upload it again."""

    code = "upload_gone"


class Pinned(Refused):
    """The asset is pinned."""

    code = "pinned"


class CannotRegenerate(Refused):
    """The asset cannot be drawn again."""

    code = "cannot_regenerate"


class QueueFull(Refused):
    """forge's queue is full; try again later."""

    code = "queue_full"


class Limit(msgspec.Struct, frozen=True):
    """What somebody may have, what of it is in use, and when that will be less, if time alone does it."""

    name: str
    allowed: int
    used: int
    resets_at: datetime | None = None


class LimitReached(Refused):
    """A limit of yours is reached. ``never`` says that so much at once is more than it allows at all."""

    code = "limit_reached"

    def __init__(self, limit: Limit, detail: str = "", *, never: bool = False) -> None:
        self.limit, self.never = limit, never
        super().__init__(detail or f"{limit.name}: {limit.used} of {limit.allowed} are in use")


class Unavailable(ForgeError):
    """A server that forge needs does not answer."""

    code = "unavailable"
    retryable = True


class LogUnavailable(Unavailable):
    """The event log (NATS) does not answer; nothing can be accepted right now."""

    code = "log_unavailable"


class DatabaseUnavailable(Unavailable):
    """The database (Postgres) does not answer; submitting still works, reading does not."""

    code = "database_unavailable"


class TablesMissing(DatabaseUnavailable):
    """The database was emptied; its tables are made again from the log."""

    code = "tables_missing"


class DiskFull(Unavailable):
    """The asset volume is full; nothing is taken until there is room again."""

    code = "disk_full"


class Overloaded(Unavailable):
    """forge is short of memory; come again."""

    code = "overloaded"


class NothingDeletedNow(Unavailable):
    """What may be deleted cannot be known for certain right now, so nothing is."""

    code = "nothing_deleted_now"


class NoBackend(Unavailable):
    """No ComfyUI is reachable."""

    code = "no_backend"


class StaleAttempt(ForgeError):
    """Another attempt of this job is current, or the job is over."""

    code = "stale_attempt"


class Conflict(ForgeError):
    """The log moved on since the decision was made."""

    code = "conflict"
    retryable = True


class LogUnreadable(ForgeError):
    """An event in the log cannot be decoded."""

    code = "log_unreadable"


class LogDamaged(ForgeError):
    """The log is not whole."""

    code = "log_damaged"

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the log is not whole: {reason}. Nothing was changed; what to do stands in docs/RUNBOOK.md "
            "under `the log is not whole`"
        )


class ArchiveDamaged(ForgeError):
    """The second copy of the log does not hold together."""

    code = "archive_damaged"

    def __init__(self, seq: int, reason: str) -> None:
        self.seq = seq
        super().__init__(f"the second copy of the log does not hold at event {seq}: {reason}")


class TopologyDiffers(ForgeError):
    """A stream or consumer on the server cannot be changed into what the file says."""

    code = "topology_differs"


class NotSetUp(ForgeError):
    """Streams or consumers that forge needs are missing; run `forge setup`."""

    code = "not_set_up"


class NotLetIn(ForgeError):
    """NATS does not take the user and password that forge has."""

    code = "not_let_in"


class SettingInvalid(ForgeError):
    """A setting has a value forge cannot use."""

    code = "setting_invalid"


class WorkflowInvalid(ForgeError):
    """A job type's files are wrong."""

    code = "workflow_invalid"


class MigrationFailed(ForgeError):
    """The database cannot be brought to this version."""

    code = "migration_failed"


class ReplayRefused(ForgeError):
    """The tables cannot be rebuilt now, or what was rebuilt is not what is there."""

    code = "replay_refused"


class RestoreRefused(ForgeError):
    """The log cannot be restored now, or need not be."""

    code = "restore_refused"


class ClosingRefused(ForgeError):
    """The book cannot be closed so far, or not now."""

    code = "closing_refused"


class FileUnfit(ForgeError):
    """A file is no whole copy of the log."""

    code = "file_unfit"


class ServerFailed(ForgeError):
    """An embedded server did not start, or one of forge's own has no place to listen."""

    code = "server_failed"


class PictureRefused(ForgeError):
    """These bytes are not a picture forge accepts."""

    code = "picture_refused"


class StoreFailed(ForgeError):
    """The asset volume refused a write."""

    code = "store_failed"
    retryable = True


FULL_VOLUME = frozenset({errno.ENOSPC, errno.EDQUOT})


def refusal(where: object, error: OSError) -> DiskFull | StoreFailed:
    """What it means that the asset volume refused: it is full, or something else is wrong with it."""
    kind = DiskFull if error.errno in FULL_VOLUME else StoreFailed
    return kind(f"{where}: {error.strerror or error}")


class StoreMissing(StoreFailed):
    """The folder of pictures is not the one forge knows: is the volume mounted?"""

    code = "store_missing"
    retryable = False


class ComfyError(ForgeError):
    """ComfyUI did something to a prompt."""

    code = "comfyui"


class BackendUnreachable(ComfyError):
    """ComfyUI did not answer; whether it has the prompt is unknown."""

    code = "backend_unreachable"
    retryable = True


class NeverSent(BackendUnreachable):
    """No connection to ComfyUI could be made, so nothing was sent."""

    code = "never_sent"


class BackendWedged(ComfyError):
    """ComfyUI answers but no longer executes."""

    code = "backend_wedged"
    retryable = True


class PromptRejected(ComfyError):
    """ComfyUI refused the graph; it will never run."""

    code = "prompt_rejected"

    def __init__(self, detail: str = "", node_errors: dict[str, object] | None = None) -> None:
        self.node_errors = node_errors or {}
        super().__init__(detail)


class PromptFailed(ComfyError):
    """A node of the graph raised an error."""

    code = "prompt_failed"
    retryable = True


class PromptInterrupted(ComfyError):
    """Somebody interrupted the prompt at ComfyUI."""

    code = "prompt_interrupted"
    retryable = True


class PromptLost(ComfyError):
    """ComfyUI no longer knows the prompt."""

    code = "prompt_lost"
    retryable = True


class PromptTimedOut(ComfyError):
    """The prompt ran longer than its job type allows."""

    code = "prompt_timed_out"
    retryable = True
