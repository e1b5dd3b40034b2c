"""One child process that ends with its owner.

On Linux the kernel sends the child its stop signal when the owner dies, `kill -9` included; elsewhere the
next start clears what was left (:mod:`forge.embedded.state`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from forge.errors import ServerFailed

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Account(NamedTuple):
    """The user a child runs as when it may not run as root."""

    uid: int
    gid: int


class StopStep(NamedTuple):
    """One step of a stop: send the signal, then wait this many seconds."""

    signal: signal.Signals
    patience: float


POLITE = (StopStep(signal.SIGTERM, 20.0), StopStep(signal.SIGKILL, 10.0))


class OwnedProcess:
    """A running child; what it prints goes to the end of `log`.

    Args:
        stop_steps: how it is asked to end, politest first; the first signal is also what the kernel sends it
            when its owner dies.

    Raises:
        ServerFailed: the program cannot be executed.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        account: Account | None = None,
        stop_steps: Sequence[StopStep] = POLITE,
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            # The kernel's signal follows the thread that forked, not the process.
            raise ServerFailed(f"{Path(argv[0]).name} has to be started from the main thread")
        self.name = Path(argv[0]).name
        self.log = log
        self.stop_steps = tuple(stop_steps)
        try:
            with log.open("ab") as output:
                self._log_start = output.tell()
                self._popen = _popen(argv, output.fileno(), cwd, env, account, self.stop_steps[0].signal)
        except (OSError, subprocess.SubprocessError) as error:
            raise ServerFailed(f"{argv[0]} cannot be executed: {error}") from error

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def exit_status(self) -> int | None:
        """None while it runs; a signal's number is negative."""
        return self._popen.poll()

    def wait_ready(self, probe: Callable[[], T | None], timeout: float) -> T:
        """Wait until `probe` answers something.

        Raises:
            ServerFailed: it ended or took longer than `timeout` seconds; carries the end of its log.
        """
        deadline = time.monotonic() + timeout
        while self.running and time.monotonic() < deadline:
            if (answer := probe()) is not None:
                return answer
            time.sleep(0.003)
        why = (
            f"was not ready after {timeout:.0f} s"
            if self.running
            else f"ended with status {self.exit_status}"
        )
        raise ServerFailed(f"{self.name} {why}; the end of {self.log}:\n{self.last_words()}")

    def last_words(self, limit: int = 1500) -> str:
        """The end of what this run, not an earlier one, wrote to the log; at most `limit` bytes."""
        with self.log.open("rb") as log:
            log.seek(max(self._log_start, self.log.stat().st_size - limit))
            return log.read().decode(errors="replace").strip()

    def stop(self) -> None:
        """Take every stop step until it has ended; harmless when it has."""
        for step in self.stop_steps:
            if not self.running:
                return
            self._popen.send_signal(step.signal)
            try:
                self._popen.wait(step.patience)
            except subprocess.TimeoutExpired:
                continue

    def send(self, what: signal.Signals) -> None:
        """Send a signal; harmless when it has ended."""
        self._popen.send_signal(what)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._popen.kill()
        self._popen.wait()


def _popen(
    argv: Sequence[str | Path],
    output: int,
    cwd: Path,
    env: Mapping[str, str] | None,
    account: Account | None,
    farewell: signal.Signals,
) -> subprocess.Popen[bytes]:
    owner = os.getpid()

    def end_with_owner() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, int(farewell))
            if os.getppid() != owner:  # it died before the kernel knew that we care
                os._exit(1)

    with warnings.catch_warnings():
        # Newer Pythons warn that a fork with threads may deadlock; between fork and exec we take no lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        return subprocess.Popen(
            argv,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C goes to the owner alone, who stops children in order
            preexec_fn=end_with_owner,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
