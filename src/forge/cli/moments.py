"""Moments as people say them: RFC 3339, `2h ago`, `yesterday 18:00`, `18:00`, `seq:12345`."""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta
from typing import Any

import click

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)[a-z]*\s+ago")
_CLOCK = re.compile(r"(?:(today|yesterday)\s*)?(?:(\d{1,2}):(\d{2})(?::(\d{2}))?)?")


def moment(text: str, now: datetime) -> datetime | int:
    """A moment, or the sequence of an event. What is said without an offset is meant where ``now`` is; if
    that has none either, it has none.

    Raises:
        ValueError: it is none of the forms.
    """
    text = " ".join(text.strip().lower().split())
    if text == "now":
        return now
    if text.startswith("seq:") and text[4:].isdecimal():
        return int(text[4:])
    if ago := _AGO.fullmatch(text):
        return now.astimezone() - timedelta(**{_UNITS[ago[2]]: float(ago[1])})
    if text and (clock := _CLOCK.fullmatch(text)):
        day = now.date() - timedelta(days=clock[1] == "yesterday")
        hour, minute, second = (int(part or 0) for part in clock.group(2, 3, 4))
        return datetime.combine(day, time(hour, minute, second), now.tzinfo)
    said = datetime.fromisoformat(text.upper())
    return said if said.tzinfo is not None else said.replace(tzinfo=now.tzinfo)


class Moment(click.ParamType[Any]):
    """A parameter that is a moment; one that says ``seq`` may be an event instead."""

    name = "time"

    def __init__(self, *, seq: bool = False) -> None:
        self.seq = seq

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime | int:
        try:
            found = moment(value, datetime.now())
            if isinstance(found, datetime):
                found = found.astimezone()  # by the offset of that day, not of today
        except (ValueError, OverflowError):
            found = -1
        if isinstance(found, int) and (not self.seq or found < 0):
            event = ", `seq:12345`" if self.seq else ""
            self.fail(
                f"{value!r} is no time: say `2026-05-01T18:00:00Z`, `2h ago`, `yesterday 18:00`{event}",
                param,
                ctx,
            )
        return found
