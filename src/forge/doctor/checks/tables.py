"""Postgres, its migrations, and how far projections are."""

from __future__ import annotations

from forge.doctor.facts import Away, Facts, seen
from forge.doctor.findings import Verdicts, dotted, failure, ok, warning


def postgres(facts: Facts) -> Verdicts:
    if isinstance(facts.postgres, Away):
        yield failure(facts.postgres.why, "start Postgres, or point FORGE_POSTGRES_DSN at the one that runs")
    else:
        yield ok(f"Postgres {dotted(facts.postgres.version)}")


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
    stuck = {name: at for name, at in positions.items() if at.stuck}
    if stuck:
        behind = max(at.head - at.later for at in stuck.values())
        yield failure(
            f"{', '.join(stuck)}: {behind} events behind the log and not moving",
            "`forge worker --roles projector`; where one runs, its log names the event that stops it",
        )
    else:
        lag = max((at.head - at.later for at in positions.values()), default=0)
        yield ok(f"{lag} events behind the log, and moving" if lag > 0 else "up to date with the log")
