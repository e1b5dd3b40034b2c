"""Order, removal and interruption."""

from __future__ import annotations

from comfyui.conformance.comfy_server import PATIENCE, Server, flat, new_id, recorded, shape
from waiting import wait_until


async def test_what_waits_is_listed_as_recorded(server: Server, space: str) -> None:
    async with server.busy():
        await server.submit(flat(space), number=7)
        queue = (await server.ask("GET", "/queue")).json
    expected = recorded("run")["queued"]
    if server.old:
        del expected[3]["create_time"]
    assert shape(queue["queue_pending"]) == [shape(expected)]


async def test_the_lowest_number_runs_first_and_ties_go_by_id(server: Server, space: str) -> None:
    places = {
        "a": {},
        "b": {"front": True},
        "c": {"front": True},
        "d": {"number": -1e6},
        "e": {"number": "0.5"},
    }
    async with server.listen() as listener:
        async with server.busy():
            ids = {
                name: await server.submit(flat(f"{space}/{name}"), client_id=listener.client_id, **place)
                for name, place in places.items()
            }
            low, high = sorted((new_id(), new_id()))
            for prompt_id in (high, low):
                await server.submit(
                    flat(space), client_id=listener.client_id, prompt_id=prompt_id, number=-2e6
                )
        started: list[str] = []
        while len(started) < 7:
            started.append((await listener.until("execution_start"))["data"]["prompt_id"])
    assert started == [low, high, *(ids[name] for name in "dcbea")]


async def test_remaining_counts_running_and_waiting(server: Server, space: str) -> None:
    async with server.busy():
        await server.submit(flat(space))
        for path in ("/prompt", "/api/prompt"):
            assert (await server.ask("GET", path)).json == {"exec_info": {"queue_remaining": 2}}


async def test_delete_takes_waiting_prompts_without_a_trace(server: Server, space: str) -> None:
    async with server.busy() as blocker:
        kept, dropped = await server.submit(flat(space)), await server.submit(flat(space))
        answer = await server.ask("POST", "/queue", json={"delete": [dropped, blocker, new_id()]})
        assert (answer.status, answer.body) == (200, b"")
        assert await server.queue() == ([blocker], [kept])
        assert await server.history(dropped) is None


async def test_delete_takes_one_of_two_with_the_same_id(server: Server, space: str) -> None:
    twice = new_id()
    async with server.busy():
        for _ in range(2):
            await server.submit(flat(space), prompt_id=twice)
        await server.ask("POST", "/queue", json={"delete": [twice]})
        assert (await server.queue())[1] == [twice]


async def test_clear_takes_all_that_waits_and_leaves_what_runs(server: Server, space: str) -> None:
    async with server.busy() as blocker:
        for _ in range(3):
            await server.submit(flat(space))
        assert (await server.ask("POST", "/queue", json={"clear": False})).status == 200
        assert len((await server.queue())[1]) == 3
        await server.ask("POST", "/queue", json={"clear": True})
        assert await server.queue() == ([blocker], [])


async def test_interrupt_by_id_hits_the_running_prompt_only(server: Server, space: str) -> None:
    async with server.busy() as blocker:
        waiting = await server.submit(flat(space))
        for harmless in (waiting, new_id()):
            await server.interrupt(harmless)
        assert await server.queue() == ([blocker], [waiting])
    entry = await server.over(blocker)
    assert (entry["status"]["status_str"], entry["status"]["completed"]) == ("error", False)
    last, data = entry["status"]["messages"][-1]
    assert last == "execution_interrupted"
    assert data.keys() == recorded("run")["execution_interrupted"].keys()
    assert (await server.over(waiting))["status"]["status_str"] == "success"


async def test_interrupt_without_an_id_hits_whatever_runs(server: Server) -> None:
    async with server.busy() as blocker:
        answer = await server.ask("POST", "/interrupt", data="no json")
        assert (answer.status, answer.body) == (200, b"")
        await wait_until(lambda: server.history(blocker), PATIENCE, "it was interrupted")


async def test_an_idle_interrupt_does_not_touch_the_next_prompt(server: Server, space: str) -> None:
    assert (await server.ask("POST", "/interrupt")).status == 200
    assert (await server.run(flat(space)))["status"]["status_str"] == "success"


async def test_bodies_that_are_no_json_or_no_object_are_500(server: Server) -> None:
    assert (await server.ask("POST", "/queue", data="x")).status == 500
    assert (await server.ask("POST", "/history", data="x")).status == 500
    assert (await server.ask("POST", "/interrupt", json=[1])).status == 500
