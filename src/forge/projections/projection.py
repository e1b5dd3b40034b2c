"""What a projection is, and how its changes reach Postgres.

A handler looks at one event and says what changes: it reads nothing else, no clock, no disk, so replaying
the log gives the same tables. The changes of a batch are merged for each row and written in one statement a
table, in the transaction that also moves the checkpoint: one row at once when idle, thousands under load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import asyncpg
import msgspec

from forge.database import Connection
from forge.errors import Conflict, LogUnreadable
from forge.events.catalogue import Event
from forge.events.envelope import Recorded
from forge.topology import EVENTS

E = TypeVar("E", bound=Event)
Key = tuple[Any, ...]


class Table(msgspec.Struct, frozen=True, dict=True):
    """A table, the columns that name a row, and the one that says what the row is about, by default the first
    of them: changes about the same keep their order, whatever tables they are in; others need none."""

    name: str
    key: tuple[str, ...]
    about: str = ""

    @cached_property
    def subject(self) -> str:
        return self.about or self.key[0]

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """The columns that tell a row from others about the same."""
        return tuple(column for column in self.key if column != self.subject)


class _OfRow(msgspec.Struct, frozen=True):
    table: Table
    row: dict[str, Any]

    @property
    def about(self) -> Any:
        return self.row[self.table.subject]


class Create(_OfRow, frozen=True):
    """A row as it begins; where it is already there only the columns of ``latest`` grow."""

    latest: tuple[str, ...] = ()


class Put(_OfRow, frozen=True):
    """New values in some columns of a row; nothing happens where there is no such row."""


class Add(_OfRow, frozen=True):
    """Numbers to add to a row, which begins with them, and with its key, where it is missing."""

    amounts: dict[str, int]


class Run(msgspec.Struct, frozen=True):
    """A statement that must see the rows as they are: all changes before it about the same are written first.

    It is run once for many: each of its parameters is an array with a value of each.
    """

    sql: str
    about: Any
    args: tuple[Any, ...]


Change = Create | Put | Add | Run
Handler = Callable[[Any, Recorded], Iterable[Change]]


class Projection:
    """A name, a version, its tables, and one handler for each type of event it listens to."""

    def __init__(self, name: str, *, version: int, tables: Sequence[Table], stream: str = EVENTS) -> None:
        self.name, self.version, self.tables, self.stream = name, version, tuple(tables), stream
        self.handlers: dict[type[Event], Handler] = {}

    def on(
        self, type_: type[E]
    ) -> Callable[[Callable[[E, Recorded], Iterable[Change]]], Callable[[E, Recorded], Iterable[Change]]]:
        """Register the handler of one type of event."""

        def register(
            handler: Callable[[E, Recorded], Iterable[Change]],
        ) -> Callable[[E, Recorded], Iterable[Change]]:
            if type_ in self.handlers:
                raise TypeError(f"{self.name} already listens to {type_.type_name()}")
            self.handlers[type_] = handler
            return handler

        return register

    def changes(self, records: Sequence[Recorded]) -> list[Change]:
        """What these events change, in order."""
        found: list[Change] = []
        handlers = self.handlers
        for record in records:
            if (handler := handlers.get(type(record.event))) is not None:
                found += handler(record.event, record)
        return found

    async def position(self, connection: Connection) -> int:
        """The last sequence this projection has taken in, 0 before the first."""
        seq = await connection.fetchval(
            "select seq from projection_checkpoint where projection = $1 and version = $2",
            self.name,
            self.version,
        )
        return seq or 0


# ----------------------------------------------------------------- advancing

# A projection that was somewhere and has no row any more is not begun in the middle.
_ADVANCE = """
insert into projection_checkpoint as c (projection, version, seq, event_id)
select name, version, $4, $5
from unnest($1::text[], $2::integer[], $3::bigint[]) as given (name, version, before)
where before = 0 or exists (select from projection_checkpoint p where p.projection = name)
on conflict (projection) do update set seq = excluded.seq, event_id = excluded.event_id
where c.version = excluded.version and c.seq = ($3::bigint[])[array_position($1, c.projection)]
returning projection
"""


async def advance(
    connection: Connection,
    projections: Sequence[Projection],
    records: Sequence[Recorded],
    positions: Mapping[str, int],
) -> dict[str, int]:
    """Write what these events change and move the checkpoints, in one transaction; the new positions.

    Events at or before a projection's position are passed over.

    Raises:
        Conflict: another projector has moved a checkpoint since; nothing is written.
        LogUnreadable: an event holds what no table can; everything before it is written.
    """
    try:
        return await _advance(connection, projections, records, positions)
    except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as error:
        if len(records) == 1:
            where = f"message {records[0].seq} on {records[0].subject}"
            raise LogUnreadable(f"{where} does not fit the tables: {error}") from error
    for record in records:  # one by one, to find the one
        positions = await advance(connection, projections, [record], positions)
    return dict(positions)


async def _advance(
    connection: Connection,
    projections: Sequence[Projection],
    records: Sequence[Recorded],
    positions: Mapping[str, int],
) -> dict[str, int]:
    last = records[-1]
    head = last.seq
    behind = [p for p in projections if positions[p.name] < head]
    changes = [c for p in behind for c in p.changes([r for r in records if r.seq > positions[p.name]])]
    names = [p.name for p in behind]
    async with connection.transaction():
        versions, before = [p.version for p in behind], [positions[name] for name in names]
        # first of all: of two projectors one waits here, with no row locked that the other may want
        moved = await connection.fetch(_ADVANCE, names, versions, before, head, last.meta.id)
        if len(moved) < len(behind):
            raise Conflict(f"another projector moved {', '.join(names)} on")
        await _write(connection, changes)
    return {**positions, **dict.fromkeys(names, head)}


# -------------------------------------------------------------------- writing


class _Pending(msgspec.Struct):
    """One row's changes, merged."""

    table: Table
    created: dict[str, Any]
    latest: tuple[str, ...]
    put: dict[str, Any]
    added: dict[str, int]

    @property
    def shape(self) -> tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Rows of one shape are written by one statement."""
        return self.table.name, tuple(self.created), self.latest, tuple(self.put), tuple(self.added)

    @property
    def values(self) -> dict[str, Any]:
        return self.created | self.put | self.added if self.put or self.added else self.created


class _Layer:
    """Changes of which no two are about the same, unless they are merged, made by one statement, or rows that
    a statement then sees."""

    def __init__(self) -> None:
        self.rows: list[_Pending] = []
        self.runs: dict[str, list[tuple[Any, ...]]] = {}

    async def write(self, connection: Connection) -> None:
        shapes: dict[Any, list[_Pending]] = {}
        for row in self.rows:
            shapes.setdefault(row.shape, []).append(row)
        for rows in shapes.values():
            given = [row.values for row in rows]
            await connection.execute(_statement(rows[0]), given)
        for sql, args in self.runs.items():
            await connection.execute(sql, *map(list, zip(*args, strict=True)))


class _Subject:
    """The newest changes about one thing: their layer, its rows there, and the statement behind them."""

    __slots__ = ("nth", "rows", "sql")

    def __init__(self) -> None:
        self.nth, self.sql = 0, ""
        self.rows: dict[Key, _Pending] = {}

    def next(self) -> None:
        self.nth, self.sql, self.rows = self.nth + 1, "", {}


def _layers(changes: Sequence[Change]) -> list[_Layer]:
    """The changes in as few layers as keep the order of those about the same."""
    layers: list[_Layer] = []
    subjects: dict[Any, _Subject] = {}
    for change in changes:
        about = change.about
        subject = subjects.get(about)
        if subject is None:
            subject = subjects[about] = _Subject()
        if isinstance(change, Run):
            if subject.sql not in ("", change.sql):
                subject.next()
            subject.sql = change.sql
            _nth(layers, subject.nth).runs.setdefault(change.sql, []).append(change.args)
            continue
        table, given = change.table, change.row
        key = (table.name, *[given[column] for column in table.beside])
        row = subject.rows.get(key)
        if subject.sql or (row is not None and not _fits(row, change)):
            subject.next()
            row = None
        if row is None:
            row = subject.rows[key] = _Pending(table, {}, (), {}, {})
            _nth(layers, subject.nth).rows.append(row)
        _merge(row, change)
    return layers


def _nth(layers: list[_Layer], nth: int) -> _Layer:
    if nth == len(layers):
        layers.append(_Layer())
    return layers[nth]


async def _write(connection: Connection, changes: Sequence[Change]) -> None:
    for layer in _layers(changes):
        await layer.write(connection)


def _fits(row: _Pending, change: Create | Put | Add) -> bool:
    """Whether a change can join those before it, and one statement still does what they do one by one."""
    match change:
        case Create():  # whether a Put before it found a row, only the table knows
            return not row.put and not row.added and row.latest == change.latest
        case Put():
            return not row.added and not set(row.latest) & set(change.row)
        case Add():
            return bool(row.added)


def _merge(row: _Pending, change: Create | Put | Add) -> None:
    match change:
        case Create():
            row.latest = change.latest
            row.created = row.created or dict(change.row)
            for column in change.latest:
                row.created[column] = _greatest(row.created[column], change.row[column])
        case Put():
            row.put |= change.row
        case Add():
            row.created |= change.row
            for column, amount in change.amounts.items():
                row.added[column] = row.added.get(column, 0) + amount


def _greatest(one: Any, other: Any) -> Any:
    """As SQL has it: nothing counts less than anything."""
    return max((value for value in (one, other) if value is not None), default=None)


def _statement(row: _Pending) -> str:
    """One statement for many rows of one shape, given as a JSON array: the table itself gives the types."""
    table, key = row.table.name, row.table.key
    given = f"json_populate_recordset(null::{table}, $1::json) as g"
    put = [column for column in row.put if column not in key]
    if not row.created:
        changed = ", ".join(f'"{c}" = g."{c}"' for c in put)
        same = " and ".join(f't."{c}" = g."{c}"' for c in key)
        return f"update {table} t set {changed} from {given} where {same}"
    named = ", ".join(f'"{c}"' for c in row.created | row.put | row.added)
    updates = [f'"{c}" = excluded."{c}"' for c in put]
    updates += [f'"{c}" = t."{c}" + excluded."{c}"' for c in row.added]
    updates += [f'"{c}" = greatest(t."{c}", excluded."{c}")' for c in row.latest]
    conflict = f"do update set {', '.join(updates)}" if updates else "do nothing"
    columns = ", ".join(f'"{c}"' for c in key)
    return (
        f"insert into {table} as t ({named}) select {named} from {given} on conflict ({columns}) {conflict}"
    )
