"""Subjects tell ids apart; streams and consumers become what the files say, or say why not."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

import factories
from factories import JOB
from forge import topology
from forge.broker import connect, request
from forge.domain.ids import upload_id
from forge.embedded import EmbeddedNats
from forge.errors import TopologyDiffers
from forge.topology import matches, subject, token

ids = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(".*> -=_\t\0é雪")))


# ----------------------------------------------------------------- subjects


@given(st.one_of(st.none(), ids), st.one_of(st.none(), ids))
def test_two_ids_never_share_a_token(one: str | None, other: str | None) -> None:
    assert (token(one) == token(other)) == (one == other)


@given(ids)
def test_a_token_is_safe_in_a_subject(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", token(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "-"),
        ("", "="),
        ("-", "=2D"),
        ("mei", "mei"),
        ("a.b", "a=2Eb"),
        ("*", "=2A"),
        ("=", "=3D"),
        ("雪", "=E9=9B=AA"),
    ],
)
def test_tokens_never_change(text: str | None, expected: str) -> None:
    # boundaries in the log are found by them
    assert token(text) == expected


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (factories.submitted(user="m.ei"), "forge.evt.admission.m=2Eei"),
        (factories.retried(), "forge.evt.admission.mei"),
        (factories.started(attempt=2), f"forge.evt.job.mei.{JOB}.2.started"),
        (factories.attempt_failed(), f"forge.evt.job.mei.{JOB}.1.attempt_failed"),
        (factories.stored(session_id="s"), "forge.evt.session.s"),
        (factories.stored(), "forge.evt.session.-"),
        (
            factories.ready(character_id="a b"),
            f"forge.evt.asset.a=20b.npc_bust.{factories.ready().asset_id}.{JOB}.ready",
        ),
        (
            factories.upload_expired(user="m.ei"),
            f"forge.evt.upload.m=2Eei.{upload_id('m.ei', factories.HASH)}.{factories.HASH}.expired",
        ),
        (factories.released(session_id="s"), "forge.evt.session.s"),
        (factories.pinned(), f"forge.evt.pin.-.npc_bust.{factories.ready().asset_id}.{JOB}.pinned"),
        (factories.lost(), f"forge.evt.store.{factories.ready().asset_id}.lost"),
        (factories.cleanup_requested(), "forge.evt.cleanup.requested"),
        (factories.cleanup_held(), "forge.evt.cleanup.held.expired-lost"),
        (factories.cleanup_finished(), "forge.evt.cleanup.finished"),
        (factories.crossed(), "forge.evt.disk.crossed"),
        (factories.key_created(), f"forge.evt.key.{factories.KEY}.created"),
        (factories.key_revoked(), f"forge.evt.key.{factories.KEY}.revoked"),
        (factories.accessed(source="api.1-8600"), "forge.evt.access.api=2E1-8600"),
        (factories.sampled(), "forge.metric.disk_usage"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_event_has_its_place(event: Any, expected: str) -> None:
    assert subject(event) == expected


def test_every_event_is_covered_by_its_boundary() -> None:
    asset_id = factories.ready().asset_id
    covered = {
        topology.admissions("mei"): factories.submitted(),
        topology.job("mei", JOB): factories.completed(),
        topology.job_of_anybody(JOB): factories.redirected(),
        topology.session(None): factories.stored(),
        topology.asset(None, "npc_bust", asset_id): factories.deleted(),
        topology.reference(None, "npc_bust", asset_id, JOB): factories.expired(),
        topology.character("c-1"): factories.ready(character_id="c-1"),
        topology.character_or_pins("c-1"): factories.pinned(character_id="c-1"),
        topology.reference_or_pins(None, "npc_bust", asset_id, JOB): factories.unpinned(),
        topology.pins(None, "npc_bust", asset_id): factories.pinned(),
        topology.references(asset_id): factories.deleted(),
        topology.ALL_FAULTS: factories.lost(),
        topology.ALL_DELETED: factories.deleted(),
        topology.ALL_ADMISSIONS: factories.retried(),
        topology.ALL_JOB_FACTS: factories.adopted(),
        topology.ALL_CANCELLATIONS: factories.cancelled(),
        topology.upload("mei", upload_id("mei", factories.HASH)): factories.upload_stored(),
        topology.uploads_of(factories.HASH): factories.upload_renewed(user="lan"),
        topology.ALL_UPLOADS: factories.upload_expired(),
        topology.key(factories.KEY): factories.key_created(),
        topology.ALL_KEYS: factories.key_revoked(),
        topology.access("api-8600"): factories.accessed(),
        topology.ALL_METRICS: factories.sampled(),
        topology.ALL_EVENTS: factories.ready(),
    }
    assert all(matches(filter_, subject(event)) for filter_, event in covered.items())


@pytest.mark.parametrize(
    ("filter_", "given_subject", "expected"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.b", "a", False),
        ("a", "a.b", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("*.b", "a.b", True),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
        ("a.b*", "a.bc", False),
        ("", "a", False),
    ],
)
def test_a_filter_covers_what_the_server_says(filter_: str, given_subject: str, expected: bool) -> None:
    assert matches(filter_, given_subject) is expected


tokens = st.sampled_from(["a", "b", "*"])


@given(st.lists(tokens, min_size=1, max_size=4), st.booleans(), st.lists(tokens, min_size=1, max_size=4))
def test_covering_is_what_a_pattern_says(wanted: list[str], rest: bool, told: list[str]) -> None:
    told = [part.replace("*", "c") for part in told]
    filter_ = ".".join([*wanted, ">"] if rest else wanted)
    pattern = r"\.".join("[^.]+" if part == "*" else part for part in wanted) + (r"\..+" if rest else "")
    assert matches(filter_, ".".join(told)) is bool(re.fullmatch(pattern, ".".join(told)))


# ----------------------------------------------------------------- applying

EVERYTHING = [
    "FORGE_EVENTS",
    "FORGE_DISPATCH",
    "FORGE_METRICS",
    "FORGE_ASSETS_READY",
    "FORGE_DISPATCH.generation",
    "FORGE_EVENTS.cleanup",
]


@pytest.fixture
async def nc(nats_server: EmbeddedNats) -> Any:
    """A connection to a server where nothing is set up."""
    nc = await connect(nats_server.url, "test")
    yield nc
    await nc.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the files, to be changed."""
    copy = tmp_path / "nats"
    shutil.copytree(topology.files() / "nats", copy)
    return copy


def change(folder: Path, name: str, **fields: Any) -> None:
    """Change some fields of a stream or of a consumer."""
    for file in (folder / "streams.json", folder / "consumers.json"):
        entries = msgspec.json.decode(file.read_bytes())
        for entry in entries:
            config = entry.get("config", entry)
            if name in (config.get("name"), config.get("durable_name")):
                config.update(fields)
        file.write_bytes(msgspec.json.encode(entries))


async def test_an_empty_server_gets_everything(nc: Client) -> None:
    made = await topology.apply(nc)
    assert [(change.name, change.outcome) for change in made] == [(name, "created") for name in EVERYTHING]
    assert await topology.places(nc) == 3


async def test_applying_again_changes_nothing(nc: Client, nats_server: EmbeddedNats) -> None:
    await topology.apply(nc)
    assert {change.outcome for change in await topology.apply(nc)} == {"unchanged"}
    nats_server.stop()
    nats_server.start()
    again = await connect(nats_server.url, "again")
    assert {change.outcome for change in await topology.apply(again)} == {"unchanged"}
    await again.close()


async def test_two_at_once_both_succeed(nc: Client, nats_server: EmbeddedNats) -> None:
    other = await connect(nats_server.url, "other")
    await asyncio.gather(topology.apply(nc), topology.apply(other))
    assert {change.outcome for change in await topology.apply(nc)} == {"unchanged"}
    await other.close()


@pytest.mark.parametrize(
    ("name", "path", "fields"),
    [
        ("FORGE_DISPATCH", "FORGE_DISPATCH", {"max_msgs": 2}),
        (
            "FORGE_METRICS",
            "FORGE_METRICS",
            {"max_age": 3600 * 10**9, "duplicate_window": 60 * 10**9},
        ),
        ("generation", "FORGE_DISPATCH.generation", {"ack_wait": 20_000_000_000, "max_ack_pending": 2}),
        ("cleanup", "FORGE_EVENTS.cleanup", {"description": "says something else"}),
    ],
)
async def test_a_changed_file_changes_the_server(
    nc: Client, folder: Path, name: str, path: str, fields: dict[str, Any]
) -> None:
    await topology.apply(nc)
    change(folder, name, **fields)
    outcomes = {made.name: made.outcome for made in await topology.apply(nc, folder)}
    assert outcomes == dict.fromkeys(EVERYTHING, "unchanged") | {path: "updated"}
    kind = "CONSUMER" if "." in path else "STREAM"
    config = msgspec.json.decode(await request(nc, f"{kind}.INFO.{path}"))["config"]
    assert {key: config[key] for key in fields} == fields
    assert {made.outcome for made in await topology.apply(nc, folder)} == {"unchanged"}


async def test_what_lies_in_a_stream_outlives_a_change_of_it(nc: Client, folder: Path) -> None:
    await topology.apply(nc)
    await nc.request("forge.evt.admission.mei", b"{}", 30)
    change(folder, "FORGE_EVENTS", description="another word for it")
    await topology.apply(nc, folder)
    info = msgspec.json.decode(await request(nc, "STREAM.INFO.FORGE_EVENTS"))
    assert (info["state"]["messages"], info["config"]["deny_delete"]) == (1, True)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("FORGE_EVENTS", {"storage": "memory"}, r"stream FORGE_EVENTS \(differs in storage\): .*storage"),
        ("FORGE_EVENTS", {"deny_delete": False}, r"stream FORGE_EVENTS \(differs in deny_delete\): .*deny"),
        (
            "FORGE_DISPATCH",
            {"retention": "interest"},
            r"stream FORGE_DISPATCH \(differs in retention\): .*retention",
        ),
        (
            "generation",
            {"deliver_policy": "new", "max_ack_pending": 2},
            r"consumer FORGE_DISPATCH.generation \(differs in deliver_policy, max_ack_pending\): .*policy",
        ),
    ],
)
async def test_an_impossible_change_says_what_and_why(
    nc: Client, folder: Path, name: str, fields: dict[str, Any], said: str
) -> None:
    await topology.apply(nc)
    change(folder, name, **fields)
    with pytest.raises(TopologyDiffers, match=said):
        await topology.apply(nc, folder)
    assert {made.outcome for made in await topology.apply(nc)} == {"unchanged"}


async def test_a_misspelt_setting_is_refused_by_its_name(nc: Client, folder: Path) -> None:
    change(folder, "FORGE_EVENTS", max_mesages=5)
    with pytest.raises(TopologyDiffers, match=r"stream FORGE_EVENTS: .*max_mesages"):
        await topology.apply(nc, folder)


def test_ids_of_another_kind_are_the_same_token() -> None:
    assert token(UUID(int=7)) == token(str(UUID(int=7)))
