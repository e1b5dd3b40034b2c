"""What the doctor makes of facts that are dear to prepare."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forge.comfyui.protocol import Health
from forge.comfyui.workflows import load as load_workflows
from forge.database import migrations
from forge.doctor import Finding, Level, examine
from forge.doctor.checks import judge
from forge.doctor.facts import (
    Answer,
    Applied,
    AssetVolume,
    Away,
    Ends,
    Facts,
    Line,
    Position,
    Samples,
    Server,
)
from forge.doctor.gathering import strange
from forge.domain.disk import Disk
from forge.domain.keys import Key
from forge.domain.memory import Bound
from forge.eventstore import EventStore
from forge.settings import ApiKey, Settings
from forge.topology import EVENTS, Standing
from keeping import house

ROOT = Path(__file__).parents[1]
STATE = {"first_seq": 1, "last_seq": 40, "num_deleted": 0, "messages": 0}
NOW = datetime(2026, 5, 1, tzinfo=UTC)
GB = 10**9


def key(role: str = "operator") -> Key:
    return Key("0" * 16, role, "mei", None, b"", NOW, "cli", 1)


def facts(**changed: Any) -> Facts:
    """Those of an installation that is well, but for what a test says."""
    healthy = Facts(
        settings=Settings(),
        invalid=(),
        strange={},
        dev_url=None,
        tested_nats=(2, 15, 1),
        job_types=load_workflows(),
        nats=Server("nats://nats", (2, 15, 1)),
        standings=(
            Standing(EVENTS, (), {"state": STATE}),
            Standing("FORGE_DISPATCH", (), {"state": STATE, "config": {"max_msgs": 3}}),
            Standing("FORGE_DISPATCH.generation", (), {"num_waiting": 3, "num_ack_pending": 0}),
            Standing("FORGE_EVENTS.cleanup", (), {"num_waiting": 1, "num_ack_pending": 0}),
        ),
        damage="",
        ends=Ends(()),
        keys=(key(),),
        samples=Samples(1.0, 0),
        begun=True,
        nats_clock=timedelta(0),
        postgres=Server("Postgres", (18, 0)),
        applied=Applied(tuple(migrations()), {m.number: m.checksum for m in migrations()}, True),
        positions={"queue": Position(EVENTS, 40, 40, 40)},
        line=Line(0, 0.0),
        postgres_clock=timedelta(0),
        volume=AssetVolume(Path("/assets"), True, True, Disk(GB, 10 * GB, 9 * GB), 0),
        comfyui_dirs={},
        comfyui={"http://comfyui": Health(True, "0.27.0", 0)},
        nodes={},
        api=Answer("http://api", True, {}),
        memory=(Bound("machine", 1, 4 * GB),),
    )
    return msgspec.structs.replace(healthy, **changed)


def wrong(findings: list[Finding]) -> dict[str, str]:
    """Check → what it says and advises, of what is not as it should be."""
    bad = (Level.WARNING, Level.FAILURE)
    return {f.check: f"{f.found} → {f.remedy}" for f in findings if f.level in bad}


def standing_of(path: str, **info: Any) -> tuple[Standing, ...]:
    standings = facts().standings
    assert not isinstance(standings, Away)
    return tuple(Standing(path, (), {**(s.info or {}), **info}) if s.path == path else s for s in standings)


def test_of_what_is_well_nothing_is_wrong() -> None:
    findings = judge(facts())
    assert wrong(findings) == {}
    assert {f.level for f in findings} == {Level.OK}


@pytest.mark.parametrize(
    ("changed", "check", "said"),
    [
        ({"nats": Server("n", (2, 11, 9))}, "nats", "no atomic batches → run nats-server 2.15.1"),
        ({"nats": Server("n", (2, 14, 0))}, "nats", "older than what forge is tested with"),
        ({"job_types": Away("swatch.toml:1: no")}, "job_types", "swatch.toml:1: no"),
        ({"ends": Ends(("message 40 is no event",))}, "log", "message 40 is no event: nothing behind"),
        ({"damage": "the log is not whole: 2 are gone"}, "log", "2 are gone → stop forge"),
        ({"applied": Applied((), {}, False)}, "tables", "create extension pg_trgm"),
        ({"volume": AssetVolume(Path("/a"), True, False, None, 0)}, "volume", "may not write"),
        ({"samples": Samples(1.0, 7)}, "leftovers", "7 folders at ComfyUI"),
        ({"samples": Samples(None, 0)}, "workers", "forge worker --roles scheduler"),
        ({"samples": Samples(600.0, 0)}, "workers", "forge worker --roles scheduler"),
        ({"line": Line(4, 60.0)}, "workers", "forge worker --roles dispatcher"),
        ({"postgres_clock": timedelta(minutes=6)}, "clocks", "set the clock of one of them"),
        ({"api": Answer("http://api", True, {"log": "not connected"})}, "api", "log: not connected"),
        ({"memory": (Bound("container", 95, 100),)}, "memory", "the container uses"),
        (
            {"settings": Settings(api_keys=(ApiKey("operator", "ops", "x" * 30),))},
            "keys",
            "unset FORGE_API_KEYS",
        ),
        ({"keys": ()}, "keys", "forge keys create"),
        ({"comfyui_dirs": {"http://comfyui": (Path("/c"), "no output")}}, "comfyui", "/c: no output"),
        (
            {"keys": Away("keys: no answer within 4 s")},
            "keys",
            "no answer within 4 s → run `forge doctor` again",
        ),
    ],
)
def test_each_fault_is_named_alone(changed: dict[str, Any], check: str, said: str) -> None:
    found = wrong(judge(facts(**changed)))
    assert found.keys() == {check}
    assert said in found[check]


def test_a_fallback_that_draws_is_a_warning_and_none_is_a_failure() -> None:
    away, there = Health(False, detail="refused"), Health(True, "0.27.0", 0)
    levels = {
        f.level
        for f in judge(facts(comfyui={"http://a": away, "http://b": there}))
        if f.check == "comfyui" and f.remedy
    }
    assert levels == {Level.WARNING}
    nothing_yet = {"http://a": (Path("/shared"), "it has neither output nor input")}
    both = facts(comfyui={"http://a": away, "http://b": there}, comfyui_dirs=nothing_yet)
    assert "/shared" not in wrong(judge(both))["comfyui"]
    assert "no ComfyUI can be used" in wrong(judge(facts(comfyui={"http://a": away})))["comfyui"]


def test_a_projector_that_catches_up_is_well() -> None:
    moving = {"queue": Position(EVENTS, 10, 40, 30)}
    assert wrong(judge(facts(positions=moving))) == {}
    stuck = {"queue": Position(EVENTS, 10, 40, 10)}
    # tables of the past do not tell that nobody dispatches
    assert wrong(judge(facts(positions=stuck, line=Line(4, 60.0)))).keys() == {"projections"}


def test_a_full_disk_is_why_nobody_asks_for_orders_and_the_api_is_not_ready() -> None:
    full = AssetVolume(Path("/assets"), True, True, Disk(GB, GB, 0), 0)
    idle = standing_of("FORGE_DISPATCH.generation", num_waiting=0)
    answer = Answer("http://api", True, {"disk": "full"})
    assert wrong(judge(facts(volume=full, standings=idle, api=answer))).keys() == {"disk"}
    assert wrong(judge(facts(standings=idle))).keys() == {"workers"}


def test_a_fresh_installation_has_no_marker_yet() -> None:
    bare = AssetVolume(Path("/assets"), False, False, None, 0)
    assert wrong(judge(facts(volume=bare, begun=False))) == {}


def test_a_dev_needs_no_key() -> None:
    assert wrong(judge(facts(keys=(), dev_url="http://dev"))) == {}


def test_what_compose_and_its_helpers_are_told_is_nothing_strange() -> None:
    texts = [(ROOT / "compose.yml").read_text(), (ROOT / "forge").read_text()]
    texts += [path.read_text() for path in (ROOT / "deploy").iterdir() if path.is_file()]
    names = {name for text in texts for name in re.findall(r"FORGE_[A-Z_]*[A-Z]", text)}
    assert {"FORGE_VERSION", "FORGE_NATS_URL"} <= names
    assert strange(dict.fromkeys(names, "x")) == {}
    assert strange({"FORGE_PROT": "1", "FORGE_NOTHING_LIKE_IT": "1"}) == {
        "FORGE_NOTHING_LIKE_IT": "",
        "FORGE_PROT": "FORGE_PORT",
    }


async def test_a_log_that_was_deleted_is_not_made_again_by_setup(
    nats_client: Any, settings: Settings
) -> None:
    async with house(nats_client, settings) as home:
        await home.asset(b"picture")
    await nats_client.jsm().delete_stream(EVENTS)
    environ = {
        "FORGE_NATS_URL": settings.nats_url,
        "FORGE_POSTGRES_DSN": settings.postgres_dsn,
        "FORGE_DATA_DIR": str(settings.data_dir),
    }
    found = {f.check: f for f in await examine(environ)}
    assert "the log is not whole" in found["log"].found
    assert "RUNBOOK" in found["log"].remedy
    assert not any("FORGE_EVENTS is missing" in f.found for f in found.values())
    assert await EventStore(nats_client, "FORGE_METRICS").head() == 0
