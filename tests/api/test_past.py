"""`forge at` tells of the past what the API told then, field by field."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import msgspec
import pytest

from api.making import completed, failed, started
from api.serving import Serve, Served
from forge.domain.jobs import Status
from forge.errors import Invalid
from forge.past import Asked, tell
from forge.settings import Settings
from waiting import wait_until

ALL = tuple(Status)
OWNERS = {"session_id": "s-1", "character_id": "c-1"}


class Witness:
    """Asks the API everything now, to be compared with what is told of now later."""

    def __init__(self, served: Served, clients: dict[str | None, httpx.AsyncClient]) -> None:
        self.served, self.clients = served, clients
        self.seen: list[tuple[int, datetime, Asked, Any]] = []

    async def look(self) -> None:
        parts = self.served.parts
        head = await parts.store.head()
        await wait_until(lambda: parts.live.head >= head, what="the API has read its log")
        for user, client in self.clients.items():
            for asked, path, query in (
                (Asked(when=head, what="queue", user=user), "/queue", {}),
                (Asked(when=head, what="queue", user=user, statuses=ALL), "/queue", {"status": list(ALL)}),
                (Asked(when=head, what="queue", user=user, job_type="ui_icon", limit=2), "/queue", None),
                (Asked(when=head, what="inventory", user=user), "/assets", {}),
                (Asked(when=head, what="inventory", user=user, asset_type="fate_card"), "/assets", None),
            ):
                if query is None:
                    query = (
                        {"job_type": "ui_icon", "limit": 2}
                        if path == "/queue"
                        else {"asset_type": "fate_card"}
                    )
                answer = await client.get(path, params=query | {"min_seq": head})
                assert answer.headers["x-forge-seq"] == str(head), "nothing happened meanwhile"
                self.seen.append((head, datetime.now(UTC), asked, answer.json() | {"next_cursor": None}))
            if user is not None:
                limits = (await client.get("/limits", params=OWNERS)).json()
                asked = Asked(when=head, what="limits", user=user, **OWNERS)
                self.seen.append((head, datetime.now(UTC), asked, limits))


async def life(served: Served, witness: Witness, mei: httpx.AsyncClient, lan: httpx.AsyncClient) -> None:
    """A little of everything, with looks in between."""
    parts = served.parts

    async def submit(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
        answer = await client.post("/jobs", json={"job_type": "ui_icon", "params": {}} | more)
        assert answer.status_code == 202, answer.text
        return answer.json()  # type: ignore[no-any-return]

    await witness.look()
    first = await submit(mei, **OWNERS)
    second = await submit(mei, priority=2)
    theirs = await submit(lan, job_type="fate_card", params={"prompt": "a crane"}, ttl_seconds=900)
    await witness.look()
    await completed(parts, "mei", first)
    await failed(parts, "lan", theirs, final=False)

    async def joined() -> bool:
        return (await lan.get(f"/jobs/{theirs['id']}")).json()["position"] is not None

    await wait_until(joined, what="its back-off is over, which the clock decides and not the log")
    await started(parts, "mei", second)
    await submit(lan, priority=9)
    await witness.look()
    await completed(
        parts, "lan", await submit(lan, job_type="fate_card", params={"prompt": "two"}), color="#aa1100"
    )
    [asset] = (await mei.get("/assets", params={"min_seq": await parts.store.head()})).json()["items"]
    await mei.get(f"/assets/{asset['id']}/file")
    await parts.reads.flush()
    await mei.put(f"/assets/{asset['id']}/pin")
    await witness.look()
    await mei.delete(f"/jobs/{second['id']}")
    await mei.delete(f"/assets/{asset['id']}")
    cached = await submit(lan, job_type="fate_card", params={"prompt": "two", "seed": 5})
    await completed(parts, "lan", cached, color="#00aa11")
    await witness.look()


async def test_what_is_told_of_a_sequence_is_what_was_told_then(served: Served, settings: Settings) -> None:
    async with served.client("mei") as mei, served.client("lan") as lan, served.client() as all_:
        witness = Witness(served, {"mei": mei, "lan": lan, None: all_})
        await life(served, witness, mei, lan)
    assert len({head for head, *_ in witness.seen}) == 5
    for head, _, asked, answer in witness.seen:
        told = await tell(settings, asked)
        assert (told.as_of.seq, told.as_of.events) == (head, head)
        state = msgspec.json.decode(msgspec.json.encode(told.state))
        if head == 0:
            answer.pop("next_cursor", None)
            state.pop("next_cursor", None)
        assert state == answer, (head, asked)
    _, at, asked, answer = witness.seen[-2]
    told = await tell(settings, msgspec.structs.replace(asked, when=at))
    assert msgspec.json.decode(msgspec.json.encode(told.state)) == answer, "a moment is an event, too"


async def test_a_moment_is_the_last_event_before_it(
    served: Served, settings: Settings, mei: httpx.AsyncClient
) -> None:
    job = (await mei.post("/jobs", json={"job_type": "ui_icon", "params": {}})).json()
    between = datetime.now(UTC)
    await started(served.parts, "mei", job)
    for when, seq in ((between, 1), (between - timedelta(days=1), 0), (between + timedelta(days=1), 2)):
        told = await tell(settings, Asked(when=when, what="limits", user="mei"))
        assert (told.as_of.seq, told.as_of.at) == (seq, when)
    with pytest.raises(Invalid, match=r"the log ends at seq:2"):
        await tell(settings, Asked(when=3, what="queue"))


async def test_the_hour_is_counted_from_the_moment_that_is_asked_about(
    serve: Serve, settings: Settings
) -> None:
    served = await serve()
    async with served.client("mei") as mei:
        await mei.post("/jobs", json={"job_type": "ui_icon", "params": {}})

        async def used(when: datetime) -> int:
            told = await tell(settings, Asked(when=when, what="limits", user="mei"))
            state = msgspec.to_builtins(told.state)
            return next(i["used"] for i in state["items"] if i["name"] == "generations_per_hour")

        now = datetime.now(UTC)
        assert [await used(now), await used(now + timedelta(hours=2))] == [1, 0]


async def test_everybodys_limits_are_those_of_whoever_has_something(
    served: Served, settings: Settings, mei: httpx.AsyncClient, lan: httpx.AsyncClient
) -> None:
    for client in (mei, lan):
        await client.post("/jobs", json={"job_type": "ui_icon", "params": {}})
    told = await tell(settings, Asked(when=1, what="limits"))
    assert [limits.user_id for limits in told.state] == ["mei"]  # type: ignore[union-attr]
    told = await tell(settings, Asked(when=2, what="limits"))
    assert [limits.user_id for limits in told.state] == ["lan", "mei"]  # type: ignore[union-attr]


async def test_the_tables_in_use_are_not_touched(
    served: Served, settings: Settings, mei: httpx.AsyncClient
) -> None:
    job = (await mei.post("/jobs", json={"job_type": "ui_icon", "params": {}})).json()
    await mei.get("/queue", params={"min_seq": job["seq"]})
    before = await served.parts.pool.fetch("select * from projection_checkpoint order by 1")
    jobs = await served.parts.pool.fetch("select * from generation_queue")
    await tell(settings, Asked(when=0, what="queue"))
    await tell(settings, Asked(when=1, what="inventory"))
    assert await served.parts.pool.fetch("select * from projection_checkpoint order by 1") == before
    assert await served.parts.pool.fetch("select * from generation_queue") == jobs
