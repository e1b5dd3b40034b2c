"""What a running `forge dev` writes down in its data directory, so that other commands find its servers."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from forge.embedded.state import DirectoryLock

_NAME = "dev.json"


class DevRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses and process numbers of one running `forge dev`."""

    pid: int
    url: str
    nats_url: str
    nats_passwords_dir: str = ""
    postgres_dsn: str
    comfyui_urls: tuple[str, ...]
    comfyui_dirs: tuple[str, ...] = ()
    children: dict[str, int] = {}
    """Name → process number."""

    def environment(self) -> dict[str, str]:
        """The variables that make a command talk to the same servers."""
        return {
            "FORGE_NATS_URL": self.nats_url,
            "FORGE_NATS_PASSWORDS_DIR": self.nats_passwords_dir,
            "FORGE_POSTGRES_DSN": self.postgres_dsn,
            "FORGE_COMFYUI_URLS": ",".join(self.comfyui_urls),
            "FORGE_COMFYUI_DIRS": ",".join(self.comfyui_dirs),
        }


def run_directory(data_dir: Path) -> Path:
    """Where `forge dev` keeps its lock and where its Python children work."""
    return data_dir / "run"


def write(data_dir: Path, record: DevRecord) -> None:
    """Replace the record at once; the DSN in it may hold a password, so it is ours alone to read."""
    half = data_dir / f"{_NAME}.half"
    descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    half.replace(data_dir / _NAME)


def remove(data_dir: Path) -> None:
    """Take it away; harmless when there is none."""
    (data_dir / _NAME).unlink(missing_ok=True)


def running(data_dir: Path) -> DevRecord | None:
    """The record of the `forge dev` that runs on `data_dir` now; what a crash left behind does not count."""
    if not DirectoryLock.is_held(run_directory(data_dir)):
        return None
    try:
        return msgspec.json.decode((data_dir / _NAME).read_bytes(), type=DevRecord)
    except (OSError, msgspec.DecodeError):
        return None  # it is still starting
