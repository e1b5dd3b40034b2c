"""What the facts mean. Each check is a function in ``CHECKS``; it tells one cause once: what lies behind a
server that is away is not looked at, and not a finding of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from enum import StrEnum
from typing import Any

import msgspec

from forge.comfyui.nodes import lacking
from forge.comfyui.workflows import Workflow
from forge.doctor.facts import Away, Facts, Position, Unseen, seen
from forge.domain import disk as rules
from forge.domain import memory as memory_rules
from forge.domain.retention import TOLERANCE
from forge.store import MARKER
from forge.topology import CLEANUP, DISPATCH, EVENTS, GENERATION

Verdict = tuple["Level", str, str]
"""Level, what was found, remedy."""

Verdicts = Iterator[Verdict]
Check = Callable[[Facts], Verdicts]

CLOCK_WARNING = timedelta(seconds=5)
LEAST_SECRET = 16
"""Characters of a bootstrap key; less can be tried out."""

SCANS = 3
"""A scheduler that said nothing for so many scans is not there."""

WAITED_SECONDS = 30.0
"""Of a job whose turn could come, with a place free: nobody gives orders."""

NATS_AT_LEAST = (2, 12)
"""Atomic batches came with it."""


class Level(StrEnum):
    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    FAILURE = "failure"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check has to say, and for what is wrong the command or act that mends it."""

    check: str
    level: Level
    found: str
    remedy: str = ""


def judge(facts: Facts) -> list[Finding]:
    """Every finding, in the order of ``CHECKS``."""
    return [finding for name, look in CHECKS.items() for finding in _checked(name, look, facts)]


def _checked(name: str, look: Check, facts: Facts) -> list[Finding]:
    told = []
    try:
        for level, found, remedy in look(facts):
            told.append(Finding(check=name, level=level, found=found, remedy=remedy))
    except Unseen as unseen:
        told.append(_unseen(name, unseen.away))
    return told


def _unseen(name: str, away: Away) -> Finding:
    if away.behind:
        return Finding(check=name, level=Level.SKIPPED, found=f"not looked at, because of: {away.behind}")
    remedy = "run `forge doctor` again; if it stays, look at the log of the server that gave no answer"
    return Finding(check=name, level=Level.FAILURE, found=away.why, remedy=remedy)


def ok(found: str) -> Verdict:
    return Level.OK, found, ""


def warning(found: str, remedy: str) -> Verdict:
    return Level.WARNING, found, remedy


def failure(found: str, remedy: str) -> Verdict:
    return Level.FAILURE, found, remedy


# ------------------------------------------------------------------- settings


def settings(facts: Facts) -> Verdicts:
    for wrong in facts.invalid:
        name = wrong.partition("=")[0]
        yield failure(wrong, f"give {name} another value, or none; `forge settings` tells what it means")
    for name, meant in facts.strange.items():
        said = f"rename it to {meant}" if meant else "unset it"
        yield warning(f"{name} is no setting of forge", f"{said}; `forge settings` lists all there are")
    if not facts.invalid and not facts.strange:
        yield ok("every variable can be used")


def job_types(facts: Facts) -> Verdicts:
    if isinstance(facts.job_types, Away):
        remedy = "mend the files it names (docs/JOB_TYPES.md); forge does not start so"
        yield failure(facts.job_types.why, remedy)
        return
    lacks = list(_lacks(facts, facts.job_types))
    for url, what in sorted({(url, what) for url, _, what in lacks}):
        names = ", ".join(name for at, name, it in lacks if (at, it) == (url, what))
        yield failure(
            f"{names} cannot be drawn at {url}: {what}",
            "put it into that ComfyUI, or name one that it has (FORGE_MODELS, or the job type's own files)",
        )
    if not lacks:
        yield ok(", ".join(facts.job_types))


def _lacks(facts: Facts, workflows: Mapping[str, Workflow]) -> Iterator[tuple[str, str, str]]:
    """Address of a ComfyUI that is there, job type, and what is not there for it."""
    for url, info in facts.nodes.items():
        if isinstance(info, Away):
            continue
        for name, workflow in workflows.items():
            slots = {target for param in workflow.params.values() for target in param.targets}
            yield from ((url, name, what) for what in lacking(workflow.graph, info, slots))


# ------------------------------------------------------------------------ log


def nats(facts: Facts) -> Verdicts:
    server = facts.nats
    if isinstance(server, Away):
        remedy = "start nats-server with nats/nats-server.conf, or point FORGE_NATS_URL at the one that runs"
        yield failure(server.why, server.remedy or remedy)
        return
    said = f"nats-server {_dotted(server.version)} at {server.where}"
    tested = _dotted(facts.tested_nats)
    if server.version < NATS_AT_LEAST:
        yield failure(f"{said} knows no atomic batches", f"run nats-server {tested}")
    elif server.version[:2] < facts.tested_nats[:2]:
        yield warning(f"{said} is older than what forge is tested with", f"run nats-server {tested}")
    else:
        yield ok(said)


def streams(facts: Facts) -> Verdicts:
    standings = seen(facts.standings)
    wrong = False
    for of in standings:
        if of.info is None and not (of.path == EVENTS and facts.damage):
            wrong = True
            yield failure(f"{of.path} is missing", "`forge setup` makes it")
        elif of.differs:
            wrong = True
            what = f"{of.path} differs from its file under nats/ in {', '.join(of.differs)}"
            yield failure(what, "`forge setup` brings it back, or says why the server refuses")
    if not wrong:
        yield ok(f"{len(standings)} streams and consumers are as their files say")


def log(facts: Facts) -> Verdicts:
    damage = seen(facts.damage)
    if damage:
        remedy = (
            "stop forge, then docs/RUNBOOK.md, `the log is not whole`; `forge setup` refuses, and rightly"
        )
        yield failure(damage, remedy)
        return
    ends = seen(facts.ends)
    for what in ends.unreadable:
        yield failure(
            f"{what}: nothing behind it reaches the tables",
            "it needs a forge that can read it; where it came from outside, restore the log from before it",
        )
    if not ends.unreadable:
        yield ok(f"{_info(facts, EVENTS)['state']['last_seq']} events, whole as far as Postgres remembers")


# --------------------------------------------------------------------- tables


def postgres(facts: Facts) -> Verdicts:
    if isinstance(facts.postgres, Away):
        yield failure(facts.postgres.why, "start Postgres, or point FORGE_POSTGRES_DSN at the one that runs")
    else:
        yield ok(f"Postgres {_dotted(facts.postgres.version)}")


def tables(facts: Facts) -> Verdicts:
    applied = seen(facts.applied)
    known = {migration.number: migration for migration in applied.known}
    lacking = [m.name for number, m in known.items() if number not in applied.checksums]
    newer = sorted(applied.checksums.keys() - known.keys())
    changed = [
        m.name for n, m in known.items() if n in applied.checksums and applied.checksums[n] != m.checksum
    ]
    if newer:
        what = f"the database is at migration {newer[-1]}, this forge knows {len(known)}"
        yield failure(what, "run the newer forge")
    if lacking:
        yield failure(f"not applied: {', '.join(lacking)}", "`forge setup` applies them")
    for name in changed:
        what = f"{name} is not the file that was applied"
        yield failure(what, "put the released file back; what is to change is a new migration")
    if not applied.trigrams and not lacking:
        yield warning(
            "Postgres has no trigrams, so searches read all rows",
            "as its administrator: create extension pg_trgm; create index concurrently "
            "asset_inventory_search on asset_inventory using gin (search gin_trgm_ops)",
        )
    if not newer and not lacking and not changed and applied.trigrams:
        yield ok(f"{len(known)} migrations are applied")


def projections(facts: Facts) -> Verdicts:
    positions = seen(facts.positions)
    stuck = {name: at for name, at in positions.items() if _stuck(at)}
    if stuck:
        behind = max(at.head - at.later for at in stuck.values())
        yield failure(
            f"{', '.join(stuck)}: {behind} events behind the log and not moving",
            "`forge worker --roles projector`; where one runs, its log names the event that stops it",
        )
    else:
        lag = max((at.head - at.later for at in positions.values()), default=0)
        yield ok(f"{lag} events behind the log, and moving" if lag > 0 else "up to date with the log")


# --------------------------------------------------------------------- clocks


def clocks(facts: Facts) -> Verdicts:
    servers = {"NATS": facts.nats_clock, "Postgres": facts.postgres_clock}
    ahead = {name: by for name, by in servers.items() if not isinstance(by, Away)}
    if not ahead:
        seen(facts.nats_clock)
    far = {name: by for name, by in ahead.items() if abs(by) > CLOCK_WARNING}
    if not far:
        yield ok(f"this machine's agrees with that of {' and '.join(ahead)}")
        return
    own = len(far) == len(servers) and max(far.values()) - min(far.values()) <= CLOCK_WARNING
    what = ", ".join(
        f"that of {name} is {by.total_seconds():+.0f} s from this machine's" for name, by in far.items()
    )
    remedy = f"set the clock of {'this machine' if own else 'one of them'} right (NTP)"
    if max(map(abs, far.values())) > TOLERANCE:
        yield failure(f"{what}: nothing is deleted while clocks differ by over 5 minutes", remedy)
    else:
        yield warning(what, remedy)


# ----------------------------------------------------------------------- disk


def volume(facts: Facts) -> Verdicts:
    there = seen(facts.volume)
    begun = False if isinstance(facts.begun, Away) else facts.begun
    if not there.marker and begun:
        yield failure(
            f"{there.root} is not the asset volume: there is no {MARKER}, and the log knows of pictures",
            f"mount the volume at {there.root} (FORGE_DATA_DIR); never make the marker by hand",
        )
    elif not there.marker:
        yield ok(f"{there.root} is not in use yet; the first start makes it")
    elif not there.writable:
        yield failure(f"this account may not write in {there.root}", f"chown -R of {there.root} to it")
    else:
        yield ok(str(there.root))


def disk(facts: Facts) -> Verdicts:
    there = seen(facts.volume).disk
    if there is None:
        return
    lines = _lines(facts)
    rank = rules.rank(there, lines)
    used = f"{there.used / 1e9:.1f} of {there.limit / 1e9:.1f} GB are in use ({there.ratio:.0%})"
    room = "make room or raise FORGE_DISK_LIMIT_BYTES; `forge cleanup --dry-run` shows what may go"
    if rank == rules.FULL:
        yield failure(
            f"the asset volume is full: {used}, {there.free / 1e6:.0f} MB are free; no work is taken", room
        )
    elif rank == rules.CLEAN:
        yield warning(f"over the line where clean-ups start: {used}", room)
    elif rank == rules.WARN:
        yield warning(used, room)
    else:
        yield ok(used)


def leftovers(facts: Facts) -> Verdicts:
    there, samples = seen(facts.volume), facts.samples
    stuck = 0 if isinstance(samples, Away) else samples.stuck
    if there.temporary:
        yield warning(
            f"{there.temporary} working files of dead processes in {there.root / 'tmp'}",
            "`forge cleanup --reason temporary`; the role scheduler does it by itself",
        )
    if stuck:
        yield warning(
            f"{stuck} folders at ComfyUI cannot be removed",
            "let the worker's account write in output/forge and input/forge of FORGE_COMFYUI_DIRS",
        )
    if not there.temporary and not stuck:
        yield ok("none")


# -------------------------------------------------------------------- ComfyUI


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


# ------------------------------------------------------------ roles of workers


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
        and not rules.full(room.disk, _lines(facts))
        and not memory_rules.short(facts.memory, facts.settings.memory_shed_ratio)
    )


def _deserted(facts: Facts, consumer: str) -> bool:
    found = next((of.info for of in seen(facts.standings) if of.path == consumer), None)
    return found is not None and not found["num_waiting"] and not found["num_ack_pending"]


def _undispatched(facts: Facts) -> bool:
    if isinstance(facts.line, Away) or isinstance(facts.positions, Away):
        return False  # told already
    if any(map(_stuck, facts.positions.values())):
        return False  # the tables do not tell of now
    orders = _info(facts, DISPATCH)
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
            return isinstance(facts.standings, Away) or _missing(facts, EVENTS)
        case "database":
            return isinstance(facts.postgres, Away) or (
                not isinstance(facts.applied, Away)
                and len(facts.applied.checksums) != len(facts.applied.known)
            )
        case "store":
            return lost
        case "disk":
            return lost or (
                not isinstance(room, Away) and room.disk is not None and rules.full(room.disk, _lines(facts))
            )
        case "memory":
            return memory_rules.short(facts.memory, facts.settings.memory_shed_ratio)
        case "log_whole":
            return isinstance(facts.nats, Away) or isinstance(facts.postgres, Away) or facts.damage != ""
    return False


def keys(facts: Facts) -> Verdicts:
    if any(wrong.startswith("FORGE_API_KEYS") for wrong in facts.invalid):
        seen(Away("FORGE_API_KEYS cannot be used", behind="settings"))
    bootstrap = facts.settings.api_keys
    weak = [f"{key.role}:{key.user}" for key in bootstrap if len(key.secret) < LEAST_SECRET]
    if weak:
        yield warning(
            f"bootstrap keys that can be guessed: {', '.join(weak)}",
            f"in FORGE_API_KEYS take secrets of at least {LEAST_SECRET} random characters, or no such keys",
        )
    good = [key for key in seen(facts.keys) if key.revoked_at is None]
    if not bootstrap and not good and facts.dev_url is None:
        yield failure(
            "there is no key, so nobody may use the API", "`forge keys create --role operator --user NAME`"
        )
    elif bootstrap and any(key.role == "operator" for key in good):
        yield warning(
            f"{len(bootstrap)} bootstrap keys are open beside those of the log, and cannot be revoked",
            "unset FORGE_API_KEYS and restart every API",
        )
    elif not weak:
        yield ok(f"{len(good)} in the log, {len(bootstrap)} of FORGE_API_KEYS")


def memory(facts: Facts) -> Verdicts:
    bounds = [bound for bound in facts.memory if bound.name != "process"]
    tightest = memory_rules.tightest(bounds)
    used = f"the {tightest.name} uses {tightest.used / 1e9:.1f} of {tightest.limit / 1e9:.1f} GB"
    if memory_rules.short(bounds, facts.settings.memory_shed_ratio):
        yield failure(f"{used}: no work is taken", "end what takes it, or give the machine or container more")
    else:
        yield ok("enough")


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        settings,
        job_types,
        nats,
        streams,
        log,
        postgres,
        tables,
        projections,
        clocks,
        volume,
        disk,
        leftovers,
        comfyui,
        workers,
        api,
        keys,
        memory,
    )
}


def _stuck(at: Position) -> bool:
    return at.later < at.head and at.later == at.seq


def _info(facts: Facts, path: str) -> dict[str, Any]:
    """What the server says of a stream.

    Raises:
        Unseen: there is none.
    """
    found = next((of.info for of in seen(facts.standings) if of.path == path), None)
    return seen(found or Away(f"no stream {path}", behind="streams"))


def _missing(facts: Facts, path: str) -> bool:
    return not isinstance(facts.standings, Away) and any(
        of.path == path and of.info is None for of in facts.standings
    )


def _lines(facts: Facts) -> rules.Lines:
    s = facts.settings
    return rules.Lines(s.disk_warn_ratio, s.disk_clean_ratio, s.disk_reserve_bytes)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
