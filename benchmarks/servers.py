"""The servers a benchmark measures, each in a process of its own, as ``forge dev`` runs them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from benchmarks.harness import PATIENCE_SECONDS
from forge import bootstrap
from forge.embedded import EmbeddedNats, EmbeddedPostgres, OwnedProcess
from forge.settings import load

JOB_TYPE = "swatch"

_GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "swatch"}},
}
_DESCRIPTION = """
asset_type = "ui_icon"
description = "A flat colour swatch"
timeout_seconds = 30
outputs = ["2"]
[params.color]
type = "integer"
minimum = 0
maximum = 16777215
default = 0
targets = ["1.color"]
"""


class Place(NamedTuple):
    """A directory of this run, the environment of all that is started in it, and who has which process."""

    root: Path
    environ: dict[str, str]
    pids: dict[str, int]


@contextmanager
def place(directory: Path | None) -> Iterator[Place]:
    """Embedded NATS and Postgres, set up, in a directory that goes with the run."""
    parent = directory or (Path("/var/tmp") if os.name == "posix" else None)
    with tempfile.TemporaryDirectory(prefix="forge-bench-", dir=parent) as name:
        root = Path(name)
        root.chmod(0o755)
        nats = EmbeddedNats(root / "nats", anybody=True)
        postgres = EmbeddedPostgres(root / "postgres")
        try:
            environ = {
                **os.environ,
                "FORGE_NATS_URL": nats.start(PATIENCE_SECONDS),
                "FORGE_NATS_PASSWORDS_DIR": str(nats.passwords_dir),
                "FORGE_POSTGRES_DSN": postgres.start(PATIENCE_SECONDS),
                "FORGE_DATA_DIR": str(root / "data"),
                "FORGE_WORKFLOWS_DIR": str(job_type(root / "workflows")),
                "FORGE_RATE_PER_HOUR": "1000000000",
                "FORGE_QUEUE_LIMIT": "100000000",
                "FORGE_LOG_LEVEL": "WARNING",
                "FORGE_HOST": "127.0.0.1",
            }
            asyncio.run(bootstrap.setup(load(environ)))
            assert nats.process is not None
            assert postgres.process is not None
            yield Place(root, environ, {"nats": nats.process.pid, "postgres": postgres.process.pid})
        finally:
            postgres.stop()
            nats.stop()


@contextmanager
def process(name: str, words: list[str], at: Place, **variables: str) -> Iterator[OwnedProcess]:
    """A Python module as a process of this run."""
    child = OwnedProcess(
        [sys.executable, "-m", *words],
        log=at.root / f"{name}.log",
        cwd=Path(__file__).parents[1],
        env={**at.environ, **variables},
    )
    at.pids[name] = child.pid
    try:
        yield child
        if not child.running:
            raise SystemExit(f"{name} ended early:\n{child.last_words()}")
    finally:
        child.stop()


@contextmanager
def forge_api(
    at: Place, name: str = "api", command: Sequence[str] = ("forge",), **variables: str
) -> Iterator[str]:
    """The API of forge; its URL."""
    port = free_port()
    words = [*command, "api", "--open-to-loopback"]
    with process(name, words, at, **variables, FORGE_PORT=str(port)) as child:
        yield _ready(f"http://127.0.0.1:{port}", "/livez", child)


@contextmanager
def forge_worker(at: Place, comfyui: str, command: Sequence[str] = ("forge",)) -> Iterator[None]:
    """A worker with every role."""
    with process("worker", [*command, "worker"], at, FORGE_COMFYUI_URLS=comfyui):
        yield


@contextmanager
def simulator(at: Place) -> Iterator[str]:
    """A ComfyUI simulator that takes no time; its URL."""
    port = free_port()
    words = f"forge sim --render-ms 0 --port {port} --output-dir {at.root / 'comfyui'}"
    with process("simulator", words.split(" "), at) as child:
        yield _ready(f"http://127.0.0.1:{port}", "/prompt", child)


@contextmanager
def bare_route(at: Place, message_bytes: int) -> Iterator[str]:
    """The yardstick of the API; its URL."""
    port = free_port()
    words = f"benchmarks.bare_route {at.environ['FORGE_NATS_URL']} {port} {message_bytes}"
    with process("route", words.split(" "), at) as child:
        yield _ready(f"http://127.0.0.1:{port}", "/livez", child)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ready(url: str, path: str, child: OwnedProcess) -> str:
    def answered() -> bool | None:
        try:
            with urllib.request.urlopen(url + path, timeout=10.0):
                return True
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.02)
            return None

    child.wait_ready(answered, PATIENCE_SECONDS)
    return url


def job_type(folder: Path) -> Path:
    folder.mkdir()
    (folder / f"{JOB_TYPE}.json").write_bytes(msgspec.json.encode(_GRAPH))
    (folder / f"{JOB_TYPE}.toml").write_text(_DESCRIPTION)
    return folder
