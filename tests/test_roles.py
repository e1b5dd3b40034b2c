"""Who may what at NATS: every user against every kind of operation, on a real server with the real file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID, uuid4

import msgspec
import nats
import pytest
from nats.aio.client import Client

import factories
from forge import bootstrap, credentials, topology
from forge.broker import connect, request
from forge.credentials import API, CLEANUP, OPERATOR, PROJECTOR, SUBSCRIBER, USERS, WORKER, Login
from forge.embedded import EmbeddedNats
from forge.errors import LogUnavailable, NotLetIn, NotSetUp, SettingInvalid
from forge.events.assets import AssetDamaged
from forge.events.catalogue import Event, all_events
from forge.eventstore import EventStore
from waiting import wait_until

NOBODY: set[str] = set()
ALL = set(USERS)
OURS = ALL - {SUBSCRIBER}


def damaged() -> AssetDamaged:
    lost = factories.lost()
    return AssetDamaged(**msgspec.structs.asdict(lost))


EVENTS_BY: list[tuple[Event, set[str]]] = [
    (factories.submitted(), {API}),
    (factories.retried(), {API}),
    (factories.started(), {WORKER}),
    (factories.adopted(), {WORKER}),
    (factories.redirected(), {WORKER}),
    (factories.attempt_failed(), {WORKER}),
    (factories.failed(), {WORKER}),
    (factories.completed(), {API, WORKER}),  # the API: what was drawn before
    (factories.cancelled(), {API}),
    (factories.stored(session_id="s"), {API, WORKER, CLEANUP}),
    (factories.released(session_id="s"), {API, WORKER, CLEANUP}),
    (factories.ready(), {API, WORKER}),
    (factories.deleted(), {API, WORKER, CLEANUP}),
    (factories.expired(), {WORKER, CLEANUP}),
    (factories.pinned(), {API}),
    (factories.unpinned(), {API}),
    (factories.lost(), {API, WORKER, CLEANUP}),
    (damaged(), {API, WORKER, CLEANUP}),
    (factories.upload_stored(), {API}),
    (factories.upload_renewed(), {API, WORKER}),
    (factories.upload_expired(), {WORKER}),
    (factories.key_created(), {API}),
    (factories.key_revoked(), {API}),
    (factories.accessed(), {API}),
    (factories.crossed(), {WORKER}),
    (factories.cleanup_requested(), {API}),
    (factories.cleanup_held(), {WORKER, CLEANUP}),
    (factories.cleanup_finished(), {WORKER, CLEANUP}),
    (factories.sampled(), {WORKER}),
]

PUBLISH: dict[str, set[str]] = {
    **{topology.subject(event): who | {OPERATOR} for event, who in EVENTS_BY},
    topology.order(UUID(int=1)): {OPERATOR, WORKER},
    topology.progress(UUID(int=1)): {OPERATOR, WORKER},
    topology.BACKENDS: {OPERATOR, WORKER},
    topology.CHECKPOINT: {OPERATOR, PROJECTOR},
    topology.ticket_office("office"): {OPERATOR, API},
    "forge.public.asset.ui_icon.x.ready": {OPERATOR},
    "forge.evt.anything.else": {OPERATOR},
    "somewhere.else": NOBODY,
    "_INBOX_api.x.y": NOBODY,
    "_INBOX_worker.x.y": NOBODY,
    "$SYS.REQ.SERVER.PING": NOBODY,
    # streams
    **{f"$JS.API.STREAM.{verb}.FORGE_EVENTS": {OPERATOR} for verb in ("CREATE", "UPDATE", "DELETE", "PURGE")},
    **{f"$JS.API.STREAM.{verb}.FORGE_DISPATCH": {OPERATOR} for verb in ("UPDATE", "DELETE", "PURGE")},
    "$JS.API.STREAM.UPDATE.FORGE_ASSETS_READY": {OPERATOR},
    "$JS.API.STREAM.PURGE.FORGE_ASSETS_READY": {OPERATOR},
    "$JS.API.STREAM.MSG.DELETE.FORGE_DISPATCH": {OPERATOR},
    "$JS.API.STREAM.MSG.DELETE.FORGE_ASSETS_READY": {OPERATOR},
    "$JS.API.STREAM.SNAPSHOT.FORGE_EVENTS": {OPERATOR},
    "$JS.API.STREAM.RESTORE.FORGE_EVENTS": {OPERATOR},
    "$JS.API.STREAM.CREATE.ANOTHER": {OPERATOR},
    "$JS.API.STREAM.NAMES": {OPERATOR},
    "$JS.API.STREAM.INFO.FORGE_EVENTS": OURS,
    "$JS.API.STREAM.INFO.FORGE_DISPATCH": {OPERATOR, API, WORKER},
    "$JS.API.STREAM.INFO.FORGE_METRICS": {OPERATOR, WORKER, PROJECTOR},
    "$JS.API.STREAM.INFO.FORGE_ASSETS_READY": {OPERATOR, SUBSCRIBER},
    "$JS.API.DIRECT.GET.FORGE_EVENTS": OURS,
    "$JS.API.DIRECT.GET.FORGE_DISPATCH": {OPERATOR},
    "$JS.API.DIRECT.GET.FORGE_METRICS": {OPERATOR, PROJECTOR},
    "$JS.API.DIRECT.GET.FORGE_ASSETS_READY": {OPERATOR, SUBSCRIBER},
    "$JS.API.STREAM.MSG.GET.FORGE_DISPATCH": {OPERATOR, WORKER},
    "$JS.API.STREAM.MSG.GET.FORGE_ASSETS_READY": {OPERATOR},
    # a reader's own consumers, and the durable ones that somebody's work hangs on
    **{f"$JS.API.CONSUMER.{verb}.FORGE_EVENTS.follow-1": OURS for verb in ("CREATE", "MSG.NEXT", "DELETE")},
    "$JS.API.CONSUMER.CREATE.FORGE_METRICS.follow-1": {OPERATOR, PROJECTOR},
    "$JS.API.CONSUMER.MSG.NEXT.FORGE_METRICS.follow-1": {OPERATOR, PROJECTOR},
    "$JS.API.CONSUMER.DURABLE.CREATE.FORGE_EVENTS.mine": {OPERATOR},
    "$JS.API.CONSUMER.CREATE.FORGE_EVENTS.cleanup": {OPERATOR},
    "$JS.API.CONSUMER.DELETE.FORGE_EVENTS.cleanup": {OPERATOR},
    "$JS.API.CONSUMER.RESET.FORGE_EVENTS.cleanup": {OPERATOR},
    "$JS.API.CONSUMER.PAUSE.FORGE_EVENTS.cleanup": {OPERATOR},
    "$JS.API.CONSUMER.INFO.FORGE_EVENTS.cleanup": {OPERATOR, CLEANUP},
    "$JS.API.CONSUMER.MSG.NEXT.FORGE_EVENTS.cleanup": {OPERATOR, CLEANUP},
    "$JS.ACK.FORGE_EVENTS.cleanup.1.2.3.4.5": {OPERATOR, CLEANUP},
    "$JS.API.CONSUMER.CREATE.FORGE_DISPATCH.generation": {OPERATOR},
    "$JS.API.CONSUMER.DELETE.FORGE_DISPATCH.generation": {OPERATOR},
    "$JS.API.CONSUMER.INFO.FORGE_DISPATCH.generation": {OPERATOR, WORKER},
    "$JS.API.CONSUMER.MSG.NEXT.FORGE_DISPATCH.generation": {OPERATOR, WORKER},
    "$JS.ACK.FORGE_DISPATCH.generation.1.2.3.4.5": {OPERATOR, WORKER},
    "$JS.API.CONSUMER.CREATE.FORGE_ASSETS_READY.mine": {OPERATOR},
    "$JS.API.CONSUMER.CREATE.FORGE_ASSETS_READY.mine.forge.public.>": {OPERATOR},
    "$JS.API.CONSUMER.DELETE.FORGE_ASSETS_READY.mine": {OPERATOR},
    "$JS.API.CONSUMER.INFO.FORGE_ASSETS_READY.mine": {OPERATOR, SUBSCRIBER},
    "$JS.API.CONSUMER.MSG.NEXT.FORGE_ASSETS_READY.mine": {OPERATOR, SUBSCRIBER},
    "$JS.ACK.FORGE_ASSETS_READY.mine.1.2.3.4.5": {OPERATOR, SUBSCRIBER},
}

SUBSCRIBE: dict[str, set[str]] = {
    **{f"_INBOX_{user}.x.*": {user} for user in USERS},
    "_INBOX.>": NOBODY,
    ">": NOBODY,
    "$JS.>": NOBODY,
    "$JS.API.>": NOBODY,
    "$SYS.>": NOBODY,
    topology.ALL_EVENTS: {OPERATOR},
    topology.ALL_METRICS: {OPERATOR},
    "forge.dispatch.>": {OPERATOR},
    "forge.public.>": {OPERATOR},
    topology.ALL_PROGRESS: {OPERATOR, API},
    topology.BACKENDS: {OPERATOR, API},
    topology.CHECKPOINT: {OPERATOR, API},
    topology.ticket_office("office"): {OPERATOR, API},
    topology.ORDER_DONE: {OPERATOR, WORKER},
    "$JS.EVENT.ADVISORY.>": {OPERATOR},
}


@pytest.fixture(scope="module")
def server(open_directory: Path) -> Iterator[EmbeddedNats]:
    """A server for these tests, where nobody may do more than the file says."""
    server = EmbeddedNats(open_directory / "nats-roles")
    server.start()
    yield server
    server.stop()


def known(server: EmbeddedNats, user: str) -> Login:
    login = credentials.login(server.passwords_dir, user)
    assert login is not None
    return login


@asynccontextmanager
async def being(server: EmbeddedNats, user: str) -> AsyncIterator[tuple[Client, list[str]]]:
    """A connection as this user, and what the server refused it, the only way to know."""
    refused: list[str] = []

    async def heard(error: Exception) -> None:
        refused.append(str(error))

    login = known(server, user)
    nc = await nats.connect(
        server.url, user=login.user, password=login.password, inbox_prefix=f"_INBOX_{user}", error_cb=heard
    )
    try:
        yield nc, refused
    finally:
        await nc.close()


async def named(nc: Client, refused: list[str]) -> set[str]:
    """The subjects that were refused up to now, in small letters, as nats-py tells them."""
    await nc.flush()
    marker = f"the.end.{uuid4()}"
    await nc.publish(marker, b"")
    await wait_until(lambda: any(marker in line for line in refused), what="the last refusal")
    return {line.split('"')[1] for line in refused} - {marker}


async def set_up(server: EmbeddedNats) -> None:
    nc = await connect(server.url, "setup", known(server, OPERATOR))
    await topology.apply(nc)
    await nc.close()


@pytest.mark.parametrize("user", USERS)
async def test_who_may_publish_what(server: EmbeddedNats, user: str) -> None:
    async with being(server, user) as (nc, refused):
        for subject in PUBLISH:
            await nc.publish(subject, b"?")  # nothing comes of it: no event, no request is spelt so
        assert await named(nc, refused) == {s.lower() for s, who in PUBLISH.items() if user not in who}


@pytest.mark.parametrize("user", USERS)
async def test_who_may_subscribe_to_what(server: EmbeddedNats, user: str) -> None:
    async with being(server, user) as (nc, refused):
        for subject in SUBSCRIBE:
            await nc.subscribe(subject)
        assert await named(nc, refused) == {s.lower() for s, who in SUBSCRIBE.items() if user not in who}


def test_every_kind_of_event_is_in_the_table() -> None:
    assert {type(event) for event, _ in EVENTS_BY} == set(all_events().values())


async def test_the_server_writes_down_what_it_refuses(server: EmbeddedNats) -> None:
    """What the acceptance tests look for after every run."""
    async with being(server, PROJECTOR) as (nc, _):
        await nc.publish("forge.evt.disk.crossed", b"?")
        await nc.subscribe("forge.dispatch.>")
        await nc.flush()
    log = server.log.read_text()
    assert "Publish Violation" in log
    assert "Subscription Violation" in log


async def test_an_answer_cannot_be_sent_into_the_log(server: EmbeddedNats) -> None:
    """A server answers to whatever subject a request names: a reader could so write where it must not."""
    await set_up(server)
    async with being(server, OPERATOR) as (operator, _), being(server, SUBSCRIBER) as (subscriber, refused):
        before = await EventStore(operator).head()
        for api in ("STREAM.INFO.FORGE_ASSETS_READY", "DIRECT.GET.FORGE_ASSETS_READY"):
            await subscriber.publish(f"$JS.API.{api}", b"", reply="forge.evt.admission.mei")
            asked = b'{"seq": 1}' if "DIRECT" in api else b""
            await subscriber.request(f"$JS.API.{api}", asked, timeout=30)
        assert refused == []
        assert await EventStore(operator).head() == before


async def test_no_role_changes_what_operator_set_up(server: EmbeddedNats) -> None:
    await set_up(server)
    for user in sorted(OURS - {OPERATOR}):
        nc = await connect(server.url, user, known(server, user))
        config = msgspec.json.decode(await request(nc, "STREAM.INFO.FORGE_EVENTS"))["config"]
        with pytest.raises(LogUnavailable):
            await request(nc, "STREAM.UPDATE.FORGE_EVENTS", config | {"deny_purge": False}, timeout=0.3)
        await nc.close()
    assert await anything_differs(server) == set()


async def anything_differs(server: EmbeddedNats) -> set[str]:
    nc = await connect(server.url, "setup", known(server, OPERATOR))
    outcomes = {change.outcome for change in await topology.apply(nc)} - {"unchanged"}
    await nc.close()
    return outcomes


@pytest.mark.parametrize("login", [Login(API, "wrong"), Login("stranger", "x"), None])
async def test_who_has_no_password_is_told_so(server: EmbeddedNats, login: Login | None) -> None:
    with pytest.raises(NotLetIn, match=r"does not let in .*FORGE_NATS_PASSWORDS_DIR"):
        await connect(server.url, "test", login)


async def test_what_is_not_set_up_is_waited_for_and_then_named(nats_server: EmbeddedNats) -> None:
    nc = await connect(nats_server.url, "test")
    needed = (topology.EVENTS, topology.CLEANUP_CONSUMER)
    with pytest.raises(NotSetUp, match=r"FORGE_EVENTS, FORGE_EVENTS.cleanup missing .*run `forge setup`"):
        await topology.await_setup(nc, needed, within=0.0)
    await topology.apply(nc)
    await topology.await_setup(nc, needed, within=0.0)
    await nc.close()


async def test_who_waits_for_it_goes_when_told_to_stop(nats_server: EmbeddedNats) -> None:
    nc, stop = await connect(nats_server.url, "test"), asyncio.Event()
    waiting = asyncio.create_task(bootstrap._came(topology.await_setup(nc, bootstrap.NEEDS[WORKER]), stop))
    stop.set()
    assert not await asyncio.wait_for(waiting, 20)
    await topology.apply(nc)
    assert await bootstrap._came(topology.await_setup(nc, bootstrap.NEEDS[WORKER]), asyncio.Event())
    await nc.close()


# --------------------------------------------------------------- passwords


def test_passwords_are_made_once_and_for_the_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "passwords"
    made = credentials.generate(folder)
    (folder / API).unlink()
    again = credentials.generate(folder)
    assert {name for name in made if made[name] != again[name]} == {"FORGE_NATS_API_PASSWORD"}
    assert {file.name for file in folder.iterdir()} == set(USERS)
    assert all(file.stat().st_mode & 0o077 == 0 for file in (folder, *folder.iterdir()))
    assert len({*made.values()}) == len(USERS)


def test_a_password_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingInvalid, match=r"FORGE_NATS_PASSWORDS_DIR: .*/api: No such file"):
        credentials.login(tmp_path, API)
    (tmp_path / API).write_text(" \n")
    with pytest.raises(SettingInvalid, match="is empty"):
        credentials.login(tmp_path, API)
    assert credentials.login(None, API) is None
    assert "secret" not in repr(Login(API, "secret"))


def test_a_log_from_before_there_were_users_is_taken_over(open_directory: Path) -> None:
    place = open_directory / "nats-before"
    server = EmbeddedNats(place)
    server.start()
    server.stop()
    (place / "jetstream" / "FORGE").mkdir(parents=True, exist_ok=True)
    (place / "jetstream" / "FORGE").rename(place / "jetstream" / "$G")
    (place / "jetstream" / "$G" / "mark").touch()
    server.start()
    server.stop()
    assert (place / "jetstream" / "FORGE" / "mark").exists()
