"""Clean-ups and pins over HTTP: what is shown, what goes, who may."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgspec
import pytest

from api.serving import Serve, Served
from api.test_assets import made
from forge.domain.retention import BRAKE_FREE
from forge.events.assets import AssetDamaged, AssetLost
from forge.events.cleanup import CleanupRequested
from forge.settings import ApiKey, Settings
from forge.topology import ALL_FAULTS
from forge.workers.cleanup import Cleanup
from waiting import wait_until


async def clean(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/assets/cleanup", json=body)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def expire(served: Served, *assets: dict[str, Any]) -> None:
    """The tables say that these are over since an hour."""
    await served.parts.pool.execute(
        "update asset_reference set expires_at = $1 where asset_id = any($2::uuid[])",
        datetime.now(UTC) - timedelta(hours=1),
        [asset["id"] for asset in assets],
    )


async def gone(client: httpx.AsyncClient, asset: dict[str, Any]) -> bool:
    return (await client.get(f"/assets/{asset['id']}")).status_code == 404


@pytest.fixture
async def cleaning(served: Served) -> Any:
    """The cleanup role beside the API."""
    stop = asyncio.Event()
    task = asyncio.create_task(Cleanup(served.parts.retention, 0.0).run(stop))
    yield
    stop.set()
    await asyncio.wait_for(task, 60)


async def test_a_dry_run_shows_and_takes_nothing(
    served: Served, mei: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    due, kept = await made(served, mei), await made(served, mei, color="#112233")
    await expire(served, due)
    head = await served.parts.store.head()
    shown = await clean(operator, dry_run=True)
    size = due["file_size_bytes"]
    assert shown | {"of": 2, "id": None, "seq": None} == {
        "dry_run": True,
        "held": False,
        "assets": 1,
        "bytes": size,
        "of": 2,
        "by_reason": {"expired": {"assets": 1, "bytes": size}},
        "by_type": {"fate_card": {"assets": 1, "bytes": size}},
        "id": None,
        "seq": None,
    }
    assert await served.parts.store.head() == head
    assert not await gone(mei, kept)


async def test_what_is_shown_goes_with_its_file(
    served: Served, mei: httpx.AsyncClient, operator: httpx.AsyncClient, cleaning: None
) -> None:
    due, kept = await made(served, mei), await made(served, mei, color="#112233")
    await expire(served, due)
    told = await clean(operator)
    assert (told["assets"], told["held"]) == (1, False)
    await wait_until(lambda: gone(mei, due), what="the asset is gone")
    path = served.parts.blobs.path(due["content_hash"], "png")
    await wait_until(lambda: not path.exists(), what="its file is gone")
    assert (await mei.get(f"/assets/{kept['id']}/file")).status_code == 200
    asked = await served.parts.store.at(told["seq"])
    assert asked is not None
    assert isinstance(asked.event, CleanupRequested)
    assert (asked.meta.actor, str(asked.event.request_id)) == ("operator:dev", told["id"])


async def test_a_player_cleans_up_among_own_things_only(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient, cleaning: None
) -> None:
    mine = await made(served, mei)
    others = await made(served, lan, "lan", color="#112233")
    shared = [
        await made(served, client, user, color="#445566") for client, user in ((mei, "mei"), (lan, "lan"))
    ]
    await expire(served, mine, others, *shared)
    told = await clean(mei)
    assert told["by_reason"].keys() == {"expired"}
    assert told["assets"] == 2
    await wait_until(lambda: gone(mei, mine))
    await wait_until(lambda: gone(mei, shared[0]))
    assert not await gone(lan, others)
    assert (await lan.get(f"/assets/{shared[1]['id']}/file")).status_code == 200


@pytest.mark.parametrize("reason", ["evicted", "lost", "damaged", "orphaned", "temporary"])
async def test_only_an_operator_sees_to_the_volume(mei: httpx.AsyncClient, reason: str) -> None:
    answer = await mei.post("/assets/cleanup", json={"reasons": [reason], "dry_run": True})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


async def test_old_things_go_by_age_and_type(served: Served, mei: httpx.AsyncClient) -> None:
    await made(served, mei)
    await made(served, mei, job_type="ui_icon", color="#112233")
    assert (await clean(mei, dry_run=True))["assets"] == 0
    assert (await clean(mei, dry_run=True, older_than_seconds=3600))["assets"] == 0
    assert (await clean(mei, dry_run=True, older_than_seconds=0))["by_reason"]["old"]["assets"] == 2
    shown = await clean(mei, dry_run=True, older_than_seconds=0, asset_type="ui_icon")
    assert shown["by_type"].keys() == {"ui_icon"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"reasons": ["boredom"]}, "reasons[0]"),
        ({"reasons": []}, "reasons"),
        ({"reasons": ["old"]}, "older_than_seconds"),
        ({"older_than_seconds": -1}, "older_than_seconds"),
        ({"older_than_seconds": 10**12}, "older_than_seconds"),
        ({"asset_type": "a\u0000b"}, "asset_type"),
        ({"confirm": "all"}, "confirm"),
        ({"everything": True}, "everything"),
    ],
    ids=str,
)
async def test_what_is_not_acceptable_is_named(
    operator: httpx.AsyncClient, body: dict[str, Any], field: str
) -> None:
    answer = await operator.post("/assets/cleanup", json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["field"] == field


async def test_much_at_once_waits_for_its_number(
    served: Served, mei: httpx.AsyncClient, operator: httpx.AsyncClient, cleaning: None
) -> None:
    number = BRAKE_FREE + 1
    assets = [
        await made(served, mei, color=f"#{nth:06x}", size=32) if nth else await made(served, mei, size=32)
        for nth in range(2)
    ]
    source = assets[0]
    # more of them than ten queued jobs allow, as the projector would write them
    await served.parts.pool.execute(
        """insert into asset_inventory (id, asset_type, file_path, file_size_bytes, format, width, height,
             content_hash, pixel_hash, dominant_color, generation_params, created_at, search, seq)
           select gen_random_uuid(), asset_type, file_path, file_size_bytes, format, width, height,
             encode(sha256(n::text::bytea), 'hex'), pixel_hash, dominant_color, generation_params,
             created_at, search, seq
           from asset_inventory, generate_series(1, $2) n where id = $1""",
        source["id"],
        number - 2,
    )
    await served.parts.pool.execute(
        """insert into asset_reference (asset_id, job_id, position, user_id, file_size_bytes, created_at, seq)
           select id, gen_random_uuid(), 0, 'mei', 1, created_at, seq from asset_inventory a
           where not exists (select from asset_reference r where r.asset_id = a.id)"""
    )
    body = {"reasons": ["old"], "older_than_seconds": 0}
    shown = await clean(operator, **body)
    assert (shown["held"], shown["assets"], shown["of"], shown["id"]) == (True, number, number, None)
    assert (await clean(operator, **body, confirm=number - 1))["id"] is None
    told = await clean(operator, **body, confirm=number)
    assert told["id"] is not None
    assert not told["held"]
    await wait_until(lambda: gone(mei, source), 60)


# ----------------------------------------------------------------------- pins


async def test_pinned_is_shown_and_stays(
    served: Served, mei: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    asset = await made(served, mei, session_id="s", character_id="c")
    assert asset["pinned"] is False
    pinned = await mei.put(f"/assets/{asset['id']}/pin")
    assert (pinned.status_code, pinned.content) == (204, b"")
    seq = pinned.headers["x-forge-seq"]
    for client in (mei, operator):
        assert (await client.get(f"/assets/{asset['id']}", params={"min_seq": seq})).json()["pinned"] is True
    await expire(served, asset)
    assert (await clean(operator, dry_run=True))["assets"] == 0
    history = (await mei.get(f"/assets/{asset['id']}/history")).json()["items"]
    assert [item["type"] for item in history][-1] == "asset.pinned"
    unpinned = await mei.delete(f"/assets/{asset['id']}/pin")
    assert unpinned.status_code == 204
    await mei.get("/assets", params={"min_seq": unpinned.headers["x-forge-seq"]})
    assert (await clean(operator, dry_run=True))["assets"] == 1
    assert (await mei.put(f"/assets/{asset['id']}/pin")).status_code == 204
    assert (await mei.delete(f"/assets/{asset['id']}")).status_code == 204, "what its owner deletes goes"
    assert await gone(mei, asset)


async def test_nobody_pins_what_is_anothers(served: Served, mei: Any, lan: httpx.AsyncClient) -> None:
    asset = await made(served, mei)
    for method in ("PUT", "DELETE"):
        answer = await lan.request(method, f"/assets/{asset['id']}/pin")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


async def test_a_pin_is_its_owners_own(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient
) -> None:
    mine = await made(served, mei)
    theirs = await made(served, lan, "lan")
    assert mine["id"] == theirs["id"]
    seq = (await mei.put(f"/assets/{mine['id']}/pin")).headers["x-forge-seq"]
    seen = [(await c.get(f"/assets/{mine['id']}", params={"min_seq": seq})).json() for c in (mei, lan)]
    assert [one["pinned"] for one in seen] == [True, False]


# ------------------------------------------------------------- lost and damaged


async def test_an_open_download_goes_on_to_its_end(served: Served, mei: httpx.AsyncClient) -> None:
    asset = await made(served, mei, size=2400)
    path = served.parts.blobs.path(asset["content_hash"], "png")
    content = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(2**18))  # more than any buffer
    digest = hashlib.sha256(content).hexdigest()
    other = served.parts.blobs.path(digest, "png")
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(content)
    await served.parts.pool.execute(
        "update asset_inventory set content_hash = $1, file_size_bytes = $2 where id = $3",
        digest,
        len(content),
        asset["id"],
    )
    path.unlink()
    async with mei.stream("GET", f"/assets/{asset['id']}/file") as answer:
        assert answer.status_code == 200
        assert (await mei.delete(f"/assets/{asset['id']}")).status_code == 204
        other.unlink()
        received = b"".join([chunk async for chunk in answer.aiter_bytes()])
    assert hashlib.sha256(received).hexdigest() == digest
    assert (await mei.get(f"/assets/{asset['id']}/file")).status_code == 404


@pytest.mark.parametrize("harm", ["missing", "flipped"])
async def test_what_is_not_as_stored_is_told_by_event_and_never_sent(
    served: Served, mei: httpx.AsyncClient, harm: str
) -> None:
    asset = await made(served, mei)
    path = served.parts.blobs.path(asset["content_hash"], "png")
    assert (await mei.get(f"/assets/{asset['id']}/file")).status_code == 200
    if harm == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    for method in ("GET", "HEAD", "GET"):
        answer = await mei.request(method, f"/assets/{asset['id']}/file")
        assert answer.status_code == 503
        assert "retry-after" in answer.headers
    kind = AssetLost if harm == "missing" else AssetDamaged
    told = await served.parts.store.load(ALL_FAULTS)
    assert [type(record.event) for record in told.events] == [kind]
    assert told.seq == await served.parts.store.head(), "said once"


async def test_a_picture_that_was_compared_is_not_read_twice(
    served: Served, mei: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge.api import files

    asset, compared = await made(served, mei), list[int]()
    digest = files._Open.digest
    monkeypatch.setattr(files._Open, "digest", lambda file: compared.append(1) or digest(file))
    for _ in range(3):
        answer = await mei.get(f"/assets/{asset['id']}/file", headers={"Range": "bytes=0-9"})
        assert len(answer.content) == 10
    assert len(compared) == 1


async def test_with_keys_only_an_operator_cleans_up_for_all(serve: Serve, settings: Settings) -> None:
    keys = (ApiKey("player", "mei", "k1"), ApiKey("operator", "ops", "k2"))
    served = await serve(with_settings=msgspec.structs.replace(settings, api_keys=keys))
    async with served.client(key="k1") as player, served.client(key="k2") as ops:
        assert (await player.post("/assets/cleanup", json={"reasons": ["lost"]})).status_code == 403
        assert (await clean(player, dry_run=True))["assets"] == 0
        assert (await clean(ops, dry_run=True, reasons=["lost"]))["assets"] == 0
    async with served.client() as nobody:
        assert (await nobody.post("/assets/cleanup", json={})).status_code == 401
