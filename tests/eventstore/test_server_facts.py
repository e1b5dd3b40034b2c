"""What forge believes about nats-server: one test for each behaviour the design leans on."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from factories import JOB, job_id, meta, ready, started, submitted
from forge.broker import BrokerRefused, connect, request
from forge.embedded import EmbeddedNats
from forge.events.catalogue import encode
from forge.events.envelope import headers
from forge.eventstore import Draft, EventStore
from forge.topology import ASSETS_READY, DISPATCH, EVENTS, GENERATION, ORDER_DONE, job, order, subject
from waiting import wait_until

MEI = "forge.evt.admission.mei"
EXPECTED = "Nats-Expected-Last-Subject-Sequence"
FILTER = "Nats-Expected-Last-Subject-Sequence-Subject"


async def publish(nc: Client, where: str, body: bytes = b"{}", **given: str) -> dict[str, Any]:
    """Publish and return the server's answer; header names have dashes for underscores."""
    named = {name.replace("_", "-"): value for name, value in given.items()}
    answer = await nc.request(where, body, timeout=20, headers=named or None)
    return msgspec.json.decode(answer.data) if answer.data else {}  # type: ignore[no-any-return]


def code(answer: dict[str, Any]) -> int:
    return int(answer.get("error", {}).get("err_code", 0))


async def state(nc: Client, stream: str) -> dict[str, Any]:
    return msgspec.json.decode(await request(nc, f"STREAM.INFO.{stream}"))["state"]  # type: ignore[no-any-return]


async def take(nc: Client, timeout: float = 20) -> Msg:
    subscription = await nc.jetstream().pull_subscribe_bind(GENERATION, stream=DISPATCH)
    try:
        [message] = await subscription.fetch(1, timeout=timeout)
        return message
    finally:
        await subscription.unsubscribe()


# ------------------------------------------------------------- expectations


async def test_a_stale_expectation_is_refused_with_10071(nats_client: Client) -> None:
    assert (await publish(nats_client, MEI, **{EXPECTED: "0"}))["seq"] == 1
    assert code(await publish(nats_client, MEI, **{EXPECTED: "0"})) == 10071
    assert (await publish(nats_client, MEI, **{EXPECTED: "1"}))["seq"] == 2


async def test_an_expectation_may_stand_on_a_filter(nats_client: Client) -> None:
    facts = f"forge.evt.job.mei.{JOB}"
    await publish(nats_client, f"{facts}.1.started")
    guarded = {EXPECTED: "0", FILTER: f"{facts}.>"}
    assert code(await publish(nats_client, f"{facts}.1.completed", **guarded)) == 10071


async def test_a_filter_that_covers_nothing_is_accepted_in_silence(nats_client: Client) -> None:
    """Why the store refuses a boundary that does not cover its event."""
    await publish(nats_client, MEI)
    answer = await publish(nats_client, MEI, **{EXPECTED: "0", FILTER: "forge.evt.nowhere"})
    assert answer["seq"] == 2


async def test_a_refused_event_does_not_use_up_its_id(nats_client: Client) -> None:
    await publish(nats_client, MEI)
    assert code(await publish(nats_client, MEI, **{EXPECTED: "0", "Nats-Msg-Id": "a"})) == 10071
    answer = await publish(nats_client, MEI, **{EXPECTED: "1", "Nats-Msg-Id": "a"})
    assert (answer["seq"], answer.get("duplicate")) == (2, None)


async def test_the_expectation_counts_before_the_id(nats_client: Client) -> None:
    """A repeat after a lost answer looks like a conflict."""
    await publish(nats_client, MEI, **{EXPECTED: "0", "Nats-Msg-Id": "a"})
    assert code(await publish(nats_client, MEI, **{EXPECTED: "0", "Nats-Msg-Id": "a"})) == 10071


async def test_an_id_that_is_known_is_answered_with_its_sequence(nats_client: Client) -> None:
    """So an expectation must be what the decision saw, or another's event would look like one's own."""
    await publish(nats_client, MEI, **{"Nats-Msg-Id": "a"})
    await publish(nats_client, MEI, **{"Nats-Msg-Id": "b"})
    answer = await publish(nats_client, MEI, **{EXPECTED: "2", "Nats-Msg-Id": "a"})
    assert (answer["seq"], answer["duplicate"]) == (1, True)


# ------------------------------------------------------------------ batches


async def part(nc: Client, batch: str, nth: int, commit: bool = False, **given: str) -> dict[str, Any]:
    ends = {"Nats-Batch-Commit": "1"} if commit else {}
    place = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(nth)}
    return await publish(nc, MEI, **place, **ends, **given)


async def test_a_batch_without_its_end_is_not_there(nats_client: Client) -> None:
    assert await part(nats_client, "one", 1) == {}
    assert (await state(nats_client, EVENTS))["messages"] == 0
    answer = await part(nats_client, "one", 2, commit=True)
    assert (answer["seq"], answer["count"]) == (2, 2)


async def test_a_batch_with_a_known_id_is_refused_whole_with_10201(nats_client: Client) -> None:
    await publish(nats_client, MEI, **{"Nats-Msg-Id": "a"})
    await part(nats_client, "one", 1, **{"Nats-Msg-Id": "b"})
    assert code(await part(nats_client, "one", 2, commit=True, **{"Nats-Msg-Id": "a"})) == 10201
    assert (await state(nats_client, EVENTS))["messages"] == 1


async def test_a_batch_that_a_crash_cut_in_two_is_refused_with_10176(
    nats_client: Client, nats_server: EmbeddedNats
) -> None:
    """Nothing of it was written, so it may be written again."""
    await part(nats_client, "one", 1)
    nats_server.kill()
    nats_server.start()
    nc = await connect(nats_server.url, "after")
    assert code(await part(nc, "one", 2, commit=True)) == 10176
    assert (await state(nc, EVENTS))["messages"] == 0
    await nc.close()


# --------------------------------------------------------------- durability


async def test_what_was_acked_survives_a_kill_and_so_does_its_id(
    nats_client: Client, nats_server: EmbeddedNats
) -> None:
    for nth in range(20):
        await publish(nats_client, MEI, **{"Nats-Msg-Id": f"{nth}"})
    nats_server.kill()
    nats_server.start()
    nc = await connect(nats_server.url, "after")
    assert (await state(nc, EVENTS))["last_seq"] == 20
    assert (await publish(nc, MEI, **{"Nats-Msg-Id": "19"}))["duplicate"] is True
    await nc.close()


@pytest.mark.parametrize(
    ("call", "body"), [("STREAM.PURGE", None), ("STREAM.MSG.DELETE", {"seq": 1})], ids=["purge", "delete"]
)
async def test_nothing_is_taken_out_of_the_log(nats_client: Client, call: str, body: Any) -> None:
    await publish(nats_client, MEI)
    with pytest.raises(BrokerRefused):
        await request(nats_client, f"{call}.{EVENTS}", body)
    assert (await state(nats_client, EVENTS))["messages"] == 1


async def test_a_misspelt_field_is_refused(nats_client: Client) -> None:
    config = msgspec.json.decode(await request(nats_client, f"STREAM.INFO.{EVENTS}"))["config"]
    with pytest.raises(BrokerRefused):
        await request(nats_client, f"STREAM.UPDATE.{EVENTS}", config | {"max_mesages": 5})


async def test_headers_come_back_as_they_went(nats_client: Client, events: EventStore) -> None:
    wide = meta(actor="player:雪 é = : ;")
    [record] = await events.append([Draft(submitted(), wide, MEI)])
    found = await events.at(record.seq)
    assert found is not None
    assert found.meta == wide


# ------------------------------------------------------------------ reading


async def test_the_last_of_every_subject_comes_in_the_order_of_the_log(events: EventStore) -> None:
    facts = job("mei", JOB)
    seq = 0
    for attempt in (2, 1, 3):
        draft = Draft(started(attempt=attempt), meta(f"{attempt}"), facts, seq)
        seq = (await events.append([draft]))[0].seq
    loaded = await events.load(facts)
    assert [record.event.attempt for record in loaded.events] == [2, 1, 3]  # type: ignore[attr-defined]


# ------------------------------------------------------------------- orders


async def give(nc: Client, number: int, id_: str = "") -> dict[str, Any]:
    return await publish(nc, order(job_id(number)), **({"Nats-Msg-Id": id_} if id_ else {}))


async def test_the_queue_of_orders_takes_no_fourth(nats_client: Client) -> None:
    assert [code(await give(nats_client, nth)) for nth in (1, 2, 3, 4)] == [0, 0, 0, 10077]


async def test_the_queue_of_orders_takes_a_job_once(nats_client: Client) -> None:
    await give(nats_client, 1)
    assert code(await give(nats_client, 1)) == 10077


async def test_an_order_keeps_its_place_until_it_is_acked(nats_client: Client) -> None:
    for nth in (1, 2, 3):
        await give(nats_client, nth)
    message = await take(nats_client)
    assert code(await give(nats_client, 4)) == 10077
    await message.ack_sync(timeout=10)
    assert code(await give(nats_client, 4)) == 0


@pytest.mark.fault("B5")
async def test_a_delayed_release_holds_its_place(nats_client: Client) -> None:
    """Why a back-off is an event: three such releases would stop the queue."""
    for nth in (1, 2, 3):
        await give(nats_client, nth)
        await (await take(nats_client)).nak(delay=30)
    assert code(await give(nats_client, 4)) == 10077
    with pytest.raises(nats.errors.TimeoutError):
        await take(nats_client, timeout=0.5)


async def test_a_release_comes_again_at_once(nats_client: Client) -> None:
    await give(nats_client, 1)
    await (await take(nats_client)).nak()
    assert (await take(nats_client, timeout=5)).metadata.num_delivered == 2


async def test_three_are_out_at_a_time_even_if_more_could_be(nats_client: Client) -> None:
    """The second lock: the consumer's own limit holds where the queue's is gone."""
    config = msgspec.json.decode(await request(nats_client, f"STREAM.INFO.{DISPATCH}"))["config"]
    await request(nats_client, f"STREAM.UPDATE.{DISPATCH}", config | {"max_msgs": 10})
    for nth in range(1, 6):
        assert code(await give(nats_client, nth)) == 0
    for _ in range(3):
        await take(nats_client)
    with pytest.raises(nats.errors.TimeoutError):
        await take(nats_client, timeout=0.5)


async def test_the_id_of_an_order_outlives_it(nats_client: Client) -> None:
    """An order given again after it was acked is swallowed: it counts as given until looking tells."""
    first = await give(nats_client, 1, "1-1")
    await (await take(nats_client)).ack_sync(timeout=10)
    again = await give(nats_client, 1, "1-1")
    assert (again["seq"], again["duplicate"]) == (first["seq"], True)
    assert (await state(nats_client, DISPATCH))["messages"] == 0


async def test_every_ack_is_told_with_the_orders_sequence(nats_client: Client) -> None:
    told: list[int] = []

    async def heard(message: Msg) -> None:
        told.append(msgspec.json.decode(message.data)["stream_seq"])

    await nats_client.subscribe(ORDER_DONE, cb=heard)
    for nth in (1, 2):
        await give(nats_client, nth)
        await (await take(nats_client)).ack_sync(timeout=10)
    await wait_until(lambda: told == [1, 2])


@pytest.mark.fault("B2")
async def test_a_late_ack_takes_the_order_from_its_new_holder(nats_client: Client) -> None:
    """The server does not fence: results are refused by their attempt, not by their ack."""
    await give(nats_client, 1)
    old = await take(nats_client)
    await old.nak()
    await take(nats_client)
    old._ackd = False
    await old.ack_sync(timeout=10)
    assert (await state(nats_client, DISPATCH))["messages"] == 0


# ------------------------------------------------------------ other services


async def test_what_is_ready_is_told_to_others_as_a_cloud_event(
    nats_client: Client, events: EventStore
) -> None:
    told = ready(character_id="mei lin")
    [record] = await events.append([Draft(told, meta(), subject(told), 0)])

    async def there() -> Msg | None:
        asked = f"$JS.API.DIRECT.GET.{ASSETS_READY}"
        answer = await nats_client.request(asked, msgspec.json.encode({"seq": 1}), timeout=10)
        return None if (answer.headers or {}).get("Status") else answer

    message = await wait_until(there)
    assert message.headers is not None
    assert message.headers["Nats-Subject"] == f"forge.public.asset.npc_bust.{told.asset_id}.ready"
    expected = headers(told, record.meta, record.subject)
    assert {name: message.headers.get(name) for name in expected} == expected
    assert message.data == encode(told)


async def test_pulls_at_once_get_an_order_each(nats_client: Client) -> None:
    for nth in (1, 2, 3):
        await give(nats_client, nth)
    messages = await asyncio.gather(*(take(nats_client) for _ in range(3)))
    assert len({message.subject for message in messages}) == 3
