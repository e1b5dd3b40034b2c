"""What really happened, kept beside the simulated memory: it outlives `forget`, and a killed process too."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

import msgspec

KEPT_EVENTS = 200_000


class Record:
    """Counts and events of one simulator over all its lives.

    Args:
        path: JSON lines to append to; what an earlier process wrote there is read back first.
    """

    def __init__(self, path: Path | None) -> None:
        self.events: list[dict[str, Any]] = []
        self.executed: Counter[str] = Counter()
        self.submitted: Counter[str] = Counter()
        self.present = 0
        self.max_present = 0
        self._file: TextIO | None = None
        if path is not None:
            if path.exists():
                self._read_back(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", buffering=1, encoding="utf-8")  # a line reaches the kernel at once
        self.add("booted", present=0)

    def add(self, event: str, *, present: int, **facts: Any) -> None:
        """Note one event; `present` is how many prompts are running or pending right after it."""
        line = {"event": event, "at": time.time(), "present": present, **facts}
        self._count(line)
        if self._file is not None:
            self._file.write(msgspec.json.encode(line).decode() + "\n")

    def summary(self, *, events: bool) -> dict[str, Any]:
        """The counts as plain JSON; every event too when asked for."""
        counts = {
            "max_present": self.max_present,
            "present": self.present,
            "submitted": dict(self.submitted),
            "executed": dict(self.executed),
        }
        return counts | ({"events": self.events} if events else {})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _count(self, line: dict[str, Any]) -> None:
        self.events.append(line)
        if len(self.events) > KEPT_EVENTS:
            del self.events[: KEPT_EVENTS // 2]
        self.present = line["present"]
        self.max_present = max(self.max_present, self.present)
        match line["event"]:
            case "submitted":
                self.submitted[line["prompt_id"]] += 1
            case "started":
                self.executed[line["prompt_id"]] += 1

    def _read_back(self, path: Path) -> None:
        with path.open("r+b") as file:
            whole = 0
            for line in file:
                if line.endswith(b"\n"):
                    self._count(msgspec.json.decode(line))
                    whole += len(line)
            file.truncate(whole)  # a killed process may leave half a line
