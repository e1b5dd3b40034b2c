"""A whole forge out of real processes, one for each role, each of which may be killed and started again.

What ends on its own is started again, as a supervisor would, and noted in `deaths`. What a test killed stays
down until the test starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx

from acceptance.failpoints import ARMED, PLANTED
from acceptance.links import Address, Link
from forge import bootstrap
from forge.embedded import EmbeddedNats, EmbeddedPostgres, OwnedProcess
from forge.settings import load
from ports import free_port
from processes import freeze, thaw
from waiting import wait_until

API = "/api/v1/comfyui"
SCAN_SECONDS = "1"
SNAPSHOT_EVENTS = "25"
"""So few that what is started again begins with one."""

PATIENCE = 30.0
"""After so long an answer does not come any more, however busy the machine is."""


class Command:
    """A command of forge as a process with a log of its own."""

    def __init__(self, words: list[str], log: Path, environ: Mapping[str, str]) -> None:
        self.words, self.log, self.environ = words, log, environ
        self.process: OwnedProcess | None = None

    def launch(self) -> OwnedProcess:
        self.process = OwnedProcess(
            [sys.executable, "-P", *self._program(), *self.words],
            log=self.log,
            cwd=self.log.parent,
            env=self.environ,
        )
        return self.process

    def _program(self) -> list[str]:
        """forge as it is, or as a test has prepared it."""
        prepared = self.environ.keys() & {ARMED, PLANTED}
        return ["-m", "acceptance.failpoints"] if prepared else ["-m", "forge"]

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()


class System:
    """NATS, Postgres, simulators, APIs and a worker for each role; use :func:`running`.

    Members are named `nats`, `postgres`, `sim`, `sim2`, `api`, `api2`, `generation`, `generation2`,
    `dispatcher`, `projector` and `housekeeping`.
    """

    def __init__(self, root: Path, *, render_ms: str, nats: EmbeddedNats | None = None, **more: str) -> None:
        self.root, self.data_dir, self.render_ms = root, root / "data", render_ms
        for folder in (root, self.data_dir, root / "log"):
            folder.mkdir(mode=0o755, exist_ok=True)
        self.nats = nats or EmbeddedNats(
            root / "nats",
            free_port(),
            monitoring_port=free_port(),
            log=root / "log" / "nats.log",
            anybody=True,
        )
        self.postgres = EmbeddedPostgres(root / "postgres", log=root / "log" / "postgres.log")
        self.members: dict[str, EmbeddedNats | EmbeddedPostgres | Command] = {}
        self.down: set[str] = set()
        self.deaths: list[str] = []
        self.ports: dict[str, int] = {}
        self.links: dict[str, Link] = {}
        """What stands between forge and a server, where :func:`linked` made it."""
        self.sources: dict[str, Path] = {}
        """Member → where its forge is, if it is another version than this one."""
        self._more = more

    # ------------------------------------------------------------- addresses

    @property
    def postgres_dsn(self) -> str:
        return self.postgres.dsn()

    @property
    def assets_dir(self) -> Path:
        return self.data_dir / "assets"

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def record_of(self, name: str) -> Path:
        """What a simulator writes down about itself."""
        return self.root / f"{name}.jsonl"

    def files_of(self, name: str) -> Path:
        """The directory with a simulator's output and input."""
        return self.root / f"{name}-files"

    @property
    def simulators(self) -> list[str]:
        return [name for name in self.ports if name.startswith("sim")]

    @property
    def apis(self) -> list[str]:
        return [name for name in self.ports if name.startswith("api")]

    def client(self, user: str | None = None, api: str = "api") -> httpx.AsyncClient:
        """A client that speaks for a user; paths are relative to the API's root."""
        headers = {"X-Forge-User": user} if user else {}
        return httpx.AsyncClient(base_url=self.url(api) + API, headers=headers, timeout=PATIENCE)

    async def order(self, name: str, path: str, body: Any) -> None:
        """Tell a simulator something under `/simulator/`."""
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            answer = await client.post(f"{self.url(name)}/simulator/{path}", json=body)
            assert answer.status_code == 200, answer.text

    async def faults(self, simulator: str = "sim", /, **faults: Any) -> None:
        """Switch some of a simulator's faults."""
        await self.order(simulator, "faults", faults)

    # --------------------------------------------------------------- members

    def start(self, *names: str) -> None:
        """Launch members, new ones or killed ones, without waiting for them."""
        for name in names:
            if name not in self.members:
                self.members[name] = self._made(name)
            self.members[name].launch()
            self.down.discard(name)

    def start_other(self, sources: Path, *names: str) -> None:
        """Launch members with another version of forge; those that were there before must have ended."""
        for name in names:
            if name in self.members:
                self.members.pop(name).stop()
            self.sources[name] = sources
            self.start(name)

    def kill(self, name: str) -> None:
        """End one as `kill -9` does; it stays down. The prompts of a simulator die with it."""
        self.down.add(name)
        before = time.time()
        self.members[name].kill()
        if name.startswith("sim"):
            self._note_death(name, before)

    def _note_death(self, name: str, before: float) -> None:
        """In a simulator's record, after its last word and before anybody could act upon its end."""
        with self.record_of(name).open("r+b") as record:
            whole = record.read().rpartition(b"\n")[0]  # of its last line there may be half
            last = json.loads(whole.rpartition(b"\n")[2])["at"]
            record.seek(len(whole) + 1)
            record.truncate()
            killed = {"event": "killed", "at": max(before, last) + 1e-6, "present": 0}
            record.write(json.dumps(killed).encode() + b"\n")

    async def freeze(self, name: str) -> None:
        """Stop it as a machine that swaps would, with its children."""
        await freeze(self.process(name).pid)

    def thaw(self, name: str) -> None:
        thaw(self.process(name).pid)

    def terminate(self, name: str) -> None:
        """Ask one to end; it stays down."""
        self.down.add(name)
        self.process(name).send(signal.SIGTERM)

    def process(self, name: str) -> OwnedProcess:
        process = self.members[name].process
        assert process is not None
        return process

    async def ready(self) -> None:
        """Wait until every simulator and API serves."""
        before = len(self.deaths)
        async with httpx.AsyncClient(timeout=5.0) as client:
            for name in (*self.simulators, *self.apis):
                path = "/readyz" if name.startswith("api") else "/system_stats"

                async def serves(name: str = name, url: str = self.url(name) + path) -> bool:
                    deaths = [death for death in self.deaths[before:] if death.startswith(f"{name} ")]
                    assert len(deaths) < 3, f"{deaths}: {self.process(name).last_words()}"
                    with contextlib.suppress(httpx.TransportError):
                        return (await client.get(url)).status_code == 200
                    return False

                await wait_until(serves, 60, f"{name} serves; logs are in {self.root / 'log'}", 0.1)

    def _made(self, name: str) -> EmbeddedNats | EmbeddedPostgres | Command:
        if name == "nats":
            return self.nats
        if name == "postgres":
            return self.postgres
        kind = name.rstrip("0123456789")
        if kind in ("api", "sim"):
            self.ports.setdefault(name, free_port())
        words = {
            "sim": [
                "sim",
                "--port",
                str(self.ports.get(name)),
                "--output-dir",
                str(self.files_of(name)),
            ],
            "api": ["api", "--open-to-loopback"],
            "housekeeping": ["worker", "--roles", "cleanup,scheduler"],
        }.get(kind, ["worker", "--roles", kind])
        if kind == "sim":
            words += ["--render-ms", self.render_ms, "--record", str(self.record_of(name))]
        return Command(words, self.root / "log" / f"{name}.log", self.environ(name))

    def environ(self, name: str) -> dict[str, str]:
        """The variables of a member."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("FORGE_")}
        return {
            **inherited,
            "FORGE_NATS_URL": self._reached("nats", self.nats.url),
            "FORGE_NATS_PASSWORDS_DIR": str(self.nats.passwords_dir),
            "FORGE_POSTGRES_DSN": self._reached("postgres", self.postgres_dsn),
            "FORGE_COMFYUI_URLS": ",".join(self._reached(sim, self.url(sim)) for sim in self.simulators),
            "FORGE_COMFYUI_DIRS": ",".join(str(self.files_of(simulator)) for simulator in self.simulators),
            "FORGE_DATA_DIR": str(self.data_dir),
            "FORGE_PORT": str(self.ports.get(name, 0)),
            "FORGE_RATE_PER_HOUR": "1000000",
            "FORGE_SCAN_SECONDS": SCAN_SECONDS,
            "FORGE_SNAPSHOT_EVENTS": SNAPSHOT_EVENTS,
            "PYTHONPATH": os.pathsep.join(map(str, [*self._other(name), Path(__file__).parents[1]])),
            "PYTHONUNBUFFERED": "1",
            **self._more,
        }

    def _other(self, name: str) -> list[Path]:
        return [self.sources[name]] if name in self.sources else []

    def _reached(self, name: str, directly: str) -> str:
        """How forge reaches a server."""
        link = self.links.get(name)
        if link is None:
            return directly
        if name == "postgres":
            return f"postgresql://postgres@/postgres?host={self.links_dir}"
        return f"{directly.rpartition(':')[0]}:{link.port}"

    @property
    def links_dir(self) -> Path:
        return self.root / "links"

    # ----------------------------------------------------------- supervision

    async def supervise(self) -> None:
        """Start again what ends on its own, for ever."""
        while True:
            for name, member in self.members.items():
                process = member.process
                if name not in self.down and process is not None and not process.running:
                    self.deaths.append(f"{name} ended with status {process.exit_status}")
                    say(f"{self.deaths[-1]}: {process.last_words()[-2000:]}")
                    member.stop()  # gives back what it held
                    member.launch()
            await asyncio.sleep(0.2)  # the pace of a supervisor

    async def working(self, name: str) -> None:
        """Wait until a worker has begun to take work."""
        log = self.root / "log" / f"{name}.log"

        def says() -> bool:
            return log.exists() and '"working"' in log.read_text()

        await wait_until(says, 60, f"{name} works; see {log}", 0.05)

    def stop(self) -> None:
        """End everything, clients before servers."""
        commands = [member for member in self.members.values() if isinstance(member, Command)]
        for command in commands:
            if command.process is not None:
                command.process.send(signal.SIGCONT)
                command.process.send(signal.SIGTERM)
        for command in commands:
            command.stop()
        self.postgres.stop()
        self.nats.stop()


WORKERS = ("generation", "dispatcher", "projector", "housekeeping")


@contextlib.asynccontextmanager
async def running(
    root: Path,
    *,
    render_ms: str = "50-300",
    simulators: int = 1,
    apis: int = 1,
    linked: bool = False,
    workers: tuple[str, ...] = WORKERS,
    nats: EmbeddedNats | None = None,
    prepare: Callable[[System], Awaitable[None]] | None = None,
    **more: str,
) -> AsyncIterator[System]:
    """A system that serves; `more` are further variables. `workers` may leave some for the test to start.

    `linked`: every server is reached through a proxy that can be spoilt. `nats`: another server of the log.
    `prepare`: what is done to the empty servers before forge starts.
    """
    system = System(root, render_ms=render_ms, nats=nats, **more)
    system.start("nats", "postgres")
    began = time.monotonic()
    watch = None
    try:
        system.nats.wait_ready()
        system.postgres.wait_ready()
        system.start(*_numbered("sim", simulators))
        if linked:
            await _link(system)
        if prepare is not None:
            await prepare(system)
        system.start(*_numbered("api", apis), *workers)
        await bootstrap.setup(load(system.environ("api")))
        watch = asyncio.create_task(system.supervise(), name="supervision")
        await system.ready()
        say(f"the system serves after {time.monotonic() - began:.1f} s; logs are in {root / 'log'}")
        yield system
        assert_nothing_was_refused(system)
    finally:
        if watch is not None:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        system.stop()
        for link in system.links.values():
            await link.close()


def assert_nothing_was_refused(system: System) -> None:
    """No process of forge tried what its user of NATS may not: nats-server writes down each attempt."""
    refused = [line for line in system.nats.log.read_text().splitlines() if "Violation" in line]
    assert not refused, "\n".join(refused[:5])


def say(line: str) -> None:
    """Into what pytest shows of a failed test."""
    print(line)  # noqa: T201  (pytest keeps it for the report)


async def _link(system: System) -> None:
    """Put a proxy before every server."""
    system.links_dir.mkdir(mode=0o755)
    socket_ = ".s.PGSQL.5432"
    sockets = Path(parse_qs(urlsplit(system.postgres_dsn).query)["host"][0])
    system.links = {
        "nats": Link(lambda: Address(system.nats.port or 0)),
        "postgres": Link(lambda: Address(path=sockets / socket_)),
        "sim": Link(lambda: Address(system.ports["sim"])),
    }
    for name, link in system.links.items():
        await link.listen(system.links_dir / socket_ if name == "postgres" else None)


def _numbered(kind: str, count: int) -> list[str]:
    return [kind if nth == 1 else f"{kind}{nth}" for nth in range(1, count + 1)]
