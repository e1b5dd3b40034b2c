"""The envelope: CloudEvents 1.0 in headers, unchanged by a trip through the log, refused by its sequence."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factories import JOB, NOW, meta, submitted
from forge.errors import LogUnreadable
from forge.events.catalogue import encode
from forge.events.envelope import Meta, event_id, headers, open_envelope

SUBJECT = "forge.evt.admission.mei"
WHOLE = Meta(
    id=event_id("a command", 0),
    at=NOW,
    actor="player:mei",
    correlation=str(JOB),
    causation="a command",
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
)


def test_an_envelope_is_a_cloud_event_in_binary_mode() -> None:
    assert headers(submitted(), WHOLE, SUBJECT) == {
        "ce-specversion": "1.0",
        "ce-id": str(WHOLE.id),
        "ce-type": "forge.job.submitted.v1",
        "ce-source": "/forge",
        "ce-subject": SUBJECT,
        "ce-time": "2026-05-01T12:00:00.000000Z",
        "ce-actor": "player:mei",
        "ce-correlationid": str(JOB),
        "ce-causationid": "a command",
        "content-type": "application/json",
        "Nats-Msg-Id": str(WHOLE.id),
        "traceparent": WHOLE.traceparent,
    }


def test_what_is_not_known_is_left_out() -> None:
    made = headers(submitted(), msgspec.structs.replace(WHOLE, causation="", traceparent=""), SUBJECT)
    assert not {"ce-causationid", "traceparent"} & set(made)
    assert all(made.values())


@given(st.datetimes(timezones=st.just(UTC)), st.text(st.characters(codec="ascii", categories=["L", "N"])))
def test_opening_gives_back_what_was_closed(at: datetime, actor: str) -> None:
    whole = msgspec.structs.replace(WHOLE, at=at, actor=actor)
    record = open_envelope(7, SUBJECT, headers(submitted(), whole, SUBJECT), encode(submitted()))
    assert (record.seq, record.subject, record.meta, record.event) == (7, SUBJECT, whole, submitted())


def test_a_time_elsewhere_is_the_same_moment() -> None:
    there = msgspec.structs.replace(WHOLE, at=NOW.astimezone(timezone(timedelta(hours=8))))
    record = open_envelope(7, SUBJECT, headers(submitted(), there, SUBJECT), encode(submitted()))
    assert record.meta.at == NOW


@pytest.mark.parametrize("missing", ["ce-id", "ce-time", "ce-type"])
def test_a_missing_header_is_refused_by_sequence_and_name(missing: str) -> None:
    given_headers = headers(submitted(), WHOLE, SUBJECT)
    del given_headers[missing]
    with pytest.raises(LogUnreadable, match=f"message 7 on {SUBJECT} has no header '{missing}'"):
        open_envelope(7, SUBJECT, given_headers, encode(submitted()))


def test_a_message_without_headers_is_refused() -> None:
    with pytest.raises(LogUnreadable, match=r"message 7"):
        open_envelope(7, SUBJECT, None, b"hello")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("ce-id", "7"),
        ("ce-time", "yesterday"),
        ("ce-time", "2026-05-01T12:00:00"),  # when is that, without an offset?
        ("ce-type", "somebody.elses.v1"),
        ("ce-type", "forge.job.submitted.v2"),
    ],
)
def test_a_bad_header_is_refused_by_sequence(header: str, value: str) -> None:
    given_headers = headers(submitted(), WHOLE, SUBJECT) | {header: value}
    with pytest.raises(LogUnreadable, match=f"message 7 on {SUBJECT}: "):
        open_envelope(7, SUBJECT, given_headers, encode(submitted()))


@given(st.text(), st.integers(0, 999), st.text(), st.integers(0, 999))
def test_an_event_id_names_the_command_and_the_position(
    one: str, first: int, other: str, second: int
) -> None:
    if f"{one}/{first}" != f"{other}/{second}":
        assert event_id(one, first) != event_id(other, second)
    assert event_id(one, first) == event_id(one, first)


def test_event_ids_never_change() -> None:
    assert meta("a command").id == event_id("a command", 0) == UUID("cb206314-95ee-5427-8594-345f8a32c4a1")
