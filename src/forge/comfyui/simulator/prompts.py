"""Submitting, listing, cancelling: `/prompt`, `/queue`, `/interrupt`, `/history`, `/free`, `/ws`."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import TYPE_CHECKING, Any

from aiohttp import web

from forge.comfyui.simulator.catalogue import Catalogue
from forge.comfyui.simulator.queue import Item
from forge.comfyui.simulator.validation import Verdict, problem, validate

if TYPE_CHECKING:
    from forge.comfyui.simulator.server import Simulator

SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")


def prompt_routes(simulator: Simulator, catalogue: Catalogue) -> list[web.RouteDef]:
    """The routes about prompts."""
    prompts = _Prompts(simulator, catalogue)
    return [
        web.post("/prompt", prompts.submit),
        web.get("/prompt", prompts.remaining),
        web.get("/queue", prompts.queue),
        web.post("/queue", prompts.change_queue),
        web.post("/interrupt", prompts.interrupt),
        web.get("/history", prompts.history),
        web.get("/history/{prompt_id}", prompts.one_history),
        web.post("/history", prompts.change_history),
        web.post("/free", prompts.free),
        web.get("/ws", prompts.socket),
    ]


def is_canonical_uuid(text: Any) -> bool:
    """Whether this is a UUID in lower-case hyphenated form."""
    try:
        return isinstance(text, str) and str(uuid.UUID(text)) == text
    except ValueError:
        return False


def remove_pending(simulator: Simulator, prompt_id: str) -> bool:
    """Take a waiting prompt out of the queue, and note it."""
    removed = simulator.memory.queue.delete(prompt_id)
    if removed:
        simulator.record.add("removed", present=simulator.memory.queue.remaining, prompt_id=prompt_id)
    return removed


class _Prompts:
    """Handlers; whatever raises here is a 500, exactly where the server has one."""

    def __init__(self, simulator: Simulator, catalogue: Catalogue) -> None:
        self._simulator = simulator
        self._catalogue = catalogue

    async def submit(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        memory = self._simulator.memory
        if memory.worker.faults.take_delay_ms:
            await asyncio.sleep(memory.worker.faults.take_delay_ms / 1000)
        if memory.worker.spend("refuse_next"):
            raise RuntimeError("refused on purpose")
        if "number" in body:
            number = float(body["number"])
        else:
            counted = memory.queue.next_number()
            # a JSON array gets this far on the server, too, and ends in `no_prompt`: it has no .get
            first = "front" in body and body["front"]
            number = -counted if first else counted
        if "prompt" not in body:
            return _refused(problem("no_prompt", "No prompt provided", "No prompt provided"), {})
        prompt_id = self._prompt_id(body)
        if prompt_id is None:
            return _refused(_INVALID_ID, {})
        verdict = self._verdict(body)
        if verdict.error is not None:
            return _refused(verdict.error, verdict.node_errors)
        self._queue(number, prompt_id, body, verdict.outputs)
        return await self._answer(request, number, prompt_id, verdict.node_errors)

    def _prompt_id(self, body: dict[str, Any]) -> str | None:
        if self._simulator.options.version == "0.3.64":
            return str(body.get("prompt_id", uuid.uuid4()))
        given = body.get("prompt_id")
        if given is None:
            return str(uuid.uuid4())
        return given if is_canonical_uuid(given) else None

    def _verdict(self, body: dict[str, Any]) -> Verdict:
        return validate(
            body["prompt"],
            body.get("partial_execution_targets"),
            self._catalogue.classes,
            lambda name: self._simulator.folders.named_file(name) is not None,
            self._simulator.options.version,
        )

    def _queue(self, number: float, prompt_id: str, body: dict[str, Any], outputs: list[str]) -> None:
        extra: dict[str, Any] = body.get("extra_data", {})
        if "client_id" in body:
            extra["client_id"] = body["client_id"]
        for secret in SECRETS:
            extra.pop(secret, None)
        if self._simulator.options.version != "0.3.64":
            extra["create_time"] = int(time.time() * 1000)
        queue = self._simulator.memory.queue
        try:
            queue.put(Item(number, prompt_id, body["prompt"], extra, outputs))
        finally:
            self._simulator.record.add(
                "submitted",
                present=queue.remaining,
                prompt_id=prompt_id,
                number=number,
                client_id=extra.get("client_id"),
            )

    async def _answer(
        self, request: web.Request, number: float, prompt_id: str, node_errors: dict[str, Any]
    ) -> web.StreamResponse:
        worker = self._simulator.memory.worker
        if worker.faults.answer_delay_ms:
            await asyncio.sleep(worker.faults.answer_delay_ms / 1000)
        if worker.spend("queue_and_refuse_next"):
            raise RuntimeError("queued, but refused on purpose")
        if worker.spend("hang_up_next"):
            assert request.transport is not None
            request.transport.abort()
        if worker.spend("node_errors_next"):
            said = problem("value_not_in_list", "Value not in list", "simulated", {"input_name": "simulated"})
            node_errors = {"0": {"errors": [said], "dependent_outputs": ["0"], "class_type": "SaveImage"}}
        return web.json_response({"prompt_id": prompt_id, "number": number, "node_errors": node_errors})

    async def remaining(self, request: web.Request) -> web.Response:
        return web.json_response(self._simulator.memory.queue.status())

    async def queue(self, request: web.Request) -> web.Response:
        queue = self._simulator.memory.queue
        running = [list(queue.running)] if queue.running is not None else []
        return web.json_response(
            {"queue_running": running, "queue_pending": [list(i) for i in queue.pending]}
        )

    async def change_queue(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("clear"):
            queue = self._simulator.memory.queue
            for item in queue.clear():
                self._simulator.record.add("removed", present=queue.remaining, prompt_id=item.prompt_id)
        if "delete" in body:
            for prompt_id in body["delete"]:
                remove_pending(self._simulator, prompt_id)
        return web.Response()

    async def interrupt(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except json.JSONDecodeError:
            body = {}
        self._simulator.memory.worker.interrupt(body.get("prompt_id") or None)
        return web.Response()

    async def history(self, request: web.Request) -> web.Response:
        limit = request.query.get("max_items")
        offset = int(request.query.get("offset", -1))
        queue = self._simulator.memory.queue
        return web.json_response(queue.listing(None if limit is None else int(limit), offset))

    async def one_history(self, request: web.Request) -> web.Response:
        prompt_id = request.match_info["prompt_id"]
        entry = self._simulator.memory.queue.history.get(prompt_id)
        return web.json_response({} if entry is None else {prompt_id: entry})

    async def change_history(self, request: web.Request) -> web.Response:
        body = await request.json()
        history = self._simulator.memory.queue.history
        if body.get("clear"):
            history.clear()
        if "delete" in body:
            for prompt_id in body["delete"]:
                history.pop(prompt_id, None)
        return web.Response()

    async def free(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body.get("free_memory"):
            self._simulator.memory.worker.cache.clear()
        return web.Response()

    async def socket(self, request: web.Request) -> web.WebSocketResponse:
        return await self._simulator.memory.sockets.serve(request)


_INVALID_ID = problem(
    "invalid_prompt_id",
    "prompt_id must be a valid UUID",
    "prompt_id must be a UUID string in canonical lowercase hyphenated form; "
    "omit it to let the server generate one",
)


def _refused(error: dict[str, Any], node_errors: dict[str, Any]) -> web.Response:
    return web.json_response({"error": error, "node_errors": node_errors}, status=400)
