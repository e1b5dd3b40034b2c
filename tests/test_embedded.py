"""The embedded servers keep what they were told, whoever dies, and never run twice on one directory."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import httpx
import nats
import psutil
import pytest

from forge.embedded import EmbeddedNats, EmbeddedPostgres
from forge.embedded.postgres_files import account_for, run_as, socket_directory
from forge.embedded.process import Account
from forge.errors import ServerFailed
from processes import alive
from waiting import wait_until

Server = EmbeddedNats | EmbeddedPostgres
SERVERS = pytest.mark.parametrize("kind", [EmbeddedNats, EmbeddedPostgres], ids=["nats", "postgres"])

# Becomes the user it is given, starts both servers in a directory, says where they are, waits to be killed.
OWNER = """
import os, pathlib, signal, sys
from forge.embedded import EmbeddedNats, EmbeddedPostgres
place, user = pathlib.Path(sys.argv[1]), int(sys.argv[2])
if user != os.geteuid():
    os.setgroups([]), os.setgid(user), os.setuid(user)
nats, postgres = EmbeddedNats(place / "nats", anybody=True), EmbeddedPostgres(place / "postgres")
print(nats.start(), nats.process.pid, postgres.start(), postgres.process.pid, flush=True)
signal.pause()
"""


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="forge-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def started() -> Iterator[Callable[[Server], Server]]:
    """Starts servers that are stopped when the test ends."""
    running: list[Server] = []

    def start(server: Server) -> Server:
        running.append(server)
        server.start()
        return server

    yield start
    for server in running:
        server.stop()


async def write(dsn: str, value: int) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute("create table if not exists kept (value int)")
    await connection.execute("insert into kept values ($1)", value)
    await connection.close()


async def read(dsn: str) -> list[int]:
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch("select value from kept order by value")
    await connection.close()
    return [row["value"] for row in rows]


async def publish(url: str, body: bytes) -> int:
    client = await nats.connect(url)
    log = client.jetstream()
    await log.add_stream(name="KEPT", subjects=["kept"])
    ack = await log.publish("kept", body)
    await client.close()
    return ack.seq


async def test_postgres_keeps_rows_over_a_restart(place: Path, started: Callable[[Server], Server]) -> None:
    server = EmbeddedPostgres(place)
    await write(server.start(), 1)
    server.stop()
    again = EmbeddedPostgres(place)
    started(again)
    assert await read(again.dsn()) == [1]


async def test_nats_keeps_messages_and_its_ports_over_a_crash(
    place: Path, started: Callable[[Server], Server]
) -> None:
    server = EmbeddedNats(place, anybody=True)
    started(server)
    url, monitoring_url = server.url, server.monitoring_url
    assert await publish(url, b"first") == 1
    server.kill()
    assert (server.start(), server.monitoring_url) == (url, monitoring_url)
    assert await publish(url, b"second") == 2


def test_nats_runs_with_the_settings_that_forge_relies_on(
    place: Path, started: Callable[[Server], Server]
) -> None:
    server = EmbeddedNats(place)
    started(server)
    said = httpx.get(f"{server.monitoring_url}/varz").json()
    assert said["jetstream"]["config"]["sync_always"] is True
    assert said["feature_flags"]["js_ack_fc_v2"] is False
    assert (said["host"], said["max_payload"], said["max_connections"]) == ("127.0.0.1", 1 << 20, 200)


@SERVERS
def test_the_second_owner_of_a_directory_is_refused(
    kind: type[Server], place: Path, started: Callable[[Server], Server]
) -> None:
    started(kind(place))
    with pytest.raises(ServerFailed, match=f"in use by process {os.getpid()}"):
        kind(place).start()


async def test_two_of_each_run_side_by_side(place: Path, started: Callable[[Server], Server]) -> None:
    first, second = EmbeddedPostgres(place / "a" / "postgres"), EmbeddedPostgres(place / "b" / "postgres")
    one, other = (EmbeddedNats(place / name / "nats", anybody=True) for name in "ab")
    for server in (first, second, one, other):
        started(server)
    await write(first.dsn(), 1)
    await write(second.dsn(), 2)
    assert (await read(first.dsn()), await read(second.dsn())) == ([1], [2])
    assert one.url != other.url
    assert (await publish(one.url, b"x"), await publish(other.url, b"y")) == (1, 1)


@SERVERS
def test_stopping_ends_the_process_and_may_be_repeated(kind: type[Server], place: Path) -> None:
    server = kind(place)
    server.start()
    assert server.process is not None
    pid = server.process.pid
    server.stop()
    assert not psutil.pid_exists(pid)
    server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
async def test_servers_end_when_their_owner_is_killed(place: Path) -> None:
    owner, urls, pids = launch_owner(place)
    await write(urls[1], 7)
    owner.kill()
    owner.wait()
    await wait_until(lambda: not any(alive(pid) for pid in pids), what="both servers ended")


@pytest.mark.skipif(sys.platform != "linux", reason="stops processes by their kernel state")
async def test_a_start_clears_the_orphans_of_a_killed_owner(
    place: Path, started: Callable[[Server], Server]
) -> None:
    owner, urls, pids = launch_owner(place)
    await write(urls[1], 7)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that they outlive their owner, as an orphan would
    owner.kill()
    owner.wait()
    assert all(alive(pid) for pid in pids)
    log, postgres = EmbeddedNats(place / "nats", anybody=True), EmbeddedPostgres(place / "postgres")
    for server, orphan in ((log, pids[0]), (postgres, pids[1])):
        awakening = threading.Timer(
            0.5, os.kill, (orphan, signal.SIGCONT)
        )  # the start has to wait for its end
        awakening.start()
        started(server)
        assert not alive(orphan)
        awakening.join()
    assert await read(postgres.dsn()) == [7]
    assert await publish(log.url, b"on") == 1


async def test_postgres_starts_after_its_postmaster_was_killed(
    place: Path, started: Callable[[Server], Server]
) -> None:
    server = EmbeddedPostgres(place)
    await write(server.start(), 3)
    server.kill()
    started(server)
    assert await read(server.dsn()) == [3]


async def test_a_recycled_process_number_does_not_block_postgres(
    place: Path, started: Callable[[Server], Server]
) -> None:
    server = EmbeddedPostgres(place)
    await write(server.start(), 4)
    pid_file = server.data / "postmaster.pid"
    words = pid_file.read_text()
    server.kill()
    with bystander(server.data) as stranger:
        pid_file.write_text(words.replace(words.splitlines()[0], str(stranger.pid), 1))
        started(server)
        stranger.kill()
    assert await read(server.dsn()) == [4]


def test_half_a_database_is_made_anew(place: Path, started: Callable[[Server], Server]) -> None:
    (place / "data.half").mkdir()
    (place / "data.half" / "PG_VERSION").write_text("18\n")
    started(EmbeddedPostgres(place))
    assert not (place / "data.half").exists()


async def test_a_long_directory_name_still_has_a_socket(
    place: Path, started: Callable[[Server], Server]
) -> None:
    deep = place / ("long" * 20) / ("name" * 20)
    server = EmbeddedPostgres(deep)
    started(server)
    await write(server.dsn(), 1)
    assert await read(server.dsn()) == [1]
    sockets = socket_directory(server.home)
    assert sockets.exists()
    server.stop()
    assert not sockets.exists()


def test_a_bad_setting_fails_with_the_servers_own_words(place: Path) -> None:
    with pytest.raises(ServerFailed, match="shared_buffers"):
        EmbeddedPostgres(place / "p", settings={"shared_buffers": "much"}).start()
    config = place / "bad.conf"
    config.write_text("jetstream { sync_interval: perhaps }\n")
    with pytest.raises(ServerFailed, match="perhaps"):
        EmbeddedNats(place / "n", config=config).start()


def test_a_taken_port_fails_and_says_so(place: Path, started: Callable[[Server], Server]) -> None:
    first = EmbeddedNats(place / "a")
    started(first)
    with pytest.raises(ServerFailed, match="address already in use"):
        EmbeddedNats(place / "b", port=first.port).start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_servers_run_for_an_ordinary_user(place: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    if run_as(Account(nobody.pw_uid, nobody.pw_gid), ["test", "-x", sys.prefix]).returncode != 0:
        pytest.skip(f"an ordinary user cannot reach {sys.prefix}")
    os.chown(place, nobody.pw_uid, nobody.pw_gid)
    owner, urls, pids = launch_owner(place, user=nobody.pw_uid)
    try:
        await write(urls[1], 5)
        assert await read(urls[1]) == [5]
        assert await publish(urls[0], b"x") == 1
        assert {psutil.Process(pid).uids().real for pid in pids} == {nobody.pw_uid}
    finally:
        owner.kill()
        owner.wait()
    await wait_until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's Postgres runs as somebody else")
async def test_root_with_a_closed_directory_keeps_postgres_elsewhere(
    place: Path, started: Callable[[Server], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.embedded.postgres_files.REACHABLE_HOME", place / "open")
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    server = EmbeddedPostgres(closed / "postgres")
    await write(server.start(), 6)
    server.stop()
    assert server.home.parent == place / "open"
    assert (closed / "postgres" / "elsewhere").resolve() == server.home
    again = EmbeddedPostgres(closed / "postgres")
    started(again)
    assert await read(again.dsn()) == [6]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's Postgres runs as somebody else")
def test_a_database_that_was_closed_off_is_not_replaced_by_an_empty_one(place: Path) -> None:
    server = EmbeddedPostgres(place / "p" / "postgres")
    server.start()
    server.stop()
    (place / "p").chmod(0o700)
    with pytest.raises(ServerFailed, match="cannot reach it any more"):
        EmbeddedPostgres(place / "p" / "postgres").start()


def bystander(data: Path) -> subprocess.Popen[bytes]:
    """A process that Postgres minds in its pid file: of its own user, and not its parent."""
    account = account_for(data)
    return subprocess.Popen(["sleep", "600"], user=account.uid if account else None)


def launch_owner(
    place: Path, user: int = os.geteuid()
) -> tuple[subprocess.Popen[str], tuple[str, str], list[int]]:
    """A process that owns both servers; its URLs of NATS and Postgres, and their process numbers."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, place, str(user)], stdout=subprocess.PIPE, text=True, cwd="/"
    )
    with owner.stdout as answer:
        words = answer.readline().split()
    assert len(words) == 4, "the owner failed; its reason stands above"
    return owner, (words[0], words[2]), [int(words[1]), int(words[3])]
