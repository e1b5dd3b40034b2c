"""Clocks, asset volume and memory."""

from __future__ import annotations

from datetime import timedelta

from forge.doctor.facts import AssetVolume, Away, Facts, seen
from forge.doctor.findings import Verdicts, failure, ok, warning
from forge.domain import disk as rules
from forge.domain import memory as memory_rules
from forge.domain.retention import TOLERANCE
from forge.store import MARKER

CLOCK_WARNING = timedelta(seconds=5)


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


def volume(facts: Facts) -> Verdicts:
    there = facts.volume
    if isinstance(there, Away):
        yield failure(
            there.why, f"mount {facts.settings.assets_dir} (FORGE_DATA_DIR), and let this account in"
        )
        return
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


def _seen_volume(facts: Facts) -> AssetVolume:
    """For those that are not to tell why it could not be looked at: `volume` does."""
    there = facts.volume
    return seen(Away(there.why, behind="volume") if isinstance(there, Away) else there)


def disk(facts: Facts) -> Verdicts:
    there = _seen_volume(facts).disk
    if there is None:
        return
    lines = facts.lines
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
    there, samples = _seen_volume(facts), facts.samples
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


def memory(facts: Facts) -> Verdicts:
    bounds = [bound for bound in facts.memory if bound.name != "process"]
    tightest = memory_rules.tightest(bounds)
    used = f"the {tightest.name} uses {tightest.used / 1e9:.1f} of {tightest.limit / 1e9:.1f} GB"
    if memory_rules.short(bounds, facts.settings.memory_shed_ratio):
        yield failure(f"{used}: no work is taken", "end what takes it, or give the machine or container more")
    else:
        yield ok("enough")
