"""What the doctor makes of facts that are dear to prepare."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
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
    Follower,
    Greeting,
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


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, too, it hears everybody out; who is away is refused at once."""
    monkeypatch.setattr("forge.doctor.gathering.SECONDS", 60.0)
    monkeypatch.setattr("forge.doctor.gathering._STANDING_SECONDS", 60.0)


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
        nats_servers={"nats://nats": Greeting("n1", (2, 15, 1), "")},
        nats=Server("nats://nats", (2, 15, 1)),
        standings=(
            Standing(EVENTS, (), {"state": STATE}),
            Standing("FORGE_DISPATCH", (), {"state": STATE, "config": {"max_msgs": 3}}),
            Standing("FORGE_DISPATCH.generation", (), {"num_waiting": 3, "num_ack_pending": 0}),
            Standing("FORGE_EVENTS.cleanup", (), {"num_waiting": 1, "num_ack_pending": 0}),
        ),
        followers=(),
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


def at_version(*version: int) -> dict[str, Any]:
    return {"nats_servers": {"nats://nats": Greeting("n1", version, "")}}


def test_of_what_is_well_nothing_is_wrong() -> None:
    findings = judge(facts())
    assert wrong(findings) == {}
    assert {f.level for f in findings} == {Level.OK}


@pytest.mark.parametrize(
    ("changed", "check", "said"),
    [
        (
            {"nats_servers": {"n": Greeting("n", (2, 11, 9), "")}},
            "nats",
            "no atomic batches → run nats-server 2.15.1",
        ),
        (
            {"nats_servers": {"n": Greeting("n", (2, 14, 0), "")}},
            "nats",
            "older than what forge is tested with",
        ),
        ({"job_types": Away("swatch.toml:1: no")}, "job_types", "swatch.toml:1: no"),
        ({"ends": Ends(("message 40 is no event",))}, "log", "message 40 is no event: nothing behind"),
        ({"damage": "the log is not whole: 2 are gone"}, "log", "2 are gone → stop forge"),
        ({"applied": Applied((), {}, False)}, "tables", "create extension pg_trgm"),
        ({"volume": AssetVolume(Path("/a"), True, False, None, 0)}, "volume", "may not write"),
        ({"volume": Away("the asset volume: Permission denied")}, "volume", "denied → mount .forge/assets"),
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


THREE = {f"nats://n{nth}": Greeting(f"n{nth}", (2, 15, 1), "forge") for nth in (1, 2, 3)}


def clustered(**changed: Any) -> dict[str, Any]:
    """Facts of three servers that hold the log together."""
    away = {url: Away(f"{url}: refused") for url in changed.pop("away", ())}
    told = {"config": {"num_replicas": 3}, "state": STATE, "cluster": {"leader": "n2"}}
    return {"nats_servers": THREE | away, "standings": (Standing(EVENTS, (), told),), **changed}


def follower(lag: int, later: int, *, moving: bool = False, away: bool = False) -> tuple[Follower, ...]:
    return (Follower(EVENTS, "n3", lag, later, moving=moving, away=away),)


@pytest.mark.parametrize(
    ("changed", "check", "said"),
    [
        (
            {"away": ["nats://n3"]},
            "nats",
            "nats://n3: refused; the others hold the log meanwhile → start nats",
        ),
        ({"away": ["nats://n3"], "followers": follower(2, 2)}, "nats", "nats://n3: refused"),
        (
            {"away": ["nats://n1", "nats://n3"]},
            "nats",
            "1 of 3 servers answer, too few to agree, so nothing is accepted: nats://n1: refused; nats://n3: "
            "refused → start nats-server there with nats/cluster.conf",
        ),
        ({"standings": Away("10008", behind="nats")}, "nats", "none leads, so nothing is accepted: 10008"),
        (
            {"nats_servers": {url: Greeting("n", (2, 15, 1), "") for url in THREE}},
            "nats",
            "not one cluster, each with a log of its own (nats://n1: none, ",
        ),
        (
            {"nats_servers": THREE | {"nats://n3": Greeting("n3", (2, 14, 0), "forge")}},
            "nats",
            "nats-server 2.14.0",
        ),
        ({"standings": (Standing(EVENTS, (), None, "10008"),)}, "streams", "FORGE_EVENTS: no server leads"),
        (
            {"standings": (Standing(EVENTS, (), {"config": {"num_replicas": 1}, "state": STATE}),)},
            "streams",
            "FORGE_EVENTS: one copy, which is lost with its server → `FORGE_NATS_REPLICAS=3 forge setup`",
        ),
        ({"followers": follower(7, 7)}, "streams", "n3 lags and does not catch up: FORGE_EVENTS by 7 →"),
        ({"followers": follower(200, 300, moving=True)}, "streams", "FORGE_EVENTS by 300"),
        (
            {"followers": follower(0, 0, away=True)},
            "streams",
            "n3 answers, but not the leader of FORGE_",
        ),
        (
            {"followers": (Follower(EVENTS, "n4", 0, 0, moving=False, away=True),)},
            "streams",
            "n4, which has a copy of FORGE_EVENTS, is away",
        ),
    ],
)
def test_of_several_servers_the_cause_is_named_alone(changed: dict[str, Any], check: str, said: str) -> None:
    found = wrong(judge(facts(**clustered(**changed))))
    assert found.keys() == {check}
    assert said in found[check]


@pytest.mark.parametrize(
    "of", [follower(0, 0), follower(300, 200), follower(1, 2, moving=True), follower(5, 0)]
)
def test_a_follower_that_comes_on_is_well(of: tuple[Follower, ...]) -> None:
    assert wrong(judge(facts(**clustered(followers=of)))) == {}


def test_who_leads_the_log_is_told() -> None:
    (said,) = [f.found for f in judge(facts(**clustered())) if f.check == "nats"]
    assert said.endswith("n2 leads the log")
    alone = standing_of(EVENTS, cluster={"leader": "NBOSR2VKMSAZ"})
    assert "leads" not in next(f.found for f in judge(facts(standings=alone)) if f.check == "nats")


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


def test_what_compose_the_examples_and_nats_server_are_told_is_nothing_strange() -> None:
    texts = [(ROOT / "compose.yml").read_text(), (ROOT / "forge").read_text()]
    for files in ("deploy/*", "examples/*", "nats/*.conf"):
        texts += [path.read_text() for path in ROOT.glob(files) if path.is_file()]
    names = {name for text in texts for name in re.findall(r"(?<![.\w])FORGE_[A-Z_]*[A-Z]", text)}
    names -= {"FORGE_ASSETS_READY", "FORGE_NATS"}  # a stream; what a name is made of
    assert {"FORGE_VERSION", "FORGE_NATS_URL"} <= names
    assert strange(dict.fromkeys(names, "x")) == {}
    assert strange({"FORGE_PROT": "1", "FORGE_NOTHING_LIKE_IT": "1"}) == {
        "FORGE_NOTHING_LIKE_IT": "",
        "FORGE_PROT": "FORGE_PORT",
    }


async def test_an_address_that_no_trace_gets_to_is_named() -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318", "FORGE_NATS_URL": "nats://127.0.0.1:9"}
    found = {
        f.check: f for f in await examine(environ | {"FORGE_POSTGRES_DSN": "postgresql://127.0.0.1:9/x"})
    }
    assert "give OTEL_EXPORTER_OTLP_ENDPOINT another value" in found["settings"].remedy


async def test_the_version_of_postgres_is_what_it_says(settings: Settings) -> None:
    connection = await asyncpg.connect(settings.postgres_dsn)
    postgres = await connection.fetchval("show server_version")
    await connection.close()
    environ = {"FORGE_NATS_URL": settings.nats_url, "FORGE_POSTGRES_DSN": settings.postgres_dsn}
    found = {f.check: f.found for f in await examine(environ)}
    assert found["postgres"] == f"Postgres {postgres}"


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
