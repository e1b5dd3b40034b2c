"""Assets over HTTP: lists, files, thumbnails, histories, giving up."""

from __future__ import annotations

import hashlib
import io
from datetime import datetime, timedelta
from itertools import product
from typing import Any
from uuid import uuid4

import httpx
import pytest
from PIL import Image

from api.making import completed, picture
from api.serving import Served
from forge.api.files import part_of

D1 = (
    "id asset_type category archetype_id variant_key file_path file_size_bytes dimensions content_hash "
    "generation_params access_count last_accessed_at created_at expires_at"
)
MORE = "url thumbnail_url job_id user_id session_id character_id seq"


async def made(served: Served, client: httpx.AsyncClient, user: str = "mei", **more: Any) -> dict[str, Any]:
    """One picture of this user, as the list shows it."""
    asked = {key: more.pop(key) for key in ("session_id", "character_id", "params") if key in more}
    job_type = more.pop("job_type", "fate_card")
    job = (await client.post("/jobs", json={"job_type": job_type, "params": {}} | asked)).json()
    loaded = await completed(served.parts, user, job, **more)
    page = (await client.get("/assets", params={"min_seq": loaded.seq})).json()
    return next(asset for asset in page["items"] if asset["job_id"] == job["id"])


async def ids(client: httpx.AsyncClient, **params: Any) -> list[str]:
    answer = await client.get("/assets", params=params)
    assert answer.status_code == 200, answer.text
    return [asset["id"] for asset in answer.json()["items"]]


async def test_an_asset_has_the_shape_of_the_contract(served: Served, mei: httpx.AsyncClient) -> None:
    asset = await made(
        served, mei, session_id="s1", character_id="c1", category="military", variant_key="f_old_sad"
    )
    assert set(D1.split()) | set(MORE.split()) <= set(asset)
    assert (asset["session_id"], asset["character_id"], asset["user_id"]) == ("s1", "c1", "mei")
    assert (asset["dimensions"], asset["access_count"]) == ("600x600", 0)
    assert len(asset["content_hash"]) == 64
    assert asset["url"] == f"/api/v1/comfyui/assets/{asset['id']}/file"
    one = await mei.get(f"/assets/{asset['id']}")
    assert one.json() == asset
    assert int(one.headers["x-forge-seq"]) >= asset["seq"]


async def test_each_filter_finds_what_it_names(served: Served, mei: httpx.AsyncClient) -> None:
    card = await made(
        served,
        mei,
        color="#111111",
        category="military",
        archetype_id="general",
        variant_key="male_old_stern",
        session_id="s1",
        character_id="c1",
        params={"prompt": "A Red Banner, 100%_sure"},
    )
    icon = await made(served, mei, color="#222222", job_type="ui_icon", params={"prompt": "jade ring"})
    both = [icon["id"], card["id"]]
    assert await ids(mei) == both
    for name in ("asset_type", "category", "archetype_id", "variant_key", "session_id", "character_id"):
        assert await ids(mei, **{name: card[name]}) == [card["id"]], name
        assert await ids(mei, **{name: "other"}) == [], name
    assert await ids(mei, asset_type="ui_icon") == [icon["id"]]
    for q in ("red banner", "BANNER red", "100%_sure", "milit"):
        assert await ids(mei, q=q) == [card["id"]], q
    for q in ("redbanner", "red dragonfly", "100_", "100%sure"):
        assert await ids(mei, q=q) == [], q
    between = (datetime.fromisoformat(icon["created_at"]) - timedelta(microseconds=1)).isoformat()
    assert await ids(mei, created_after=between) == [icon["id"]]
    assert await ids(mei, created_before=between) == [card["id"]]


@pytest.mark.parametrize("sort", ["-created_at", "created_at", "-file_size_bytes", "file_size_bytes"])
async def test_pages_have_no_gap_and_no_repeat(
    served: Served, mei: httpx.AsyncClient, operator: httpx.AsyncClient, sort: str
) -> None:
    assets = [await made(served, mei, color=f"#{n:02x}0000", size=100 + 40 * (n % 3)) for n in range(6)]
    key = sort.removeprefix("-")
    wanted = sorted(assets, key=lambda a: (a[key], a["id"]), reverse=sort.startswith("-"))
    for client, limit in product((mei, operator), (2, 4, 6)):
        found: list[str] = []
        params: dict[str, Any] = {"limit": limit, "sort": sort}
        while True:
            page = (await client.get("/assets", params=params)).json()
            assert page["total_estimate"] == 6
            found += [asset["id"] for asset in page["items"]]
            if page["next_cursor"] is None:
                break
            params["cursor"] = page["next_cursor"]
        assert found == [asset["id"] for asset in wanted]


async def test_one_content_is_one_asset_for_each_who_made_it(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    first = await made(served, mei, character_id="c1")
    second = await made(served, mei, character_id="c2")
    theirs = await made(served, lan, "lan")
    assert first["id"] == second["id"] == theirs["id"]
    assert len(await ids(mei)) == len(await ids(lan)) == len(await ids(operator)) == 1
    assert theirs["created_at"] > second["created_at"] > first["created_at"], (
        "nobody learns who had it before"
    )
    assert (await mei.get(f"/assets/{first['id']}")).json()["character_id"] == "c2"
    assert await ids(mei, character_id="c1") == [first["id"]]
    assert await ids(lan, character_id="c1") == []

    gone = await mei.delete(f"/assets/{first['id']}")
    assert gone.status_code == 204
    assert (await mei.get(f"/assets/{first['id']}")).status_code == 404, "one reads what one wrote"
    params = {"min_seq": gone.headers["x-forge-seq"]}
    assert await ids(mei, **params) == []
    assert await ids(lan) == [theirs["id"]]
    assert (await lan.get(f"/assets/{theirs['id']}/file")).status_code == 200


async def test_others_assets_do_not_exist(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient
) -> None:
    asset = await made(served, mei)
    for method, path in (
        ("GET", ""),
        ("GET", "/file"),
        ("HEAD", "/file"),
        ("GET", "/thumbnail"),
        ("GET", "/history"),
        ("DELETE", ""),
    ):
        for id_ in (asset["id"], str(uuid4())):
            answer = await lan.request(method, f"/assets/{id_}{path}")
            assert answer.status_code == 404, (method, path)
            assert "etag" not in answer.headers
    assert await ids(lan) == []
    assert (await mei.get(f"/assets/{asset['id']}")).status_code == 200


async def test_the_history_tells_of_the_callers_own_references(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    asset = await made(served, mei, character_id="c1")
    await made(served, lan, "lan", character_id="c1")
    gone = await mei.delete(f"/assets/{asset['id']}")
    await lan.get("/assets", params={"min_seq": gone.headers["x-forge-seq"]})
    mine = (await lan.get(f"/assets/{asset['id']}/history")).json()["items"]
    assert [item["type"] for item in mine] == ["asset.stored", "asset.ready"]
    assert {item["data"]["user_id"] for item in mine} == {"lan"}
    gone_by_now = (await mei.get(f"/assets/{asset['id']}/history")).json()["items"]
    assert [item["type"] for item in gone_by_now] == ["asset.stored", "asset.ready", "asset.deleted"]
    everything = (await operator.get(f"/assets/{asset['id']}/history")).json()["items"]
    assert [item["type"] for item in everything][-1] == "asset.deleted"


# ----------------------------------------------------------------------- files


async def test_the_file_is_what_was_stored(served: Served, mei: httpx.AsyncClient) -> None:
    asset = await made(served, mei, color="#abcdef")
    answer = await mei.get(asset["url"].removeprefix("/api/v1/comfyui"))
    assert answer.content == picture("#abcdef", 600)
    assert hashlib.sha256(answer.content).hexdigest() == asset["content_hash"]
    headers = answer.headers
    assert headers["content-type"] == "image/png"
    assert headers["etag"] == f'"{asset["content_hash"]}"'
    assert headers["content-length"] == str(asset["file_size_bytes"])
    assert "immutable" in headers["cache-control"]
    assert headers["accept-ranges"] == "bytes"
    assert headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in headers["content-security-policy"]
    head = await mei.head(f"/assets/{asset['id']}/file")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(asset["file_size_bytes"])


async def test_conditions_and_ranges(served: Served, mei: httpx.AsyncClient) -> None:
    asset = await made(served, mei)
    path, whole = f"/assets/{asset['id']}/file", picture("#336699", 600)
    etag, size = f'"{asset["content_hash"]}"', asset["file_size_bytes"]

    async def get(**headers: str) -> httpx.Response:
        return await mei.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    for tags in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = await get(if_none_match=tags)
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert (await get(if_none_match='"x"')).status_code == 200
    for wanted, part in (
        ("0-9", whole[:10]),
        ("10-", whole[10:]),
        ("-5", whole[-5:]),
        (f"5-{size}", whole[5:]),
    ):
        answer = await get(range=f"bytes={wanted}")
        assert (answer.status_code, answer.content) == (206, part), wanted
        assert answer.headers["content-range"].endswith(f"/{size}")
    outside = await get(range=f"bytes={size}-")
    assert (outside.status_code, outside.headers["content-range"]) == (416, f"bytes */{size}")
    assert outside.headers["content-type"] == "application/problem+json"
    for ignored in ("bytes=5-2", "bytes=0-1,4-5", "lines=1-2", "bytes=-", "bytes=x"):
        assert (await get(range=ignored)).status_code == 200, ignored
    assert (await get(range="bytes=0-9", if_range=etag)).status_code == 206
    assert (await get(range="bytes=0-9", if_range='"old"')).status_code == 200


def test_a_range_of_nothing_lies_outside() -> None:
    for wanted, size in (("bytes=-0", 10), ("bytes=0-", 0), ("bytes=10-", 10)):
        with pytest.raises(ValueError, match="of"):
            part_of(wanted, size)


async def test_thumbnails_of_any_width_are_made_once_and_kept(served: Served, mei: httpx.AsyncClient) -> None:
    asset = await made(served, mei)
    for width, got in ((256, 256), (512, 512), (100, 128), (16, 64), (2048, 600)):
        answer = await mei.get(f"/assets/{asset['id']}/thumbnail", params={"width": width})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp"), answer.text
        assert Image.open(io.BytesIO(answer.content)).width == got
    kept = served.parts.blobs.thumbnail_path(asset["content_hash"], 128)
    before = kept.stat().st_mtime_ns
    again = await mei.get(f"/assets/{asset['id']}/thumbnail", params={"width": 120})
    assert again.status_code == 200
    assert kept.stat().st_mtime_ns == before
    unchanged = {"If-None-Match": again.headers["etag"]}
    assert (await mei.get(f"/assets/{asset['id']}/thumbnail?width=120", headers=unchanged)).status_code == 304


@pytest.mark.fault("D6")
async def test_a_damaged_or_missing_file_is_never_sent(served: Served, mei: httpx.AsyncClient) -> None:
    asset = await made(served, mei)
    file = served.parts.blobs.path(asset["content_hash"], "png")
    file.write_bytes(file.read_bytes()[:-1])
    answer = await mei.get(f"/assets/{asset['id']}/file")
    assert (answer.status_code, answer.json()["code"]) == (503, "store_failed")
    file.unlink()
    for path in ("file", "thumbnail?width=64"):
        assert (await mei.get(f"/assets/{asset['id']}/{path}")).json()["code"] == "store_failed"
