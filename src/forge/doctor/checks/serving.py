"""Who draws, works and serves."""

from __future__ import annotations

from collections.abc import Iterator

from forge.doctor.checks.machine import CLOCK_WARNING
from forge.doctor.facts import Away, Facts, seen
from forge.doctor.findings import Level, Verdicts, failure, ok, warning
from forge.domain import disk as rules
from forge.domain import memory as memory_rules
from forge.topology import CLEANUP, DISPATCH, EVENTS, GENERATION

SCANS = 3
"""A scheduler that said nothing for so many scans is not there."""

WAITED_SECONDS = 30.0
"""Of a job whose turn could come, with a place free: nobody gives orders."""


def comfyui(facts: Facts) -> Verdicts:
    away = {url: health for url, health in facts.comfyui.items() if not health.reachable}
    for url, health in facts.comfyui.items():
        if health.reachable:
            yield ok(
                f"ComfyUI {health.version or ''} at {url}, {health.queue_remaining} prompts in its queue"
            )
        elif len(away) == len(facts.comfyui):
            what = f"no ComfyUI can be used, jobs wait: {_away(url, health.detail)}"
            yield failure(what, "start it, or name one that runs in FORGE_COMFYUI_URLS")
        else:
            yield warning(_away(url, health.detail), "start it; others draw meanwhile")
    for url, (directory, wrong) in seen(facts.comfyui_dirs).items():
        if wrong and url not in away:  # one that never ran has nothing there
            what = f"{directory}: {wrong}, so what {url} draws for forge stays there"
            yield warning(what, "mount ComfyUI's directory there, writable, or set FORGE_COMFYUI_DIRS right")


def _away(url: str, why: str) -> str:
    return why if why.startswith(url) else f"{url}: {why}"


def workers(facts: Facts) -> Verdicts:
    absent = list(_absent(facts))
    for role, why in absent:
        yield failure(f"{why}: no worker with the role {role}", f"`forge worker --roles {role}`")
    if not absent:
        yield ok("each role that can be heard is at work")


def _absent(facts: Facts) -> Iterator[tuple[str, str]]:
    """Roles that nobody has, and how that shows."""
    samples, scan = seen(facts.samples), facts.settings.scan_seconds
    if _takes_work(facts) and _deserted(facts, f"{DISPATCH}.{GENERATION}"):
        yield "generation", "nobody asks for orders"
    if _deserted(facts, f"{EVENTS}.{CLEANUP}"):
        yield "cleanup", "nobody asks what to remove"
    if samples.age is None or samples.age > SCANS * scan + CLOCK_WARNING.total_seconds():
        yield "scheduler", "no samples are taken"
    if _undispatched(facts):
        yield "dispatcher", "jobs wait although a place is free"


def _takes_work(facts: Facts) -> bool:
    """Whether a worker that is there would ask for orders: with room and memory."""
    room = facts.volume
    return (
        not isinstance(room, Away)
        and room.disk is not None
        and not rules.full(room.disk, facts.lines)
        and not memory_rules.short(facts.memory, facts.settings.memory_shed_ratio)
    )


def _deserted(facts: Facts, consumer: str) -> bool:
    found = next((of.info for of in seen(facts.standings) if of.path == consumer), None)
    return found is not None and not found["num_waiting"] and not found["num_ack_pending"]


def _undispatched(facts: Facts) -> bool:
    if isinstance(facts.line, Away) or isinstance(facts.positions, Away):
        return False  # told already
    if any(at.stuck for at in facts.positions.values()):
        return False  # the tables do not tell of now
    orders = facts.stream(DISPATCH)
    free = orders["state"]["messages"] < orders["config"]["max_msgs"]
    return free and facts.line.pending > 0 and facts.line.oldest > WAITED_SECONDS


def api(facts: Facts) -> Verdicts:
    answer = facts.api
    if isinstance(answer, Away) and facts.settings.port == 0 and facts.dev_url is None:
        yield Level.SKIPPED, "FORGE_PORT is 0: nobody can say where the API is", ""
    elif isinstance(answer, Away):
        yield warning(answer.why, "`forge api`, or say where it is with FORGE_HOST and FORGE_PORT")
    elif not answer.is_forge:
        what = f"{answer.url} answers, and is no forge: the port is taken"
        yield failure(what, "give the API another FORGE_PORT, or stop what listens there")
    else:
        wrong = {name: why for name, why in answer.wrong.items() if not _explained(name, facts)}
        for name, why in wrong.items():
            what = f"the API at {answer.url} is not ready: {name}: {why}"
            yield failure(what, "see `/readyz` in docs/RUNBOOK.md; has it the same settings as this shell?")
        if not wrong:
            yield ok(
                f"an API serves at {answer.url}" + (", as far as the rest allows" if answer.wrong else "")
            )


def _explained(name: str, facts: Facts) -> bool:
    """Whether another finding tells why a check of the API's own fails."""
    room = facts.volume
    lost = isinstance(room, Away) or not room.marker
    match name:
        case "log":
            return isinstance(facts.standings, Away) or facts.missing(EVENTS)
        case "database":
            return isinstance(facts.postgres, Away) or (
                not isinstance(facts.applied, Away)
                and len(facts.applied.checksums) != len(facts.applied.known)
            )
        case "store":
            return lost
        case "disk":
            return lost or (
                not isinstance(room, Away) and room.disk is not None and rules.full(room.disk, facts.lines)
            )
        case "memory":
            return memory_rules.short(facts.memory, facts.settings.memory_shed_ratio)
        case "log_whole":
            return isinstance(facts.nats, Away) or isinstance(facts.postgres, Away) or facts.damage != ""
    return False
