"""Folding events into the tables by hand, and looking at everything that stands there."""

from __future__ import annotations

from collections.abc import Sequence

from forge.database import Connection
from forge.events.envelope import Recorded
from forge.projections.inventory import inventory
from forge.projections.projection import Projection, advance
from forge.projections.queue import queue
from forge.projections.stats import stats
from forge.projections.uploads import uploads

ALL = (queue, inventory, stats, uploads)


async def fold(
    connection: Connection,
    records: Sequence[Recorded],
    sizes: Sequence[int] = (1,),
    projections: Sequence[Projection] = ALL,
) -> None:
    """Take the events in, in batches of these sizes over and over."""
    positions = {projection.name: await projection.position(connection) for projection in projections}
    begun = nth = 0
    while begun < len(records):
        size = sizes[nth % len(sizes)]
        positions = await advance(connection, projections, records[begun : begun + size], positions)
        begun, nth = begun + size, nth + 1


async def tables(connection: Connection, projections: Sequence[Projection] = ALL) -> dict[str, list[str]]:
    """Every row of every table as Postgres writes it, and the checkpoints."""
    names = [table.name for projection in projections for table in projection.tables]
    return {
        name: [row[0] for row in await connection.fetch(f"select t::text from {name} t order by 1")]
        for name in [*names, "projection_checkpoint"]
    }
