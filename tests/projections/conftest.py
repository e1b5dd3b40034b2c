"""A pool on the test's own, migrated database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from forge import database
from forge.projections import reading


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at the tables may take as long as a busy machine does for many of them."""
    monkeypatch.setattr(reading, "SECONDS", 60.0)


@pytest.fixture
async def pool(database_dsn: str) -> AsyncIterator[database.Pool]:
    async with database.opened(database_dsn) as pool:
        yield pool
