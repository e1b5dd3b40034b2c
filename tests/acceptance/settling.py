"""Waiting until a system has nothing left to do, and judging what is there then."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager

import asyncpg
import nats.errors
import nats.js.errors

from acceptance.checker import Asked, check
from acceptance.evidence import ADMISSION, TERMINAL, Evidence, Message, Witness
from acceptance.system import System, say
from waiting import wait_until

ABSENT = (
    OSError,
    TimeoutError,
    nats.errors.Error,
    nats.js.errors.Error,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
)
"""How a server says that it is not there."""


@asynccontextmanager
async def watching(system: System) -> AsyncIterator[Witness]:
    """A witness of everything this system does."""
    records = {name: system.record_of(name) for name in system.simulators}
    files = {name: system.files_of(name) for name in system.simulators}
    async with Witness(system.nats.url, system.postgres_dsn, system.assets_dir, records, files) as witness:
        yield witness


async def settled(
    witness: Witness,
    asked: Iterable[Asked] = (),
    timeout: float = 60.0,
    given_up: Collection[str] = (),
    *,
    orphans_go: bool = False,
) -> Evidence:
    """Everything, once all jobs are over and every reader has caught up, checked against every invariant.

    With `orphans_go` files of attempts that came to nothing are waited for to go, which takes their grace.
    """
    reasons: list[str] = []
    began = time.monotonic()

    async def quiet() -> bool:
        with contextlib.suppress(*ABSENT):
            reasons[:] = await _unrest(witness, given_up) or (await _orphans(witness) if orphans_go else [])
        return reasons == []

    reasons.append("nobody answered")
    try:
        await wait_until(quiet, timeout, "", 0.1)
    except AssertionError:
        raise AssertionError(f"not quiet after {timeout} s: {'; '.join(reasons)}") from None
    say(f"quiet after {time.monotonic() - began:.1f} s")
    evidence = await wait_until(lambda: _of_one_moment(witness, given_up), 30, "nothing comes meanwhile", 0.1)
    assert evidence is not None
    check(evidence, asked, given_up)
    return evidence


async def _of_one_moment(witness: Witness, given_up: Collection[str]) -> Evidence | None:
    """Everything, unless an event came while it was read: some come late, as of files that were fetched, and
    then the tables tell more than the log, or less."""
    with contextlib.suppress(*ABSENT):
        seen = len(await witness.events())
        if not await _unrest(witness, given_up):
            evidence = await witness.everything()
            return evidence if len(await witness.events()) == seen else None
    return None


async def _unrest(witness: Witness, given_up: Collection[str]) -> list[str]:
    """What is still to come."""
    events = await witness.events()
    jobs = await witness.jobs()
    open_ = [id_ for id_, events_ in jobs.items() if not over(events_)]
    if open_:
        last = {id_: jobs[id_][-1].type for id_ in open_[:3]}
        return [f"{len(open_)} of {len(jobs)} jobs are not over, among them {last}"]
    found = []
    if orders := await witness.orders():
        found.append(f"{orders} are in the dispatch queue")
    if await witness.checkpoint() < (events[-1].seq if events else 0):
        found.append("the tables are behind")
    if leftovers := witness.leftovers():
        found.append(f"{leftovers} are in tmp")
    drawn = witness.left_at_comfyui()
    if left := {name: folders for name, folders in drawn.items() if folders and name not in given_up}:
        found.append(f"{left} are at ComfyUI")
    if len(await witness.public()) < sum(event.type == "forge.asset.ready.v1" for event in events):
        found.append("the public stream is behind")
    return found


async def _orphans(witness: Witness) -> list[str]:
    evidence = await witness.everything()
    rows = {row["file_path"] for row in evidence.assets.values()}
    return [f"{path} has no row yet, or no more" for path in evidence.files.keys() - rows]


def over(events: list[Message]) -> bool:
    """Whether a job has ended as often as it was admitted."""
    kinds = [event.type for event in events]
    return sum(kind in TERMINAL for kind in kinds) >= sum(kind in ADMISSION for kind in kinds)


async def happened(
    witness: Witness, kind: str, times: int = 1, job: str = "", timeout: float = 60.0
) -> Message:
    """The event that makes it `times` many of `forge.job.<kind>.v1`, of that job if one is named."""

    async def found() -> Message | None:
        with contextlib.suppress(*ABSENT):
            of_job = (await witness.jobs()).values() if not job else [(await witness.jobs()).get(job, [])]
            matching = sorted(
                (e for events in of_job for e in events if e.type == f"forge.job.{kind}.v1"),
                key=lambda e: e.seq,
            )
            return matching[times - 1] if len(matching) >= times else None
        return None

    event = await wait_until(found, timeout, f"{times} × job.{kind} {job}", 0.02)
    assert event is not None
    return event


def ends(evidence: Evidence, jobs: Collection[str] | None = None) -> list[str]:
    """The last word of every job, or of these."""
    words: dict[str, str] = {}
    for event in evidence.events:
        if event.type in TERMINAL and (jobs is None or event.data["job_id"] in jobs):
            words[event.data["job_id"]] = event.type.split(".")[2]
    return list(words.values())
