"""`/simulator/...`: switching faults at run time and reading the record. No real ComfyUI has these."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from forge.comfyui.simulator.options import Faults, changed_faults
from forge.errors import SettingInvalid

if TYPE_CHECKING:
    from forge.comfyui.simulator.server import Simulator


async def _go_down_after_answering(simulator: Simulator, seconds: float) -> None:
    await asyncio.sleep(0.05)
    await simulator.go_down(seconds)


def control_routes(simulator: Simulator) -> list[web.RouteDef]:
    """The routes tests steer a simulator with."""
    tasks: set[asyncio.Task[None]] = set()

    async def faults(request: web.Request) -> web.Response:
        return web.json_response(msgspec.to_builtins(simulator.faults))

    async def change_faults(request: web.Request) -> web.Response:
        try:
            simulator.faults = changed_faults(simulator.faults, await request.json())
        except SettingInvalid as error:
            return web.json_response({"error": error.detail}, status=400)
        return await faults(request)

    async def reset_faults(request: web.Request) -> web.Response:
        simulator.faults = Faults()
        return await faults(request)

    async def render(request: web.Request) -> web.Response:
        body = await request.json()
        simulator.render(int(body["least_ms"]), int(body.get("most_ms", body["least_ms"])))
        return web.Response()

    async def forget(request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        if body.get("down_ms"):
            task = asyncio.create_task(_go_down_after_answering(simulator, body["down_ms"] / 1000))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        else:
            await simulator.forget()
        return web.Response()

    async def drop_sockets(request: web.Request) -> web.Response:
        simulator.drop_sockets()
        return web.Response()

    async def record(request: web.Request) -> web.Response:
        return web.json_response(simulator.record.summary(events="events" in request.query))

    return [
        web.get("/simulator/faults", faults),
        web.post("/simulator/faults", change_faults),
        web.delete("/simulator/faults", reset_faults),
        web.post("/simulator/render", render),
        web.post("/simulator/forget", forget),
        web.post("/simulator/drop-sockets", drop_sockets),
        web.get("/simulator/record", record),
    ]
