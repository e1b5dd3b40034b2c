"""Empty tables that only one connection sees and that go with it: for the past, which nobody keeps.

They are made like the ones in use and hide them by Postgres' own rule that temporary tables are found first,
so the ordinary handlers and queries work on them unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

from forge.database import Connection
from forge.projections.projection import Projection

# What finds rows quickly is not worth its upkeep for one question; what forbids doubles is.
_NEEDLESS = """
select c.oid::regclass::text from pg_index i
join pg_class c on c.oid = i.indexrelid
where i.indrelid = ('pg_temp.' || quote_ident($1))::regclass and not i.indisunique
"""


async def hide(connection: Connection, projections: Sequence[Projection]) -> None:
    """Put empty tables before those of some projections, for this connection alone."""
    names = [table.name for projection in projections for table in projection.tables]
    for name in ("projection_checkpoint", *names):
        await connection.execute(f"create temporary table {name} (like {name} including all)")
        for row in await connection.fetch(_NEEDLESS, name):
            await connection.execute(f"drop index {row[0]}")
