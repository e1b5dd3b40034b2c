"""Whether somebody may be granted more jobs: places in the queue, generations an hour, room for pictures.

Folds of the log without I/O or clock: :class:`Grants` for the hour (L8), :class:`Balances` for what
sessions and characters hold (L3, L4), :class:`Sizes` for how large pictures of a type are. The demands raise
when what is asked for does not fit.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import islice
from uuid import UUID

import msgspec

from forge.domain.limits import MAX_CHARACTER_ASSETS, MAX_QUEUED_JOBS, MAX_SESSION_BYTES
from forge.errors import Limit, LimitReached, QueueFull
from forge.events.assets import AssetGivenUp, AssetReady, AssetStored, SessionReleased
from forge.events.envelope import Recorded
from forge.events.jobs import JobCompleted, JobRetried, JobSubmitted

HOUR = timedelta(hours=1)

FIRST_GUESS_BYTES = 1_500_000
"""How large a picture is taken to be before one of its type was stored."""

REMEMBERED = 100_000
"""Sessions, and characters, whose balance is kept in memory."""

_Grant = tuple[datetime, UUID]


class GrantsState(msgspec.Struct, frozen=True):
    """The grants of an hour: each user's, and all in the order in which they are forgotten."""

    of: dict[str, tuple[_Grant, ...]]
    oldest: tuple[tuple[datetime, str], ...]


class NewestState(msgspec.Struct, frozen=True):
    """Name → number, the longest ago first; ``complete`` while no name was forgotten."""

    held: dict[str, int]
    complete: bool


class BalancesState(msgspec.Struct, frozen=True):
    """Bytes of sessions and assets of characters."""

    sessions: NewestState
    characters: NewestState


class Grants:
    """The generations each user was granted in the last hour. A job that was answered without drawing gives
    its grant back."""

    def __init__(self) -> None:
        self._of: dict[str, deque[_Grant]] = {}
        self._oldest: deque[tuple[datetime, str]] = deque()

    def apply(self, record: Recorded) -> None:
        """Take in one event of the log; an admission only once."""
        event, at = record.event, record.meta.at
        if isinstance(event, JobSubmitted | JobRetried):
            self._of.setdefault(event.user_id, deque()).append((at, event.job_id))
            self._oldest.append((at, event.user_id))
            self._forget(at - HOUR)
        elif isinstance(event, JobCompleted) and event.cached:
            self._give_back(event.user_id, event.job_id)

    def state(self) -> GrantsState:
        """What was taken in so far, for a :class:`forge.snapshots.Snapshot`."""
        return GrantsState({user: tuple(mine) for user, mine in self._of.items()}, tuple(self._oldest))

    def restore(self, state: GrantsState) -> None:
        """Know what another one knew."""
        self._of = {user: deque(mine) for user, mine in state.of.items()}
        self._oldest = deque(state.oldest)

    def limit(self, user: str, allowed: int, now: datetime, wanted: int = 1) -> Limit:
        """What a user has of the hour, and when ``wanted`` more fit; no time if they do now or never will."""
        mine = self._of.get(user, deque())
        over = next((nth for nth, (at, _) in enumerate(mine) if at > now - HOUR), len(mine))
        used = len(mine) - over
        too_many = used + wanted - allowed
        waits = wanted <= allowed and too_many > 0
        frees = next(islice(mine, over + too_many - 1, None)) if waits else None
        return Limit("generations_per_hour", allowed, used, frees[0] + HOUR if frees else None)

    def _forget(self, before: datetime) -> None:
        while self._oldest and self._oldest[0][0] <= before:
            _, user = self._oldest.popleft()
            mine = self._of.get(user)
            if mine and mine[0][0] <= before:
                mine.popleft()
            if not mine:
                self._of.pop(user, None)

    def _give_back(self, user: str, job_id: UUID) -> None:
        mine = self._of.get(user, deque())
        found = next((grant for grant in reversed(mine) if grant[1] == job_id), None)
        if found is not None:
            mine.remove(found)


class Sizes:
    """How large pictures of each asset type were on average: what a waiting job will bring."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}

    def apply(self, record: Recorded) -> None:
        """Take in one event of the log."""
        if isinstance(record.event, AssetStored):
            count, total = self._seen.get(record.event.asset_type, (0, 0))
            self._seen[record.event.asset_type] = count + 1, total + record.event.file_size_bytes

    def state(self) -> dict[str, tuple[int, int]]:
        """Asset type → pictures and bytes that were taken in, for a :class:`forge.snapshots.Snapshot`."""
        return dict(self._seen)

    def restore(self, state: Mapping[str, tuple[int, int]]) -> None:
        """Know what another one knew."""
        self._seen = dict(state)

    def guess(self, pictures: Mapping[str, int]) -> int:
        """The bytes that so many pictures of each type will take."""
        return sum(count * self._mean(asset_type) for asset_type, count in pictures.items())

    def _mean(self, asset_type: str) -> int:
        count, total = self._seen.get(asset_type, (1, FIRST_GUESS_BYTES))
        return total // count


class Balances:
    """What sessions and characters held when their ledgers last moved, for as many as are remembered."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._sessions = _Newest(remembered)
        self._characters = _Newest(remembered)

    def apply(self, record: Recorded) -> None:
        """Take in one event of the log."""
        match record.event:
            case AssetStored(session_id=str(id_), session_bytes=int(held)):
                self._sessions.note(id_, held)
            case SessionReleased(session_id=id_, session_bytes=held):
                self._sessions.note(id_, held)
            case AssetReady(character_id=str(id_), character_assets=int(held)):
                self._characters.note(id_, held)
            case AssetGivenUp(character_id=str(id_), character_assets=int(held)):
                self._characters.note(id_, held)

    def state(self) -> BalancesState:
        """What was taken in so far, for a :class:`forge.snapshots.Snapshot`."""
        return BalancesState(self._sessions.state(), self._characters.state())

    def restore(self, state: BalancesState) -> None:
        """Know what another one knew."""
        self._sessions.restore(state.sessions)
        self._characters.restore(state.characters)

    def session(self, id_: str) -> int | None:
        """Bytes; None when only the log knows."""
        return self._sessions.get(id_)

    def character(self, id_: str) -> int | None:
        """Assets; None when only the log knows."""
        return self._characters.get(id_)


class _Newest:
    """The newest number under each name; of a name that was never heard of it is 0."""

    def __init__(self, remembered: int) -> None:
        self._remembered, self._complete = remembered, True
        self._held: OrderedDict[str, int] = OrderedDict()

    def note(self, name: str, held: int) -> None:
        self._held[name] = held
        self._held.move_to_end(name)
        if len(self._held) > self._remembered:
            self._held.popitem(last=False)
            self._complete = False

    def state(self) -> NewestState:
        return NewestState(dict(self._held), self._complete)

    def restore(self, state: NewestState) -> None:
        self._held, self._complete = OrderedDict(state.held), state.complete

    def get(self, name: str) -> int | None:
        return self._held.get(name, 0 if self._complete else None)


def demand_places(queued: int, wanted: int, allowed: int = MAX_QUEUED_JOBS) -> None:
    """L2: jobs of one user that are accepted and not over; only a simulation allows another number.

    Raises:
        LimitReached: the user would have more than ten.
    """
    if queued + wanted > allowed:
        raise LimitReached(
            Limit("queued_jobs", allowed, queued),
            f"{queued} of your jobs are waiting or running, and {allowed} may{_never(wanted, allowed)}",
            never=wanted > allowed,
        )


def demand_hour(grants: Grants, user: str, wanted: int, allowed: int, now: datetime) -> None:
    """L8: generations a user may ask for in an hour; 0 allows any number.

    Raises:
        LimitReached: says when as many as are wanted will fit.
    """
    limit = grants.limit(user, allowed, now, wanted)
    if allowed and limit.used + wanted > allowed:
        raise LimitReached(
            limit,
            f"{limit.used} generations of yours were granted within an hour, and {allowed} may be"
            f"{_never(wanted, allowed)}",
            never=wanted > allowed,
        )


def _never(wanted: int, allowed: int) -> str:
    return f"; {wanted} at once never fit" if wanted > allowed else ""


def demand_queue(pending: int, wanted: int, allowed: int) -> None:
    """M1: jobs that wait in all.

    Raises:
        QueueFull: more would wait than may.
    """
    if pending + wanted > allowed:
        raise QueueFull(f"{pending} jobs wait already, and {allowed} may")


def demand_session(held: int, owed: int, wanted: int) -> None:
    """L3: bytes a session holds, is owed by waiting jobs, and would get.

    Raises:
        LimitReached: it would get more than it may hold.
    """
    _demand_room(Limit("session_bytes", MAX_SESSION_BYTES, held), owed, wanted)


def demand_character(held: int, owed: int, wanted: int) -> None:
    """L4: assets a character has, is owed by waiting jobs, and would get.

    Raises:
        LimitReached: it would get more than it may have.
    """
    _demand_room(Limit("character_assets", MAX_CHARACTER_ASSETS, held), owed, wanted)


def _demand_room(limit: Limit, owed: int, wanted: int) -> None:
    if limit.used + owed + wanted > limit.allowed:
        coming = f", {owed} are coming" if owed else ""
        raise LimitReached(
            limit,
            f"{limit.name}: {limit.used} are there{coming}, {wanted} more are over {limit.allowed}",
            never=wanted > limit.allowed,
        )
