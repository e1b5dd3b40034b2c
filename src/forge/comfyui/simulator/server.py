"""One simulated ComfyUI: its memory, its worker, its HTTP server, and the ways to break it."""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from forge.comfyui.simulator.catalogue import Catalogue
from forge.comfyui.simulator.control import control_routes
from forge.comfyui.simulator.files import file_routes
from forge.comfyui.simulator.folders import Folders
from forge.comfyui.simulator.frontend import frontend_routes, same_origin
from forge.comfyui.simulator.info import features, info_routes, internal_routes
from forge.comfyui.simulator.jobs import job_routes
from forge.comfyui.simulator.memory import Memory
from forge.comfyui.simulator.options import Faults, SimulatorOptions
from forge.comfyui.simulator.prompts import prompt_routes
from forge.comfyui.simulator.queue import PromptQueue
from forge.comfyui.simulator.record import Record
from forge.comfyui.simulator.sockets import Sockets
from forge.comfyui.simulator.worker import Worker
from forge.errors import ServerFailed

_quiet = logging.getLogger("forge.comfyui.simulator")
_quiet.addHandler(logging.NullHandler())
_quiet.propagate = False  # the 500s it answers on purpose would fill every test log


class Simulator:
    """A running simulator: `async with Simulator(options) as simulator: ...`.

    Attributes:
        url: where it serves, known once entered.
        folders: its output/, input/ and temp/.
        record: what really happened, over all restarts in place.
        perished: set when a prompt ended the process; it then refuses connections.
    """

    def __init__(self, options: SimulatorOptions | None = None) -> None:
        self.options = options or SimulatorOptions()
        self._port = self.options.port
        self._ending: asyncio.Task[None] | None = None
        self.perished = asyncio.Event()

    @property
    def url(self) -> str:
        host = self.options.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}"

    @property
    def output(self) -> Path:
        """The folder SaveImage writes to."""
        return self.folders.path("output")

    @property
    def faults(self) -> Faults:
        return self._memory.worker.faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._memory.worker.faults = faults
        flowing = self._memory.sockets.flowing
        flowing.clear() if faults.blocked else flowing.set()

    def render(self, least_ms: int, most_ms: int) -> None:
        """Let every prompt from now on take a duration between these."""
        self._memory.worker.render_ms = (least_ms, most_ms)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self.record = Record(self.options.record)
            stack.callback(self.record.close)
            base = self.options.output_dir
            if base is None:
                base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="comfyui-simulator-")))
            self.folders = Folders(base)
            self._catalogue = Catalogue(self.options.checkpoints, self.options.loras)
            self._remember()
            stack.push_async_callback(self._end_memory)
            self.render(*self.options.render_ms)
            self.faults = self.options.faults
            self._runner = self._make_runner()
            stack.push_async_callback(self._runner.cleanup)
            await self._runner.setup()
            await self._start_site()
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._ending is not None:
            await self._ending
        await self._memory.sockets.close_all()
        await self._exit.aclose()

    async def _end_memory(self) -> None:
        await self._memory.end()  # whichever memory is the last

    async def forget(self) -> None:
        """Restart in place: memory empty, numbers from 0, temp/ wiped, sockets dropped with 1006."""
        old = self._memory
        await old.end()
        old.sockets.abort_all()
        self.folders.wipe_temp()
        self._remember()
        self.render(*old.worker.render_ms)
        self.faults = old.worker.faults
        self.record.add("booted", present=0)

    async def go_down(self, seconds: float) -> None:
        """Refuse connections for a while, then come back as after a restart."""
        await self.leave()
        await asyncio.sleep(seconds)
        await self.come_back()

    async def leave(self) -> None:
        """Refuse connections until :meth:`come_back`."""
        await self._hang_up()
        await self.forget()

    async def come_back(self) -> None:
        """Answer again, as after a restart."""
        await self._start_site()

    def drop_sockets(self) -> None:
        """Cut every WebSocket without a close frame."""
        self._memory.sockets.abort_all()

    async def _hang_up(self) -> None:
        await self._site.stop()
        for connection in list(self._runner.server.connections if self._runner.server else []):
            if connection.transport is not None:
                connection.transport.abort()

    async def _perish(self) -> None:
        """End as a killed process does; nothing answers any more."""
        self._memory.sockets.abort_all()
        await self._hang_up()
        self.perished.set()

    @property
    def memory(self) -> Memory:
        return self._memory

    def _remember(self) -> None:
        options = self.options
        queue = PromptQueue(lambda: sockets.send("status", {"status": queue.status()}))
        sockets = Sockets(queue.status, features(options))
        worker = Worker(queue, sockets, self.folders, self.record, options.version, options.seed)
        self._memory = Memory(queue, sockets, worker)
        self._memory.start(on_crash=self._crashed)

    def _crashed(self) -> None:
        self._ending = asyncio.create_task(self._perish())

    def _make_runner(self) -> web.AppRunner:
        application = web.Application(
            middlewares=[self._wait_first, same_origin], client_max_size=self.options.max_upload_bytes
        )
        bare = [
            *prompt_routes(self, self._catalogue),
            *file_routes(self),
            *info_routes(self, self._catalogue),
        ]
        application.add_routes(bare)
        application.add_routes([web.route(r.method, f"/api{r.path}", r.handler) for r in bare])
        if self.options.version != "0.3.64":
            application.add_routes(job_routes(self))
        application.add_routes([*internal_routes(self), *control_routes(self)])
        application.add_routes(frontend_routes(self.folders))
        return web.AppRunner(
            application, access_log=None, logger=_quiet, shutdown_timeout=0.1, handle_signals=False
        )

    async def _start_site(self) -> None:
        self._site = web.TCPSite(self._runner, self.options.host, self._port, reuse_address=True)
        try:
            await self._site.start()
        except OSError as error:
            where = f"{self.options.host}:{self._port}"
            raise ServerFailed(f"the simulator cannot listen on {where}: {error}") from error
        self._port = self._runner.addresses[0][1]

    @web.middleware
    async def _wait_first(
        self, request: web.Request, handler: Callable[[web.Request], Any]
    ) -> web.StreamResponse:
        if self.faults.slow_http_ms and not request.path.startswith("/simulator/"):
            await asyncio.sleep(self.faults.slow_http_ms / 1000)
        response: web.StreamResponse = await handler(request)
        return response


def run(options: SimulatorOptions, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `on_ready` gets the URL once it answers."""
    asyncio.run(_serve(options, on_ready))


async def _serve(options: SimulatorOptions, on_ready: Callable[[str], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Simulator(options) as simulator:
        on_ready(simulator.url)
        waits = [asyncio.create_task(event.wait()) for event in (stop, simulator.perished)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
