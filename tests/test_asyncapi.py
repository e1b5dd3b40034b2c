"""The AsyncAPI document is what the catalogue says, is well formed, and every message fits it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import factories
from forge import topology
from forge.asyncapi import document
from forge.events.catalogue import all_events
from forge.events.envelope import headers
from schemas import Described, resolved

FILE = Path(__file__).parents[1] / "docs" / "asyncapi.json"
GOLDEN = sorted((Path(__file__).parent / "events" / "golden").glob("*.json"), key=lambda path: path.name)
GIVEN = headers(factories.ready(), factories.meta(), topology.subject(factories.ready()))


def refs(node: Any) -> Iterator[str]:
    match node:
        case dict():
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from refs(value)
        case list():
            for value in node:
                yield from refs(value)


def test_the_file_is_what_the_command_prints() -> None:
    told = subprocess.run([sys.executable, "-m", "forge", "asyncapi"], capture_output=True, check=True)
    assert told.stdout == FILE.read_bytes(), "make it again: ./forge asyncapi > docs/asyncapi.json"


def test_every_reference_leads_somewhere() -> None:
    known = document()
    assert all(resolved(known, ref) is not None for ref in refs(known))


def test_operations_send_what_their_channel_has() -> None:
    known = document()
    sent = set()
    for operation in known["operations"].values():
        channel = operation["channel"]["$ref"]
        names = {ref["$ref"] for ref in operation["messages"]}
        assert names == {f"{channel}/messages/{name}" for name in resolved(known, channel)["messages"]}
        sent |= {name.rpartition("/")[2] for name in names}
    assert sent == {cls.type_name() for cls in all_events().values()} == set(known["components"]["messages"])


def test_addresses_are_where_events_are() -> None:
    for channel in document()["channels"].values():
        parts = channel["address"].split(".")
        declared = {f"{{{name}}}" for name in channel.get("parameters", {})}
        assert declared == {part for part in parts if part.startswith("{")}
    public = document()["channels"]["assetsReady"]["address"]
    assert topology.matches(topology.public("ui_icon"), public.format(assetType="ui_icon", assetId="x"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_every_golden_message_fits(path: Path) -> None:
    given = GIVEN | {"ce-type": f"forge.{path.stem}"}
    assert (
        Described(document()).faults(f"forge.{path.stem}", given, msgspec.json.decode(path.read_bytes()))
        == []
    )


READY = msgspec.json.decode(
    (Path(__file__).parent / "events" / "golden" / "asset.ready.v1.json").read_bytes()
)


@pytest.mark.parametrize(
    ("given", "body", "said"),
    [
        ({}, {"width": "64"}, "width"),
        ({}, {"asset_id": "not a uuid"}, "asset_id"),
        ({}, {"mood": "calm"}, "mood"),
        ({}, {"url": None}, "url"),
        ({"ce-id": "7"}, {}, "ce-id"),
        ({"ce-type": "asset.ready"}, {}, "ce-type"),
        ({"ce-time": "yesterday"}, {}, "ce-time"),
        ({"ce-mood": "calm"}, {}, "ce-mood"),
    ],
)
def test_a_message_that_does_not_fit_is_found(given: dict[str, str], body: dict[str, Any], said: str) -> None:
    found = Described(document()).faults("forge.asset.ready.v1", GIVEN | given, READY | body)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize("missing", ["asset_id", "url", "job_id"])
def test_a_message_that_lacks_a_field_is_found(missing: str) -> None:
    body = {name: value for name, value in READY.items() if name != missing}
    [found] = Described(document()).faults("forge.asset.ready.v1", GIVEN, body)
    assert missing in found


def test_a_message_nobody_described_is_found() -> None:
    assert Described(document()).faults("forge.asset.dreamt.v1", GIVEN, {}) == [
        "forge.asset.dreamt.v1 is not in the document"
    ]
