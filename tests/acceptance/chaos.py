"""A whole forge under random faults: quiet → faults → healed, over and over; then everything is judged.

`./forge chaos --minutes 60` from a shell; the short form is a test. What is done follows from the seed, how
the processes get on does not: a seed shows the same faults, not the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx

from acceptance.players import Crowd
from acceptance.settling import ends, settled, watching
from acceptance.system import WORKERS, System, running

PAIRS = tuple(f"{worker}2" for worker in WORKERS)
PROCESSES = ("nats", "postgres", "sim", "api", "api2", *WORKERS, *PAIRS)
LINKS = ("nats", "postgres", "sim")
MISTAKES = (
    "history_delay_ms",
    "answer_delay_ms",
    "slow_http_ms",
    "refuse_next",
    "queue_and_refuse_next",
    "hang_up_next",
    "fail_next",
    "empty_outputs_next",
)
"""What a ComfyUI was seen to do wrong."""

QUIET_SECONDS, FAULT_SECONDS = 2.0, 6.0
MOST = 5
"""Faults at once; of four rounds one has none, so that healing is seen to be whole."""
GRACE_SECONDS = 30
"""How long a file without a row stays: longer than any conclusion is held up here."""
USERS = 12
JOBS_PER_SECOND = 3.0

Say = Callable[[str], None]


async def run(root: Path, seed: int, seconds: float, say: Say) -> Counter[str]:
    """Play, break, heal, drain, judge; how the jobs ended.

    Raises:
        AssertionError: what is wrong.
    """
    dice = random.Random(seed)
    jobs = max(USERS, round(seconds * JOBS_PER_SECOND))
    async with (
        running(
            root,
            render_ms="50-200",
            apis=2,
            linked=True,
            workers=(*WORKERS, *PAIRS),
            FORGE_ORPHAN_GRACE_SECONDS=str(GRACE_SECONDS),
        ) as system,
        watching(system) as witness,
    ):
        crowd = Crowd(system, jobs, USERS, dice, pause=0.6 * seconds * USERS / jobs, fickle=0.2)
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(crowd.play())
            while (at := time.monotonic() - began) < seconds:
                await _round(system, dice, lambda line, at=at: say(f"{at:7.1f} s  {line}"))
        await _healed(system)
        evidence = await settled(witness, crowd.asked, timeout=240, orphans_go=True)
        how = Counter(ends(evidence))
        say(f"{dict(how)}; asked {len(crowd.asked)}; ended on their own: {Counter(system.deaths)}")
        return how


async def _round(system: System, dice: random.Random, say: Say) -> None:
    """Quiet, some faults, all well again. A sleep here is how long a fault lasts; none waits for a fact."""
    await asyncio.sleep(QUIET_SECONDS)
    count = 0 if dice.random() < 0.25 else dice.randint(1, MOST)
    victims = dice.sample(PROCESSES, k=count)
    async with asyncio.TaskGroup() as group:
        for victim in victims:
            kind = dice.choice((_killed, _killed, _frozen, _cut, _confused))
            if kind is _cut:
                victim = dice.choice(LINKS)
            begin, away = dice.uniform(0, 2), dice.uniform(0, FAULT_SECONDS - 2)
            group.create_task(_after(begin, kind(system, victim, away, random.Random(dice.random()), say)))
        group.create_task(asyncio.sleep(FAULT_SECONDS))
    if not count:
        say("nothing")
    await _healed(system)


async def _after(seconds: float, act: Awaitable[None]) -> None:
    await asyncio.sleep(seconds)
    await act


async def _killed(system: System, victim: str, away: float, dice: random.Random, say: Say) -> None:
    say(f"kill -9 {victim}, back after {away:.1f} s")
    system.kill(victim)
    await asyncio.sleep(away)
    system.start(victim)


async def _frozen(system: System, victim: str, away: float, dice: random.Random, say: Say) -> None:
    say(f"stop {victim} for {away:.1f} s")
    await system.freeze(victim)
    await asyncio.sleep(away)
    system.thaw(victim)


async def _cut(system: System, victim: str, away: float, dice: random.Random, say: Say) -> None:
    link = system.links[victim]
    match dice.choice(("reset", "hole", "slow")):
        case "reset":
            say(f"reset all connections to {victim}")
            link.reset()
        case "hole":
            say(f"nothing passes to {victim} for {away:.1f} s")
            link.hole()
            await asyncio.sleep(away)
        case "slow":
            say(f"{victim} is 50 ms further away for {away:.1f} s")
            link.delay = 0.05
            await asyncio.sleep(away)
    link.heal()


async def _confused(system: System, victim: str, away: float, dice: random.Random, say: Say) -> None:
    mistake = dice.choice(MISTAKES)
    amount = dice.randint(50, 1500) if mistake.endswith("_ms") else dice.randint(1, 2)
    say(f"ComfyUI: {mistake}={amount}")
    with contextlib.suppress(httpx.TransportError):  # it may be dead at the moment
        await system.faults(**{mistake: amount})
        await asyncio.sleep(away)


async def _healed(system: System) -> None:
    for link in system.links.values():
        link.heal()
    with contextlib.suppress(httpx.TransportError):
        await system.faults(**dict.fromkeys(MISTAKES, 0))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def main() -> None:
    asked = argparse.ArgumentParser(prog="./forge chaos", description=__doc__)
    asked.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1, 10**6))
    asked.add_argument("--minutes", type=float, default=1.0, help="of faults; draining comes after")
    asked.add_argument("--dir", type=Path, help="where logs and data stay; otherwise they are removed")
    given = asked.parse_args()
    root = given.dir or Path(tempfile.mkdtemp(prefix="forge-chaos-"))
    root.mkdir(mode=0o755, parents=True, exist_ok=True)
    root.chmod(0o755)
    print(f"seed {given.seed}, {given.minutes:g} minutes, in {root}", flush=True)  # noqa: T201  (a command)
    try:
        asyncio.run(run(root, given.seed, given.minutes * 60, lambda line: print(line, flush=True)))  # noqa: T201  (a command)
    except* AssertionError as wrong:
        for leaf in _leaves(wrong):
            print(f"seed {given.seed}: {leaf}", file=sys.stderr)  # noqa: T201  (a command)
        sys.exit(1)
    if given.dir is None:
        shutil.rmtree(root, ignore_errors=True)
    print("every invariant holds")  # noqa: T201  (a command)


if __name__ == "__main__":
    main()
