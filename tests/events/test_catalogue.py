"""What was written once is readable for ever; what is unknown is refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

import forge.events.assets
import forge.events.cleanup
import forge.events.jobs
import forge.events.keys
import forge.events.system
import forge.events.uploads
import forge.topology
from factories import JOB, NOW, attempt_failed, submitted
from forge.errors import LogUnreadable
from forge.events import catalogue
from forge.events.catalogue import Event, all_events, decode, encode, event, split
from forge.events.upcasters import UPCASTERS

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"), key=lambda path: path.name)


def test_every_version_of_every_event_has_a_golden_file() -> None:
    expected = {
        f"{type_}.v{version}" for type_, cls in all_events().items() for version in range(1, cls.version + 1)
    }
    assert {path.stem for path in GOLDEN} == expected


def test_every_context_is_in_the_catalogue() -> None:
    contexts = {type_.partition(".")[0] for type_ in all_events()}
    assert contexts == {"job", "asset", "session", "cleanup", "disk", "key", "upload", "metric"}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_file_decodes_for_ever(path: Path) -> None:
    fact = decode(f"forge.{path.stem}", path.read_bytes())
    assert fact.type_name().startswith(f"forge.{path.stem.rpartition('.v')[0]}.v")
    if path.stem.endswith(f".v{fact.version}"):
        assert msgspec.json.decode(encode(fact)) == msgspec.json.decode(path.read_bytes())
        assert set(msgspec.json.decode(path.read_bytes())) == set(fact.__struct_fields__), "name every field"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_an_unknown_field_is_refused_by_its_name(path: Path) -> None:
    body = msgspec.json.decode(path.read_bytes()) | {"mood": "calm"}
    with pytest.raises(LogUnreadable, match=r"mood"):
        decode(f"forge.{path.stem}", msgspec.json.encode(body))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_newer_version_is_refused_by_its_name(path: Path) -> None:
    type_, _ = split(f"forge.{path.stem}")
    newer = f"forge.{type_}.v{all_events()[type_].version + 1}"
    with pytest.raises(LogUnreadable, match=f"{newer}.*newer than this forge"):
        decode(newer, path.read_bytes())


def test_an_unknown_type_is_refused_by_its_name() -> None:
    with pytest.raises(LogUnreadable, match=r"unknown event type 'forge.job.dreamt.v1'"):
        decode("forge.job.dreamt.v1", b"{}")


@pytest.mark.parametrize(
    "name",
    ["", "job.submitted.v1", "forge.job.submitted", "forge.v1", "forge.job.submitted.vx", "FORGE.a.v1"],
)
def test_what_is_no_event_name_is_refused(name: str) -> None:
    with pytest.raises(LogUnreadable, match=r"is not the name of a forge event"):
        decode(name, b"{}")


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b"null", b"{", b'{"job_id": "x"}', b"{}"])
def test_a_body_that_does_not_fit_is_refused_by_its_type(body: bytes) -> None:
    with pytest.raises(LogUnreadable, match=r"forge.job.submitted.v1"):
        decode("forge.job.submitted.v1", body)


def test_a_time_without_its_offset_is_refused() -> None:
    body = msgspec.json.encode(attempt_failed()).replace(b"Z", b"")
    with pytest.raises(LogUnreadable, match=r"timezone.*retry_at"):
        decode("forge.job.attempt_failed.v1", body)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(TypeError, match=r"'job.submitted' is already JobSubmitted"):

        @event("job.submitted")
        class Again(Event, frozen=True, kw_only=True):
            pass

    assert all_events()["job.submitted"] is type(submitted())


def test_what_is_not_said_is_not_written() -> None:
    assert b"session_id" not in encode(submitted())
    assert decode("forge.job.submitted.v1", encode(submitted())) == submitted()


def test_an_event_without_a_place_is_refused_by_its_name(moved: type[Event]) -> None:
    with pytest.raises(TypeError, match=r"forge.test.moved.v3 has no subject"):
        forge.topology.subject(moved(place="north", by=JOB, at=NOW))


# --------------------------------------------------------------- upcasters


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> type[Event]:
    """An event in its third version; its upcasters say what became of the first two."""
    monkeypatch.setattr(catalogue, "_by_type", dict(catalogue._by_type))
    monkeypatch.setattr(catalogue, "_decoders", dict(catalogue._decoders))

    @event("test.moved", version=3)
    class Moved(Event, frozen=True, kw_only=True):
        place: str
        by: UUID
        at: Any = None

    def named_places(old: dict[str, Any]) -> dict[str, Any]:
        return {"place": ["north", "south"][old["direction"]], "who": old["who"]}

    def who_became_by(old: dict[str, Any]) -> dict[str, Any]:
        return {"place": old["place"], "by": old["who"]}

    monkeypatch.setitem(UPCASTERS, ("test.moved", 1), named_places)
    monkeypatch.setitem(UPCASTERS, ("test.moved", 2), who_became_by)
    return Moved


@pytest.mark.parametrize(
    ("version", "body"),
    [
        (1, {"direction": 0, "who": str(JOB)}),
        (2, {"place": "north", "who": str(JOB)}),
        (3, {"place": "north", "by": str(JOB)}),
    ],
)
def test_code_sees_the_newest_shape_only(moved: type[Event], version: int, body: dict[str, Any]) -> None:
    assert decode(f"forge.test.moved.v{version}", msgspec.json.encode(body)) == moved(place="north", by=JOB)


def test_a_lifted_body_is_read_as_strictly(moved: type[Event]) -> None:
    body = msgspec.json.encode({"place": 7, "who": str(JOB)})
    with pytest.raises(LogUnreadable, match=r"forge.test.moved.v2.*place"):
        decode("forge.test.moved.v2", body)


@pytest.mark.parametrize("body", [b"{}", b'{"direction": 9, "who": ""}', b"[]", b"null"])
def test_a_body_that_an_upcaster_cannot_lift_is_refused_by_its_type(moved: type[Event], body: bytes) -> None:
    with pytest.raises(LogUnreadable, match=r"forge.test.moved.v1: .*from version 1 to 2"):
        decode("forge.test.moved.v1", body)


def test_a_step_without_upcaster_is_refused_by_its_number(
    moved: type[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(UPCASTERS, ("test.moved", 2))
    with pytest.raises(LogUnreadable, match=r"no upcaster lifts test.moved from version 2 to 3"):
        decode("forge.test.moved.v1", b'{"direction": 1, "who": ""}')
