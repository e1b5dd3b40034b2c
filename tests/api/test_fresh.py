"""A list of tables that tell of nothing, while the log does of something, would be a lie."""

from __future__ import annotations

import pytest

from api.serving import Serve
from forge.api import fresh


async def test_tables_that_tell_of_nothing_are_not_listed(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fresh, "_MISSING_SECONDS", 0.3)
    served = await serve(projecting=False)
    async with served.client("mei") as mei:
        assert (await mei.get("/queue")).json()["items"] == [], "nothing is what the log tells, too"
        answer = await mei.post("/jobs", json={"job_type": "ui_icon", "params": {}})
        assert answer.status_code == 202
        for path in ("/queue", "/assets", "/stats"):
            answer = await mei.get(path)
            assert answer.status_code == 503, path
            assert answer.headers["retry-after"]
            assert "made from the log" in answer.json()["detail"]
        assert (await mei.post("/jobs", json={"job_type": "ui_icon", "params": {}})).status_code == 202


async def test_an_emptied_database_is_503_and_takes_jobs(serve: Serve) -> None:
    served = await serve(projecting=False)
    async with served.client("mei") as mei:
        await served.parts.pool.execute("drop schema public cascade")
        for path in ("/queue", "/assets", "/stats", "/usage"):
            answer = await mei.get(path)
            assert (answer.status_code, answer.json()["code"]) == (503, "tables_missing"), path
            assert answer.headers["retry-after"]
        assert (await mei.post("/jobs", json={"job_type": "ui_icon", "params": {}})).status_code == 202
