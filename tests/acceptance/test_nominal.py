"""200 jobs of 20 users: all complete, three at a time, in the order the rules give, each stored once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from acceptance.evidence import Evidence, Message
from acceptance.order import out_of_turn
from acceptance.players import ask_until_answered, request, scaled
from acceptance.settling import ends, settled, watching
from acceptance.system import running, say

USERS = 20
KINDS: dict[str, dict[str, Any]] = {
    "ui_icon": {"width": 256, "height": 256},
    "character_portrait": {"width": 256, "height": 256},
    "npc_bust": {"width": 256, "height": 256},
    "fate_card": {"width": 256, "height": 256},
}


@pytest.mark.timeout(300)
async def test_two_hundred_jobs_of_twenty_users(root: Path) -> None:
    dice = random.Random(20)
    asked = [
        request(f"user-{nth % USERS}", priority=dice.randint(1, 10), job_type=kind, params=dict(KINDS[kind]))
        for nth, kind in enumerate(dice.choices(list(KINDS), k=scaled(200)))
    ]
    async with running(root, workers=("projector",)) as system, watching(system) as witness:
        async with system.client() as client:
            for one in asked:
                await ask_until_answered(client, one)
        system.start("dispatcher", "generation", "housekeeping")  # everybody waits before the first may start
        evidence = await settled(witness, asked, timeout=200)
        assert system.deaths == []
        assert Counter(ends(evidence)) == {"completed": len(asked)}
        assert len(evidence.assets) == len(evidence.files) == len(evidence.references) == len(asked)
        _starts_are_in_order(evidence)
        _each_was_drawn_at_the_first_attempt(evidence, len(asked))
        _never_idle(evidence.simulators["sim"])


def _starts_are_in_order(evidence: Evidence) -> None:
    wrong = list(out_of_turn(evidence.events))
    assert not wrong, "\n".join(wrong[:10])
    reasons = [event.data["reason"] for event in _of(evidence, "started")]
    assert all("priority" in reason and "turn" in reason and "backend" in reason for reason in reasons)


def _each_was_drawn_at_the_first_attempt(evidence: Evidence, jobs: int) -> None:
    drawn = [line for line in evidence.simulators["sim"] if line["event"] == "started"]
    assert len(drawn) == jobs
    assert {event.data["attempt"] for event in _of(evidence, "started")} == {1}


def _never_idle(record: list[dict[str, Any]]) -> None:
    """While work waits, two prompts and more are there most of the time, and hardly ever none."""
    lines = [line for line in record if line["event"] != "booted"]
    last = [line["at"] for line in lines if line["event"] == "submitted"][-1]
    shares: Counter[int] = Counter()
    for line, following in pairwise(lines):
        if following["at"] <= last:
            shares[line["present"]] += following["at"] - line["at"]
    total = sum(shares.values())
    told = {present: round(seconds / total, 3) for present, seconds in sorted(shares.items())}
    say(f"prompts present, share of {total:.0f} s: {told}")
    assert (shares[2] + shares[3]) / total > 0.8, told
    assert shares[0] / total < 0.05, told


def _of(evidence: Evidence, kind: str) -> Iterator[Message]:
    return (event for event in evidence.events if event.type == f"forge.job.{kind}.v1")
