"""`forge dev`: the whole system as child processes of one supervisor, on servers of its own.

NATS, Postgres and a ComfyUI simulator start at once, unless the environment names others; then setup, API and
workers. Whatever dies is started again. All state lies in the data directory:

::

    DATA_DIR/nats  postgres  comfyui  assets    what the servers keep
    DATA_DIR/log/*.log                          what every child says; the run before in *.log.1
    DATA_DIR/run                                the lock; where Python children work
    DATA_DIR/dev.json                           addresses and process numbers, for other commands
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from forge.embedded import DirectoryLock, EmbeddedNats, EmbeddedPostgres, OwnedProcess, clear_leftovers
from forge.embedded import record as dev_record
from forge.embedded.supervisor import Children
from forge.errors import ServerFailed
from forge.settings import Settings, load

READY_WITHIN = 60.0
_PATIENCE = 600.0  # a nats-server tries each message of a damaged block again
RENDER_MS = "200-800"
"""How long the simulator takes for a picture: short enough for patience, long enough to see progress."""


class Dev(msgspec.Struct, frozen=True):
    """A system that serves."""

    url: str
    settings: Settings


Use = Callable[[Dev], Awaitable[int | None]]
Report = Callable[[str], None]


class ForgeCommand:
    """A command of forge as a child process, in the same Python environment."""

    def __init__(self, words: list[str], log: Path, place: Path, environ: Mapping[str, str]) -> None:
        self.words = words
        self.log = log
        self.place = place
        self.environ = environ
        self.process: OwnedProcess | None = None

    def launch(self) -> OwnedProcess:
        self.process = OwnedProcess(
            [sys.executable, "-P", "-m", "forge", *self.words], log=self.log, cwd=self.place, env=self.environ
        )
        return self.process

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()


def serve(environ: Mapping[str, str], use: Use, report: Report) -> int:
    """Run the system from its start to a clean stop, and return an exit status.

    SIGTERM, SIGINT and SIGHUP stop it; a second one ends everything at once.

    Args:
        environ: the variables of :mod:`forge.settings`, command line included. Servers named by
            `FORGE_NATS_URL`, `FORGE_POSTGRES_DSN` and `FORGE_COMFYUI_URLS` are used as they are.
        use: called once everything serves; its number ends the run as exit status, None keeps serving.
        report: told in one line about everything out of the ordinary.

    Raises:
        ForgeError: the system could not be started; everything that was started is stopped again.
    """
    return asyncio.run(_serve(environ, use, report))


@contextmanager
def servers(environ: Mapping[str, str]) -> Iterator[Settings]:
    """NATS and Postgres of a data directory alone, for work on a system that does not run.

    Raises:
        ServerFailed: the directory is in use, or no data directory; or a server does not start.
    """
    settings = load(environ)
    if not (settings.data_dir / "nats").exists():
        raise ServerFailed(f"{settings.data_dir} is the data directory of no `forge dev`; name the servers")
    with _sole_owner(settings.data_dir):
        logs = settings.data_dir / "log"
        nats = EmbeddedNats(settings.data_dir / "nats", log=logs / "nats.log")
        postgres = EmbeddedPostgres(settings.data_dir / "postgres", log=logs / "postgres.log")
        try:
            dsn = postgres.start()
            url = nats.start(_PATIENCE)
            yield msgspec.structs.replace(
                settings, nats_url=url, nats_passwords_dir=nats.passwords_dir, postgres_dsn=dsn
            )
        finally:
            nats.stop()
            postgres.stop()


async def _serve(environ: Mapping[str, str], use: Use, report: Report) -> int:
    settings = load(environ)
    children = Children(report)
    with _stop_on_signals(children), _sole_owner(settings.data_dir), ExitStack() as kept:
        try:
            async with children.supervised():
                dev = await _start(settings, environ, children, kept)
                status = await use(dev)
                if status is None:
                    await asyncio.Event().wait()
                return status or 0
        except asyncio.CancelledError:  # only a signal cancels
            return 0


@contextmanager
def _stop_on_signals(children: Children) -> Iterator[None]:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    asked = False

    def stop() -> None:
        nonlocal asked
        if asked:
            children.kill()
        else:
            asked = True
            task.cancel()

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def _sole_owner(data_dir: Path) -> Iterator[None]:
    """The data directory, made ready for a run and free of what a killed one left behind."""
    run = dev_record.run_directory(data_dir)
    lock = DirectoryLock(run)
    try:
        for directory in (data_dir, run, data_dir / "log"):
            directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise ServerFailed(f"{data_dir} cannot be the data directory: {error}") from error
    try:
        clear_leftovers(run, "", signal.SIGTERM)
        for log in (data_dir / "log").glob("*.log"):
            log.replace(log.with_suffix(".log.1"))
        yield
    finally:
        dev_record.remove(data_dir)
        lock.release()


async def _start(settings: Settings, environ: Mapping[str, str], children: Children, kept: ExitStack) -> Dev:
    port = kept.enter_context(kept_port(settings.host, settings.port))
    if settings.workflows_dir or settings.models:
        from forge.comfyui import workflows

        workflows.load(
            settings.workflows_dir, models=settings.models
        )  # its author is told at once, not by a child that keeps dying
    settings = msgspec.structs.replace(settings, port=port)
    settings = await _start_servers(settings, environ, children, kept)
    dev = Dev(f"http://{_in_url(settings.host)}:{port}", settings)
    children.on_change = lambda: _write_record(dev, children)
    children.on_change()

    for words in (_api_words(settings), ["worker"]):
        children.start(words[0], _command(words, settings, environ))

    from forge import bootstrap  # takes as long to read as the children take to start

    await bootstrap.setup(settings)
    await _until_ready(settings)
    children.steady = True
    return dev


async def _start_servers(
    settings: Settings, environ: Mapping[str, str], children: Children, kept: ExitStack
) -> Settings:
    """Start the servers that the environment does not name, all at once; the settings to reach them all."""
    data, logs = settings.data_dir, settings.data_dir / "log"
    found: dict[str, str | Path | tuple[str, ...] | tuple[Path, ...]] = {}
    nats = None if environ.get("FORGE_NATS_URL") else EmbeddedNats(data / "nats", log=logs / "nats.log")
    if nats:
        children.start("nats", nats)
    if not environ.get("FORGE_COMFYUI_URLS"):
        port = kept.enter_context(kept_port("127.0.0.1", 0))
        files = data / "comfyui"
        words = ["sim", "--port", str(port), "--output-dir", str(files), "--render-ms", RENDER_MS]
        children.start("sim", _command(words, settings, environ))
        found["comfyui_urls"] = (f"http://127.0.0.1:{port}",)
        found["comfyui_dirs"] = (files.absolute(),)
    if not environ.get("FORGE_POSTGRES_DSN"):
        postgres = EmbeddedPostgres(data / "postgres", log=logs / "postgres.log")
        children.start("postgres", postgres)
        found["postgres_dsn"] = await asyncio.to_thread(postgres.wait_ready)
    if nats:
        found["nats_url"] = await asyncio.to_thread(nats.wait_ready)
        found["nats_passwords_dir"] = nats.passwords_dir
    return msgspec.structs.replace(settings, **found)


def _api_words(settings: Settings) -> list[str]:
    """Without keys, this machine's own requests are the operator `dev`."""
    return ["api"] if settings.api_keys else ["api", "--open-to-loopback"]


def _command(words: list[str], settings: Settings, environ: Mapping[str, str]) -> ForgeCommand:
    data_dir = settings.data_dir
    variables = {
        **environ,
        "FORGE_NATS_URL": settings.nats_url,
        "FORGE_NATS_PASSWORDS_DIR": str(settings.nats_passwords_dir or ""),
        "FORGE_POSTGRES_DSN": settings.postgres_dsn,
        "FORGE_COMFYUI_URLS": ",".join(settings.comfyui_urls),
        "FORGE_COMFYUI_DIRS": ",".join(_listed(settings.comfyui_dirs)),
        "FORGE_DATA_DIR": str(data_dir),
        "FORGE_HOST": settings.host,
        "FORGE_PORT": str(settings.port),
        "PYTHONUNBUFFERED": "1",
    }
    if settings.workflows_dir:
        variables["FORGE_WORKFLOWS_DIR"] = str(settings.workflows_dir)
    place = dev_record.run_directory(data_dir)
    return ForgeCommand(words, data_dir / "log" / f"{words[0]}.log", place, variables)


def _listed(directories: Sequence[Path | None]) -> tuple[str, ...]:
    """As a variable can name them, which a comma in one of them forbids for all."""
    names = tuple(str(directory or "") for directory in directories)
    return () if any("," in name for name in names) else names


def _write_record(dev: Dev, children: Children) -> None:
    settings = dev.settings
    dev_record.write(
        settings.data_dir,
        dev_record.DevRecord(
            pid=os.getpid(),
            url=dev.url,
            nats_url=settings.nats_url,
            nats_passwords_dir=str(settings.nats_passwords_dir or ""),
            postgres_dsn=settings.postgres_dsn,
            comfyui_urls=settings.comfyui_urls,
            comfyui_dirs=_listed(settings.comfyui_dirs),
            children=children.pids,
        ),
    )


def free_port(host: str, port: int) -> int:
    """`port` when nobody listens there, or for 0 any such port."""
    with _bound(host, port) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def kept_port(host: str, port: int) -> Iterator[int]:
    """The same, for a child that takes seconds to listen there, and again after each of its deaths: on Linux
    nobody else is given this port by chance meanwhile, and whoever asks for it by its number may have it."""
    with _bound(host, port) as probe:
        number = int(probe.getsockname()[1])
        if sys.platform != "linux":  # where who asks by number would be refused, too
            probe.close()
        yield number


def _bound(host: str, port: int) -> socket.socket:
    """A socket that is bound there, and does not listen."""
    probe = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return probe
    except OSError as error:
        probe.close()
        raise ServerFailed(
            f"cannot listen on {host}:{port}: {error.strerror or error}; "
            "choose another port with --port (0 takes a free one)"
        ) from error


async def _until_ready(settings: Settings) -> None:
    deadline = time.monotonic() + READY_WITHIN
    status = ""
    while time.monotonic() < deadline:
        status = await _readiness(_reachable(settings.host), settings.port)
        if status.startswith("200"):
            return
        await asyncio.sleep(0.02)
    raise ServerFailed(
        f"the API was not ready after {READY_WITHIN:.0f} s (it says: {status or 'nothing'}); "
        f"look into {settings.data_dir / 'log'}"
    )


async def _readiness(host: str, port: int) -> str:
    """The status of `/readyz` in words, empty while nobody answers."""
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return ""
    return line.decode(errors="replace").partition(" ")[2].strip()


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
