"""What the facts mean. Each check is a function in ``CHECKS``; it tells one cause once: what lies behind a
server that is away is not looked at, and not a finding of its own."""

from __future__ import annotations

from forge.doctor.checks import configured, log, machine, serving, tables
from forge.doctor.facts import Away, Facts, Unseen
from forge.doctor.findings import Check, Finding, Level

CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        configured.settings,
        configured.job_types,
        log.nats,
        log.streams,
        log.log,
        tables.postgres,
        tables.tables,
        tables.projections,
        machine.clocks,
        machine.volume,
        machine.disk,
        machine.leftovers,
        serving.comfyui,
        serving.workers,
        serving.api,
        configured.keys,
        machine.memory,
    )
}


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
