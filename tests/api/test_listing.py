"""`forge jobs` and `forge assets` show what the API shows, whatever the filter and however long the list."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from uuid import UUID

import httpx
import msgspec
import pytest

from api.making import completed, failed, started
from api.serving import Served
from factories import Log, job_id, submitted
from folding import fold
from forge import database, listing
from forge.domain.jobs import Status
from forge.errors import NotFound
from forge.projections import asset_lists, queue
from forge.settings import Settings

ASK = {"job_type": "ui_icon", "params": {}}


async def everything(found: AsyncIterator[Any]) -> list[Any]:
    return [json.loads(msgspec.json.encode(one)) async for one in found]


async def asked(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    return (await client.post("/jobs", json=ASK | more)).raise_for_status().json()  # type: ignore[no-any-return]


async def at_the_end(served: Served, client: httpx.AsyncClient, path: str, **query: Any) -> list[Any]:
    """What the API lists when everything that happened is in the tables."""
    query["min_seq"] = await served.parts.store.head()
    answer = (await client.get(path, params=query)).raise_for_status().json()
    items: list[Any] = answer["items"]
    return items


async def test_jobs_by_any_filter_are_those_of_the_api(
    served: Served, settings: Settings, mei: httpx.AsyncClient, lan: httpx.AsyncClient
) -> None:
    one = await asked(mei, session_id="s-1", character_id="c-1")
    two = await asked(lan, job_type="fate_card", params={"prompt": "a crane"})
    three = await asked(mei, priority=2)
    await completed(served.parts, "mei", one)
    await failed(served.parts, "lan", two)
    async with served.client() as operator:
        told = await at_the_end(served, operator, "/queue", status=list(Status))
    assert [job["id"] for job in told] == [three["id"], two["id"], one["id"]]

    async def ids(user: str | None = None, limit: int | None = None, **wanted: Any) -> list[Any]:
        found = await everything(listing.jobs(settings, user, queue.Wanted(**wanted), limit))
        assert all(job | {"position": None} in [t | {"position": None} for t in told] for job in found)
        return [job["id"] for job in found]

    assert await ids() == [three["id"], two["id"], one["id"]]
    assert await ids(limit=2) == [three["id"], two["id"]]
    assert await ids("mei") == [three["id"], one["id"]]
    assert await ids(statuses=(Status.FAILED, Status.COMPLETED)) == [two["id"], one["id"]]
    assert await ids(job_type="fate_card") == [two["id"]]
    assert await ids(session_id="s-1") == await ids(character_id="c-1") == [one["id"]]
    assert await ids(batch_id=UUID(int=1)) == []
    made = datetime.fromisoformat(two["created_at"])
    assert await ids(created_after=made) == [three["id"]]
    assert await ids(created_before=made) == [one["id"]]


async def test_a_list_of_many_pages_has_every_job_once(
    database_dsn: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log()
    for number in range(1, 12):
        log.add(submitted(job_id(number)), at=None if number % 3 else log.records[-1].meta.at)
    async with database.opened(database_dsn) as pool, pool.acquire() as connection:
        await fold(connection, log.records, (11,))
    monkeypatch.setattr(listing, "PAGE", 3)
    for limit in (None, 12, 11, 9, 7, 3, 1):
        found = await everything(listing.jobs(settings, None, queue.Wanted(), limit))
        expected = sorted(map(str, map(job_id, range(1, 12))), reverse=True)[:limit]
        assert sorted((job["id"] for job in found), reverse=True) == expected
        assert [job["created_at"] for job in found] == sorted((j["created_at"] for j in found), reverse=True)


async def test_assets_by_any_filter_are_those_of_the_api(
    served: Served, settings: Settings, mei: httpx.AsyncClient, lan: httpx.AsyncClient
) -> None:
    one = await asked(mei, session_id="s-1", character_id="c-1")
    two = await asked(lan)
    await completed(served.parts, "mei", one, size=300)
    await completed(served.parts, "lan", two, color="#aa0000", size=600, category="monk")
    theirs = await at_the_end(served, lan, "/assets")
    async with served.client() as operator:
        told = await at_the_end(served, operator, "/assets")

    async def found(user: str | None = None, order: str = "-created_at", **wanted: Any) -> list[Any]:
        return await everything(listing.assets(settings, user, asset_lists.Wanted(**wanted), order, None))

    assert await found() == told
    assert await found("lan") == theirs
    assert await found(order="-file_size_bytes") == sorted(told, key=lambda a: -a["file_size_bytes"])
    assert await found(category="monk") == [told[0]]
    assert await found(character_id="c-1") == await found(session_id="s-1") == [told[1]]


async def test_one_is_shown_with_its_history_as_the_api_tells_it(
    served: Served, settings: Settings, mei: httpx.AsyncClient
) -> None:
    job = await asked(mei)
    await failed(served.parts, "mei", job)
    again = await mei.post(f"/jobs/{job['id']}/retry")
    assert again.status_code == 202, again.text
    await completed(served.parts, "mei", job)
    [asset] = await at_the_end(served, mei, "/assets")
    for path, telling in (
        (f"/jobs/{job['id']}", listing.job(settings, UUID(job["id"]))),
        (f"/assets/{asset['id']}", listing.asset(settings, UUID(asset["id"]))),
    ):
        told = json.loads(msgspec.json.encode(await telling))
        assert told["now"] == (await mei.get(path)).json()
        assert told["history"] == (await mei.get(f"{path}/history")).json()["items"]

    await mei.delete(f"/assets/{asset['id']}")
    await at_the_end(served, mei, "/assets")
    gone = await listing.asset(settings, UUID(asset["id"]))
    assert gone.now is None
    assert gone.history[-1].type == "asset.deleted"
    with pytest.raises(NotFound):
        await listing.asset(settings, UUID(int=1))
    with pytest.raises(NotFound):
        await listing.job(settings, UUID(int=1))


async def forge(settings: Settings, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FORGE_")}
    environ |= {"FORGE_NATS_URL": settings.nats_url, "FORGE_POSTGRES_DSN": settings.postgres_dsn}
    command = [sys.executable, "-m", "forge", *words]
    return await asyncio.to_thread(
        subprocess.run, command, env=environ, capture_output=True, text=True, timeout=100, check=False
    )


async def test_the_commands_print_lines_or_json_and_say_where_there_is_more(
    served: Served, settings: Settings, mei: httpx.AsyncClient
) -> None:
    first = await asked(mei)
    job = await asked(mei)
    await started(served.parts, "mei", job)
    await at_the_end(served, mei, "/queue")
    listed = await forge(settings, "jobs", "--status", "running", "--limit", "1", "--since", "1h ago")
    assert listed.returncode == 0, listed.stderr
    header, line = listed.stdout.splitlines()
    assert header.split()[:2] == ["ID", "STATUS"]
    assert line.split()[:4] == [job["id"], "running", "ui_icon", "mei"]
    assert listed.stderr == "forge: 1 jobs, there may be more: --limit N, or --all\n"
    every = await forge(settings, "jobs", "--json", "--all", "--limit", "1")
    assert [json.loads(line)["id"] for line in every.stdout.splitlines()] == [job["id"], first["id"]]
    assert every.stderr == ""
    shown = await forge(settings, "jobs", "show", job["id"])
    assert "job.started" in shown.stdout
    unknown = await forge(settings, "assets", "show", str(UUID(int=1)))
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("forge: there is no asset")
