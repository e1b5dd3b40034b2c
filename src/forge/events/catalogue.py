"""The catalogue: explicit type names with versions ↔ structs, strictly.

A new optional field with a default needs no new version, though an older forge refuses an event that has it.
Anything else raises the version and adds one function to :mod:`forge.events.upcasters`; code knows only the
newest shape.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec

from forge.errors import LogUnreadable
from forge.events.upcasters import UPCASTERS

Moment = Annotated[datetime, msgspec.Meta(tz=True)]
"""A time with its offset: one without could not be compared with any other."""


class Event(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A fact, in the past tense. Subclasses are registered with :func:`event`."""

    type: ClassVar[str]
    version: ClassVar[int]

    @classmethod
    def type_name(cls) -> str:
        """The name on the wire, for example ``forge.job.submitted.v1``."""
        return f"forge.{cls.type}.v{cls.version}"


E = TypeVar("E", bound=type[Event])

_by_type: dict[str, type[Event]] = {}
_decoders: dict[str, msgspec.json.Decoder[Any]] = {}
"""Decoders of the newest versions, by their name on the wire."""
_encoder = msgspec.json.Encoder(uuid_format="canonical")


def event(type_: str, version: int = 1) -> Callable[[E], E]:
    """Register an event struct under a permanent name; refuses a name taken twice."""

    def register(cls: E) -> E:
        if type_ in _by_type:
            raise TypeError(f"event type {type_!r} is already {_by_type[type_].__name__}")
        cls.type, cls.version = type_, version
        _by_type[type_] = cls
        _decoders[cls.type_name()] = msgspec.json.Decoder(cls)
        return cls

    return register


def all_events() -> dict[str, type[Event]]:
    """Type name without version → struct, of everything registered so far."""
    return dict(_by_type)


def encode(fact: Event) -> bytes:
    """The event's body as JSON."""
    return _encoder.encode(fact)


def decode(type_name: str, body: bytes) -> Event:
    """The event behind a wire name and body, lifted to its newest version.

    Raises:
        LogUnreadable: unknown type, a version newer than this code, or a body that does not fit.
    """
    decoder = _decoders.get(type_name)
    if decoder is not None:
        try:
            return decoder.decode(body)  # type: ignore[no-any-return]  # the decoder was made for this class
        except msgspec.MsgspecError as error:
            raise LogUnreadable(f"{type_name}: {_said(error)}") from error
    type_, version = split(type_name)
    cls = _by_type.get(type_)
    if cls is None:
        raise LogUnreadable(
            f"unknown event type {type_name!r}: it was written by a newer forge, or by someone else"
        )
    if version > cls.version:
        raise LogUnreadable(
            f"{type_name!r} is newer than this forge, which knows version {cls.version}: upgrade it"
        )
    try:
        return msgspec.convert(_lift(type_, version, cls.version, msgspec.json.decode(body)), cls)
    except msgspec.MsgspecError as error:
        raise LogUnreadable(f"{type_name}: {_said(error)}") from error


def _said(error: msgspec.MsgspecError) -> str:
    newer = " that a newer forge has written: upgrade it" if "unknown field" in str(error) else ""
    return f"{error}{newer}"


def split(type_name: str) -> tuple[str, int]:
    """``forge.job.submitted.v1`` → ``("job.submitted", 1)``."""
    prefix, _, rest = type_name.partition(".")
    type_, _, version = rest.rpartition(".v")
    if prefix != "forge" or not type_ or not version.isdecimal():
        raise LogUnreadable(f"{type_name!r} is not the name of a forge event")
    return type_, int(version)


def _lift(type_: str, version: int, newest: int, data: dict[str, Any]) -> dict[str, Any]:
    for step in range(version, newest):
        upcaster = UPCASTERS.get((type_, step))
        if upcaster is None:
            raise LogUnreadable(f"no upcaster lifts {type_} from version {step} to {step + 1}")
        try:
            data = upcaster(data)
        except Exception as error:
            raise LogUnreadable(
                f"forge.{type_}.v{version}: {error!r} while lifting it from version {step} to {step + 1}"
            ) from error
    return data
