"""The command line: what it says, what it refuses, and that `--data-dir` finds a running `forge dev`."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import click
import pytest
from nats.aio.client import Client
from rich.console import Console

from forge.cli import cli
from forge.cli.lists import columns, printed
from forge.domain.keys import has_form
from forge.domain.retention import BRAKE_FREE
from forge.embedded import DirectoryLock, EmbeddedNats
from forge.embedded.record import DevRecord, run_directory, running, write
from forge.events.cleanup import CleanupFinished, CleanupRequested
from forge.eventstore import EventStore
from forge.keys import Keys
from forge.settings import Settings, describe
from keeping import House, ago, house

past = importlib.import_module("forge.cli.at")  # in the package its command has the name

RECORD = DevRecord(
    pid=1,
    url="http://127.0.0.1:9",
    nats_url="nats://127.0.0.1:1111",
    postgres_dsn="postgresql://postgres@/postgres?host=/nowhere",
    comfyui_urls=("http://127.0.0.1:2222",),
)


def forge(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FORGE_")}
    return subprocess.run(
        [sys.executable, "-m", "forge", *words],
        env=environ | variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture
def dev_directory(tmp_path: Path) -> Iterator[Path]:
    """A data directory that looks as if a `forge dev` ran on it: its record, and its lock held."""
    run = run_directory(tmp_path)
    run.mkdir()
    lock = DirectoryLock(run)
    lock.acquire()
    write(tmp_path, RECORD)
    yield tmp_path
    lock.release()


def test_every_command_explains_itself_and_its_options() -> None:
    for name, command in cli.commands.items():
        assert command.help, name
        for option in command.params:
            if isinstance(option, click.Argument):
                assert option.metavar is None or option.metavar in command.help, f"{name} {option.name}"
                continue
            assert isinstance(option, click.Option)
            assert option.help or option.hidden or option.name == "comfyui_version", f"{name} {option.name}"


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    words = (
        "import sys, forge.cli; print(*sorted(set(sys.modules) & {'litestar', 'nats', 'asyncpg', 'aiohttp'}))"
    )
    told = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert told.stdout.split() == []


def test_settings_lists_every_variable_with_meaning_and_value(tmp_path: Path) -> None:
    told = forge("settings", "--data-dir", str(tmp_path), FORGE_PORT="1234").stdout
    for about in describe().values():
        assert about.variable in told
        assert about.meaning in told
    assert "FORGE_PORT=1234\n" in told
    assert f"FORGE_DATA_DIR={tmp_path}\n" in told
    assert "FORGE_SCAN_SECONDS=60.0 s  (default)" in told


def test_settings_hides_secrets(tmp_path: Path) -> None:
    told = forge(
        "settings",
        "--data-dir",
        str(tmp_path),
        FORGE_API_KEYS="operator:me:hunter2",
        FORGE_POSTGRES_DSN="postgresql://u:hunter3@h/d",
    )
    assert told.returncode == 0
    assert "hunter" not in told.stdout + told.stderr
    assert "FORGE_API_KEYS=(hidden)" in told.stdout


def test_settings_are_told_to_machines_too(tmp_path: Path) -> None:
    told = forge("settings", "--json", "--data-dir", str(tmp_path), FORGE_API_KEYS="operator:me:hunter2")
    rows = {row["variable"]: row for row in map(json.loads, told.stdout.splitlines())}
    assert rows.keys() == {about.variable for about in describe().values()}
    assert rows["FORGE_API_KEYS"]["value"] == "(hidden)"
    assert rows["FORGE_SCAN_SECONDS"] == {
        "variable": "FORGE_SCAN_SECONDS",
        "value": "60.0",
        "unit": "s",
        "default": True,
        "meaning": "how often the scheduler samples and scans",
    }


@pytest.mark.parametrize(("name", "value"), [("FORGE_PORT", "nowhere"), ("FORGE_LOG_LEVEL", "chatty")])
def test_a_bad_setting_is_one_line_and_status_2(name: str, value: str) -> None:
    told = forge("api", **{name: value})
    assert told.returncode == 2
    assert told.stdout == ""
    assert told.stderr.count("\n") == 1
    assert told.stderr.startswith(f"forge: {name}={value!r}")


def test_no_room_for_what_is_printed_is_one_line_and_status_2() -> None:
    with Path("/dev/full").open("w") as full:
        told = subprocess.run(
            [sys.executable, "-m", "forge", "completion", "bash"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
            check=False,
        )
    assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
    assert "No space left" in told.stderr


def test_a_list_that_nobody_reads_on_lets_go_what_it_reads_from(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = False

    async def rows() -> AsyncGenerator[str]:
        nonlocal ended
        try:
            yield "one"
        finally:
            await asyncio.sleep(0)  # as a connection that is given back
            ended = True

    def gone(_: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(click, "echo", gone)

    async def run() -> None:
        with pytest.raises(BrokenPipeError):
            await printed(rows(), str)
        assert ended

    asyncio.run(run())


def test_an_unknown_role_is_refused_with_the_known_ones() -> None:
    told = forge("worker", "--roles", "generation,painter")
    assert told.returncode == 2
    assert "generation, dispatcher, projector, cleanup, scheduler" in told.stderr


def test_a_command_with_the_data_dir_of_a_running_dev_talks_to_its_servers(dev_directory: Path) -> None:
    told = forge("settings", "--data-dir", str(dev_directory), FORGE_NATS_URL="nats://elsewhere:4222").stdout
    assert f"FORGE_NATS_URL={RECORD.nats_url}\n" in told
    assert f"FORGE_COMFYUI_URLS={RECORD.comfyui_urls[0]}\n" in told


def test_a_data_dir_from_the_environment_fills_only_what_is_not_set(dev_directory: Path) -> None:
    told = forge("settings", FORGE_DATA_DIR=str(dev_directory), FORGE_NATS_URL="nats://elsewhere:4222").stdout
    assert "FORGE_NATS_URL=nats://elsewhere:4222\n" in told
    assert f"FORGE_COMFYUI_URLS={RECORD.comfyui_urls[0]}\n" in told


@pytest.mark.parametrize(
    "words",
    [
        ["replay", "all", "--replace"],
        ["at", "2026-01-01T00:00:00Z", "queue"],
        ["whatif", "--rate-per-hour", "40"],
        ["jobs"],
        ["assets"],
        ["keys", "list"],
        ["cleanup"],
        ["subscribers", "list"],
        ["top"],
    ],
    ids=" ".join,
)
def test_a_data_dir_where_nothing_runs_does_not_mean_other_servers(tmp_path: Path, words: list[str]) -> None:
    told = forge(*words, "--data-dir", str(tmp_path))
    assert (told.returncode, told.stdout) == (2, "")
    assert f"no `forge dev` runs on {tmp_path}. Start it, or say with FORGE_NATS_URL" in " ".join(
        told.stderr.split()
    )


def test_the_record_of_a_dev_that_was_killed_does_not_count(tmp_path: Path) -> None:
    run_directory(tmp_path).mkdir()
    (run_directory(tmp_path) / "lock").touch()
    write(tmp_path, RECORD)
    assert running(tmp_path) is None
    assert "nats://127.0.0.1:1111" not in forge("settings", "--data-dir", str(tmp_path)).stdout


def test_the_record_is_for_its_owner_alone(dev_directory: Path) -> None:
    assert (dev_directory / "dev.json").stat().st_mode & 0o077 == 0
    assert running(dev_directory) == RECORD


def test_the_simulator_says_where_it_is_and_stops_when_told(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "forge", "sim", "--port", "0", "--output-dir", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ComfyUI simulator ready at http://127.0.0.1:")
        process.terminate()
        assert process.wait(100) == 0


def test_a_simulator_whose_port_is_taken_says_so_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        told = forge("sim", "--port", str(squatter.getsockname()[1]))
    assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
    assert "already in use" in told.stderr


def test_tables_of_the_past_keep_ids_whole_and_cut_nothing_that_is_read_by_a_program(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job, user = uuid4(), "somebody-with-a-long-name@game.example"
    columns = ("place", "id", "status", "user", "type", "priority", "attempts", "since")
    row = (1, job, "pending", user, "character_portrait", 5, 0, datetime(2026, 5, 1, tzinfo=UTC))
    table = past._table("1 pending", columns, [row])
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(table)
    assert str(job) in narrow.file.getvalue()  # type: ignore[attr-defined] - it is the one above
    past._printed(table)
    assert {str(job), user, "character_portrait"} <= set(capsys.readouterr().out.split())


def test_a_real_bash_completes_commands_options_and_choices() -> None:
    script = """
        eval "$(python -m forge completion bash)"
        complete_() {
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
            _forge_completion forge
            echo "${COMPREPLY[@]}"
        }
        complete_ forge doc
        complete_ forge jobs --stat
        complete_ forge jobs --status f
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    told = subprocess.run(
        ["bash", "--norc", "-c", script],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert told.stdout.splitlines() == ["doctor", "--status", "failed"], told.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_to_ask_forge(shell: str) -> None:
    assert f"_FORGE_COMPLETE={shell}_complete" in forge("completion", shell).stdout


def test_no_sign_of_a_list_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    line = columns({"who": 6, "what": 0}, lambda one: one)
    assert line(("a\x1b[2J", "b\nc\u009bd")) == "a�[2J   b�c�d"
    assert capsys.readouterr().out == "WHO     WHAT\n"


@pytest.mark.parametrize("times", ["fast", "5-1", "-3"])
def test_render_times_that_make_no_sense_are_refused(times: str) -> None:
    assert forge("sim", "--render-ms", times).returncode == 2


# -------------------------------------------------------------------- keys


@pytest.fixture
def with_keys(nats_client: Client, nats_server: EmbeddedNats) -> Callable[..., Any]:
    """Run `forge keys …` on a log of the test's own; nothing but NATS is there."""

    async def run(*words: str) -> subprocess.CompletedProcess[str]:
        return await asyncio.to_thread(forge, "keys", *words, FORGE_NATS_URL=nats_server.url)

    return run


async def test_a_key_is_created_listed_and_revoked(with_keys: Any, nats_client: Client) -> None:
    made = await with_keys("create", "--role", "service", "--user", "shop", "--label", "the shop")
    assert made.returncode == 0, made.stderr
    [key] = made.stdout.split()
    key_id, secret = key.split("_")[1:]
    assert has_form(key)
    assert key_id in made.stderr
    assert secret not in made.stderr

    listed = json.loads((await with_keys("list", "--json")).stdout)
    assert (listed["id"], listed["role"], listed["user_id"], listed["label"]) == (
        key_id,
        "service",
        "shop",
        "the shop",
    )
    assert listed["created_by"].startswith("cli:")
    assert listed["revoked_at"] is None
    assert key_id in (await with_keys("list")).stdout
    assert "digest" not in listed

    for _ in range(2):
        assert (await with_keys("revoke", key_id)).returncode == 0
    again = await with_keys("list", "--json")
    assert json.loads(again.stdout)["revoked_by"].startswith("cli:")
    assert secret not in again.stdout + (await with_keys("list")).stdout
    assert [key.id for key in await Keys(EventStore(nats_client)).all()] == [key_id]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("revoke", "0" * 16), "there is no key"),
        (("revoke", "forge_" + "0" * 16 + "_secret"), "there is no key"),
        (("create", "--role", "player", "--user", " "), "user: must have 1 to 128"),
        (("create", "--role", "king", "--user", "mei"), "king"),
        (("create", "--role", "player"), "--user"),
    ],
)
async def test_what_cannot_be_done_with_keys_is_said_and_status_2(
    with_keys: Any, words: tuple[str, ...], said: str
) -> None:
    told = await with_keys(*words)
    assert (told.returncode, told.stdout) == (2, "")
    assert said in told.stderr
    assert "Traceback" not in told.stderr


async def test_without_keys_the_list_is_empty(with_keys: Any) -> None:
    assert (await with_keys("list", "--json")).stdout == ""


# ------------------------------------------------------------------------- cleanup


@pytest.fixture
async def home(nats_client: Client, settings: Settings) -> AsyncIterator[House]:
    async with house(nats_client, settings) as home:
        yield home


async def cleanup(home: House, *words: str) -> subprocess.CompletedProcess[str]:
    settings = home.settings
    return await asyncio.to_thread(
        forge,
        "cleanup",
        *words,
        FORGE_NATS_URL=settings.nats_url,
        FORGE_POSTGRES_DSN=settings.postgres_dsn,
        FORGE_DATA_DIR=str(settings.data_dir),
    )


async def test_cleanup_shows_what_would_go_then_lets_it_go(home: House) -> None:
    kept = await home.asset(b"kept")
    await home.asset(b"due", expires=ago(1))
    await home.file(b"orphan")
    shown = await cleanup(home, "--dry-run")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "past their time" in shown.stdout
    assert "A dry run: nothing went." in shown.stdout
    assert len(home.files()) == 3
    done = await cleanup(home, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["went"] == {"expired": {"assets": 1, "bytes": 3}, "orphaned": {"assets": 1, "bytes": 6}}
    assert await home.rows() == {kept.content_hash}
    [asked], [over] = await home.facts(CleanupRequested), await home.facts(CleanupFinished)
    assert asked.executor == "command"
    assert over.request_id == asked.request_id
    again = await cleanup(home)
    assert "Nothing to clean up among 1 assets." in again.stdout


async def test_cleanup_waits_for_yes_when_it_is_much(home: House) -> None:
    for number in range(BRAKE_FREE + 1):
        await home.asset(b"due %d" % number, expires=ago(1))
    held = await cleanup(home)
    assert held.returncode == 1
    assert "nothing goes without --yes" in held.stdout
    assert len(await home.rows()) == BRAKE_FREE + 1
    done = await cleanup(home, "--yes", "--reason", "expired")
    assert done.returncode == 0
    assert f"Went: {BRAKE_FREE + 1} expired." in done.stdout
    assert await home.rows() == set()


async def test_cleanup_by_age_and_type(home: House) -> None:
    old = await home.asset(b"old", created_at=ago(5), asset_type="ui_icon")
    await home.asset(b"young", created_at=ago(1), asset_type="ui_icon")
    assert "--older-than" in (await cleanup(home, "--reason", "old")).stderr
    words = ("--reason", "old", "--older-than", "7200", "--asset-type", "ui_icon", "--json")
    assert json.loads((await cleanup(home, *words)).stdout)["by_type"] == {
        "ui_icon": {"assets": 1, "bytes": 3}
    }
    assert old.content_hash not in await home.rows()


async def test_cleanup_on_a_lost_volume_deletes_nothing(home: House) -> None:
    await home.asset(b"due", expires=ago(1))
    shutil.rmtree(home.store.root)
    refused = await cleanup(home, "--yes")
    assert refused.returncode == 2
    assert "is the volume mounted?" in refused.stderr
    assert len(await home.rows()) == 1
