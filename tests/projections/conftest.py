"""A pool on the test's own, migrated database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from forge import database


@pytest.fixture
async def pool(database_dsn: str) -> AsyncIterator[database.Pool]:
    async with database.opened(database_dsn) as pool:
        yield pool
