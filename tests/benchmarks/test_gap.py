"""The pause between two prompts, read from the simulator's record."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.gap import idle


def _record(*pauses: float, seconds: float = 1.0) -> list[dict[str, Any]]:
    """Prompts of so many seconds, with these pauses between them; after a pause nothing had waited."""
    lines, at = list[dict[str, Any]](), 0.0
    for pause in (*pauses, 0.0):
        lines += [
            {"event": "submitted", "at": at, "present": 1},
            {"event": "started", "at": at, "present": 1},
            {"event": "ended", "at": at + seconds, "present": 0 if pause else 1},
        ]
        at += seconds + pause
    return lines


def test_idle_is_what_lies_between_an_end_and_the_next_start() -> None:
    found = idle(_record(0.0, 0.0, 0.0, 0.0, 1.0, 0.0))  # the first three are not counted
    assert found.jobs == 4
    assert found.percent == pytest.approx(20.0)
    assert found.longest_ms == pytest.approx(1000.0)
    assert found.dry == 1


def test_what_comes_before_all_places_are_taken_does_not_count() -> None:
    found = idle(_record(5.0, 5.0, 5.0, 0.0, 0.0))
    assert (found.percent, found.dry) == (0.0, 0)
