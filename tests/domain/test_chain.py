"""The chain of hashes: what it covers, so that nothing in a copy can change unseen."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from factories import NOW
from forge.domain.chain import ARRIVED, GENESIS, Entry, Link, link, links, unlike, written

ONE = Entry(1, "forge.evt.admission.mei", {"ce-id": "a", "ce-type": "job.submitted"}, b'{"a": 1}', NOW)
TWO = Entry(2, "forge.evt.admission.lin", {"ce-id": "b"}, b"{}", NOW + timedelta(seconds=1))


def test_anybody_can_compute_it() -> None:
    said = [
        1,
        "forge.evt.admission.mei",
        [["ce-id", "a"], ["ce-type", "job.submitted"]],
        "2026-05-01T12:00:00Z",
        base64.b64encode(ONE.data).decode(),
    ]
    text = json.dumps(said, separators=(",", ":")).encode()
    assert link(Link(), ONE) == Link(1, hashlib.sha256(bytes(32) + text).digest())


def test_each_hash_covers_all_before_it() -> None:
    first, second = links(Link(), [ONE, TWO])
    assert second == link(first, TWO)
    assert second != link(Link(1, GENESIS), TWO)


@pytest.mark.parametrize(
    "change",
    [
        {"seq": 2},
        {"subject": "x"},
        {"headers": {"ce-id": "c"}},
        {"data": b""},
        {"arrived": NOW.replace(second=1)},
    ],
)
def test_every_part_of_an_entry_counts(change: dict[str, Any]) -> None:
    assert link(Link(), msgspec.structs.replace(ONE, **change)).hash != link(Link(), ONE).hash


def test_the_order_of_headers_does_not_count() -> None:
    turned = msgspec.structs.replace(ONE, headers=dict(reversed(ONE.headers.items())))
    assert link(Link(), turned) == link(Link(), ONE)


def test_what_the_server_is_told_is_no_part_of_an_event() -> None:
    given = {"ce-id": "a", "Nats-Msg-Id": "a", "Nats-Expected-Last-Sequence": "3", ARRIVED: "2026"}
    assert written(given) == {"ce-id": "a"}


def test_entries_are_alike_whenever_they_arrived() -> None:
    later = msgspec.structs.replace(ONE, arrived=NOW + timedelta(days=1))
    assert unlike(ONE, later) is None
    assert unlike(ONE, msgspec.structs.replace(later, data=b"")) == "data"
    assert unlike(ONE, msgspec.structs.replace(later, subject="x")) == "subject"
    assert unlike(ONE, msgspec.structs.replace(later, headers={})) == "headers"
