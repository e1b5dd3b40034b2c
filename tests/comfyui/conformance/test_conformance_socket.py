"""The WebSocket: handshake, order of messages, who hears what, reconnecting."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from comfyui.conformance.comfy_server import PATIENCE, Listener, Server, flat, new_id, recorded, shape, slow
from waiting import wait_until

RUN = recorded("run")


def named(messages: list[dict[str, Any]]) -> list[str]:
    """Message types, `executing` with its node; without `status`, which others may cause as well."""
    names = [
        f"executing:{message['data']['node']}" if message["type"] == "executing" else message["type"]
        for message in messages
    ]
    return [name for name in names if name != "status"]


async def first_status(listener: Listener) -> dict[str, Any]:
    message = await listener.message()
    assert message["type"] == "status"
    return dict(message["data"])


async def test_the_first_message_is_the_status_with_the_id(server: Server) -> None:
    async with server.listen("forge worker/1") as listener:
        assert await first_status(listener) == {
            "status": {"exec_info": {"queue_remaining": 0}},
            "sid": "forge worker/1",
        }


@pytest.mark.parametrize("path", ["/ws", "/ws?clientId=", "/api/ws"])
async def test_without_an_id_the_server_makes_a_hex_one(server: Server, path: str) -> None:
    async with server.session.ws_connect(path) as socket:
        made = (await first_status(Listener(socket, "")))["sid"]
    assert len(made) == 32
    assert int(made, 16)


async def test_a_get_without_upgrade_is_400(server: Server) -> None:
    assert (await server.ask("GET", "/ws")).status == 400


async def test_feature_flags_are_answered_to_the_first_valid_message(server: Server) -> None:
    expected = RUN["features_0.3.64"] if server.old else RUN["features"]
    async with server.listen() as listener:
        await first_status(listener)
        await listener.socket.send_str("no json: does not count as the first")
        await listener.socket.send_json(
            {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        )
        answer = await listener.message()
    assert answer["type"] == "feature_flags"
    assert answer["data"].keys() >= expected.keys()
    assert (await server.ask("GET", "/features")).json == answer["data"]


async def test_feature_flags_after_another_message_stay_unanswered(server: Server, space: str) -> None:
    async with server.listen() as listener:
        await listener.socket.send_json({"type": "hello"})
        await listener.socket.send_json({"type": "feature_flags", "data": {}})
        prompt_id = await server.submit(flat(space), client_id=listener.client_id)
        heard = await listener.until_over(prompt_id)
    assert "feature_flags" not in named(heard)


async def test_a_run_is_told_in_the_recorded_order(server: Server, space: str) -> None:
    async with server.listen() as listener:
        prompt_id = await server.submit(flat(f"{space}/a"), client_id=listener.client_id)
        heard = await listener.until_over(prompt_id)
    assert named(heard) == named(RUN["messages"])
    by_type = {message["type"]: message for message in RUN["messages"]}
    for message in heard:
        if message["type"] not in ("status", "executing", "progress_state"):
            assert shape(message) == shape(by_type[message["type"]])
    states = [m["data"]["nodes"] for m in heard if m["type"] == "progress_state"]
    expected = [m["data"]["nodes"] for m in RUN["messages"] if m["type"] == "progress_state"]
    assert [{n: (s["state"], s["value"]) for n, s in nodes.items()} for nodes in states] == [
        {n: (s["state"], s["value"]) for n, s in nodes.items()} for nodes in expected
    ]
    assert shape(states) == shape(expected)


async def test_history_is_there_when_the_prompt_is_over(server: Server, space: str) -> None:
    async with server.listen() as listener:
        for _ in range(20):
            prompt_id = await server.submit(flat(space), client_id=listener.client_id)
            await listener.until_over(prompt_id)
            assert await server.history(prompt_id) is not None


async def test_a_failure_is_told_in_the_recorded_order(server: Server) -> None:
    async with server.listen() as listener:
        prompt_id = await server.submit(flat("../../evil"), client_id=listener.client_id)
        heard = await listener.until_over(prompt_id)
    assert named(heard) == [name for name in RUN["error_order"] if name != "status"]


async def test_an_interruption_is_told_to_the_owner(server: Server) -> None:
    async with server.listen("conformance") as listener, server.busy() as blocker:
        await server.interrupt(blocker)
        heard = named(await listener.until_over(blocker))
    assert heard[-2:] == ["execution_interrupted", "executing:None"]


async def test_an_interruption_of_nobodys_prompt_is_told_to_everybody(server: Server) -> None:
    async with server.listen() as listener, server.busy(client_id=None) as blocker:
        await server.interrupt(blocker)
        told = await listener.until("execution_interrupted", prompt_id=blocker)
    assert told["data"].keys() == RUN["execution_interrupted"].keys()


async def test_only_the_owner_hears_a_prompt(server: Server, space: str) -> None:
    async with server.listen() as owner, server.listen() as other:
        foreign = await server.submit(flat(space), client_id=owner.client_id)
        await owner.until_over(foreign)
        mine = await server.submit(flat(space), client_id=other.client_id)
        heard = await other.until_over(mine)
    assert foreign not in {message["data"].get("prompt_id") for message in heard}


async def test_a_prompt_without_owner_is_told_to_everybody_in_part(server: Server, space: str) -> None:
    async with server.listen() as listener:
        nobodys = new_id()
        await server.ask("POST", "/prompt", json={"prompt": flat(space), "prompt_id": nobodys})
        await server.over(nobodys)
        mine = await server.submit(flat(space), client_id=listener.client_id)
        heard = await listener.until_over(mine)
    types = [message["type"] for message in heard if message["data"].get("prompt_id") == nobodys]
    assert types == [name for name in RUN["no_owner_messages"] if name != "status"]


async def test_reconnecting_mid_run_hears_the_current_node_without_a_prompt_id(server: Server) -> None:
    async with server.busy():

        async def repeated() -> dict[str, Any] | None:
            async with server.listen("conformance") as listener:
                assert (await first_status(listener))["sid"] == "conformance"
                try:
                    async with asyncio.timeout(1):
                        again = await listener.message()
                except TimeoutError:  # the clean-up after the last socket came late and took this one's id
                    return None
            # anything else is live: the prompt has left the queue, its first node has not begun
            return again if again["data"].keys() == {"node"} else None

        again = await wait_until(repeated, PATIENCE, "the running node is repeated")
        assert again is not None
        assert again["type"] == "executing"
        assert again["data"]["node"] in slow()


async def test_a_second_socket_under_one_id_goes_deaf_when_the_first_closes(
    server: Server, space: str
) -> None:
    async with server.listen("twice") as first:
        await first_status(first)
        async with server.listen("twice", autoping=False) as second:
            await first_status(second)
            heard = await server.submit(flat(space), client_id="twice")
            await second.until_over(heard)
            await first.socket.close()

            async def is_deaf() -> bool:
                unheard = await server.submit(flat(space), client_id="twice")
                await server.over(unheard)
                return not await second.heard_so_far()

            # the server forgets the id a moment after the close
            await wait_until(is_deaf, PATIENCE, "the second socket hears nothing, not even status")


async def test_the_older_of_two_sockets_under_one_id_is_silent(server: Server, space: str) -> None:
    async with server.listen("twice", autoping=False) as first:
        await first_status(first)
        async with server.listen("twice") as second:
            await first_status(second)
            await second.until_over(await server.submit(flat(space), client_id="twice"))
            assert await first.heard_so_far() == []
