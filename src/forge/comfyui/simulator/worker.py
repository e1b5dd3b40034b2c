"""The one worker of a ComfyUI: runs prompts in order, says what it does, writes history."""

from __future__ import annotations

import asyncio
import random
import time
import traceback
from hashlib import blake2b
from typing import Any

import msgspec
from PIL import Image

from forge.comfyui.simulator import previews
from forge.comfyui.simulator.cache import Result, ResultCache, signatures
from forge.comfyui.simulator.folders import Folders
from forge.comfyui.simulator.nodes import compute, is_heavy
from forge.comfyui.simulator.options import Faults, Version
from forge.comfyui.simulator.order import order_of
from forge.comfyui.simulator.pictures import draw
from forge.comfyui.simulator.queue import Item, PromptQueue
from forge.comfyui.simulator.record import Record
from forge.comfyui.simulator.running import Run
from forge.comfyui.simulator.saving import SAVERS, Saver
from forge.comfyui.simulator.sockets import Sockets

PROGRESS_SECONDS = 0.1
SAMPLERS = ("KSampler", "KSamplerAdvanced")


class Interrupted(Exception):
    """The interrupt flag was seen."""


class Worker:
    """Takes prompts from the queue until cancelled."""

    def __init__(
        self,
        queue: PromptQueue,
        sockets: Sockets,
        folders: Folders,
        record: Record,
        version: Version,
        seed: int,
    ) -> None:
        self._faults = Faults()
        self._thawed = asyncio.Event()
        self._thawed.set()
        self.render_ms = (0, 0)
        self.cache = ResultCache()
        self.interrupt_flag = asyncio.Event()
        self._queue = queue
        self._sockets = sockets
        self._folders = folders
        self._record = record
        self._version = version
        self._durations = random.Random(seed)
        self._saver = Saver(folders)

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._faults = faults
        if faults.frozen:
            self._thawed.clear()
        else:
            self._thawed.set()

    async def run(self) -> None:
        """Execute prompts one at a time, for ever."""
        while True:
            item = await self._queue.take()
            self.interrupt_flag.clear()
            await asyncio.sleep(0)  # the answer to the POST goes out before the first message
            await self._run_prompt(item)

    def interrupt(self, prompt_id: str | None) -> bool:
        """Raise the flag if that prompt (None: any) is running."""
        running = self._queue.running
        if running is None or prompt_id not in (None, running.prompt_id):
            return False
        self.interrupt_flag.set()
        return True

    def spend(self, fault: str) -> bool:
        """Use up one of a fault that counts down; False when none is left."""
        left: int = getattr(self.faults, fault)
        if left > 0:
            self.faults = msgspec.structs.replace(self.faults, **{fault: left - 1})
        return left > 0

    async def _run_prompt(self, item: Item) -> None:
        run = Run(item, self._sockets, noise=self.faults.noise)
        self._sockets.last_client = item.client_id
        self._record.add("started", present=self._queue.remaining, prompt_id=run.prompt_id)
        run.message("execution_start", {})
        await self._thawed.wait()
        status = await self._execute(run)
        if self.faults.history_delay_ms:
            await asyncio.sleep(self.faults.history_delay_ms / 1000)
        if self.spend("empty_outputs_next"):
            run.outputs = {}
        self._sockets.last_node = None
        self._queue.finish(run.entry(status))
        self._record.add(
            "ended",
            present=self._queue.remaining,
            prompt_id=run.prompt_id,
            status=run.messages[-1][0],
            outputs=run.outputs,
        )
        run.tell_owner("executing", {"node": None, "prompt_id": run.prompt_id})

    async def _execute(self, run: Run) -> str:
        keys = signatures(run.item.graph, self._fingerprint)
        self.cache.keep_only(keys)
        if self.spend("stale_next"):
            self._forge_stale(run, keys)
        found = {node_id: self.cache.get(key) for node_id, key in keys.items()}
        run.message("execution_cached", {"nodes": [node_id for node_id, result in found.items() if result]})
        plan = order_of(run.item, {node_id for node_id, result in found.items() if result})
        for node_id in run.item.outputs:
            self._show_cached(run, node_id, found[node_id])
        samplers = sum(run.item.graph[node_id]["class_type"] in SAMPLERS for node_id in plan)
        seconds = self._durations.randint(*self.render_ms) / 1000 if plan and self.render_ms[1] else 0.0
        for index, node_id in enumerate(plan):
            class_type = run.item.graph[node_id]["class_type"]
            slow = class_type in SAMPLERS if samplers else index == 0
            share = seconds / max(samplers, 1) if slow else 0.0
            for name, result in found.items():
                if result is not None:
                    run.values.setdefault(name, result.values)
            if not await self._run_node(run, node_id, keys[node_id], share):
                return "error"
        run.message("execution_success", {})
        return "success"

    def _show_cached(self, run: Run, node_id: str, result: Result | None) -> None:
        owned = run.item.client_id is not None or self._version == "0.3.64"
        if result is not None and result.shown is not None and owned:
            run.show(node_id, result.shown)

    def _forge_stale(self, run: Run, keys: dict[str, str]) -> None:
        gone = {"filename": "gone_00001_.png", "subfolder": "", "type": "output"}
        for node_id in keys:
            shown = {"images": [gone]} if node_id in run.item.outputs else None
            self.cache.put(keys[node_id], Result((), shown))

    async def _run_node(self, run: Run, node_id: str, key: str, seconds: float) -> bool:
        """Run one node and say so; False when the prompt is over."""
        node = run.item.graph[node_id]
        inputs = {name: _resolved(run, value) for name, value in node["inputs"].items()}
        try:
            if self.interrupt_flag.is_set():
                raise Interrupted
            run.tell_progress(node_id, 0.0, 1.0, "running")
            self._sockets.last_node = node_id
            run.tell_owner(
                "executing", {"node": node_id, "display_node": node_id, "prompt_id": run.prompt_id}
            )
            if self.spend("fail_next"):
                raise RuntimeError("CUDA error: out of memory (simulated)")
            result = await self._work(run, node_id, inputs, seconds)
        except Interrupted:
            facts = {"node_id": node_id, "node_type": node["class_type"], "executed": run.executed}
            run.message("execution_interrupted", facts, everybody=True)
            return False
        except Exception as error:  # whatever a node raises becomes the prompt's error, as on the server
            run.message("execution_error", _error_facts(run, node_id, inputs, error))
            return False
        self.cache.put(key, result)
        run.values[node_id] = result.values
        if result.shown is not None:
            run.show(node_id, result.shown)
        run.executed.append(node_id)
        last = run.progress[node_id]["max"]
        run.tell_progress(node_id, last, last, "finished")
        return True

    async def _work(self, run: Run, node_id: str, inputs: dict[str, Any], seconds: float) -> Result:
        class_type = run.item.graph[node_id]["class_type"]
        if class_type in SAMPLERS:
            await self._sample(run, node_id, inputs, seconds)
        elif seconds:
            await self._wait(seconds)
        if class_type in SAVERS:
            images = await self._saver.save(run.item, class_type, inputs, self.faults)
            return Result((inputs["images"],), {"images": images})
        if class_type == "PreviewAny":
            return Result((str(inputs["source"]),), {"text": [str(inputs["source"])]})
        if class_type in SAMPLERS and self.faults.other_device:
            (latent,) = compute(class_type, inputs, self._folders)
            other = latent.wish._replace(negative=f"{latent.wish.negative} on another device")
            return Result((latent._replace(wish=other),), None)
        if is_heavy(class_type):
            return Result(await asyncio.to_thread(compute, class_type, inputs, self._folders), None)
        return Result(compute(class_type, inputs, self._folders), None)

    async def _sample(self, run: Run, node_id: str, inputs: dict[str, Any], seconds: float) -> None:
        """Progress at the first and the last step, in between ten times a second; with previews at each."""
        steps, said = int(inputs["steps"]), 0.0
        shown = await self._previewed(run, inputs)
        for step in range(1, steps + 1):
            await self._wait(seconds / steps)
            now = time.monotonic()
            if shown is None and step not in (1, steps) and now - said < PROGRESS_SECONDS:
                continue
            said = now
            if self.interrupt_flag.is_set():
                raise Interrupted
            run.tell_progress(node_id, float(step), float(steps), "running")
            run.tell_step(node_id, step, steps)
            if shown is not None:
                jpeg = await asyncio.to_thread(previews.half_done, shown, step / steps)
                modern = run.item.client_id in self._sockets.metadata_clients
                frame = previews.frame(jpeg, run.prompt_id, node_id, with_metadata=modern)
                self._sockets.send_bytes(frame, run.item.client_id)

    async def _previewed(self, run: Run, inputs: dict[str, Any]) -> Image.Image | None:
        """The picture the sampler works towards, when its prompt asked to see it come about."""
        if self._version == "0.3.64" or not previews.wants_previews(run.item):
            return None
        (latent,) = compute("KSampler", inputs, self._folders)
        return await asyncio.to_thread(draw, latent.wish)

    async def _wait(self, seconds: float) -> None:
        if seconds <= 0:
            return
        try:
            async with asyncio.timeout(seconds):
                await self.interrupt_flag.wait()
        except TimeoutError:
            await self._thawed.wait()
            return
        await self._thawed.wait()
        raise Interrupted

    def _fingerprint(self, name: str) -> str:
        path = self._folders.named_file(name)
        return "" if path is None else blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _resolved(run: Run, value: Any) -> Any:
    return run.values[value[0]][value[1]] if isinstance(value, list) and len(value) == 2 else value


def _error_facts(run: Run, node_id: str, inputs: dict[str, Any], error: Exception) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "node_type": run.item.graph[node_id]["class_type"],
        "executed": run.executed,
        "exception_message": f"{error}\n",
        "exception_type": "Exception" if isinstance(error, PermissionError) else type(error).__name__,
        "traceback": traceback.format_tb(error.__traceback__),
        "current_inputs": {name: [str(value)[:500]] for name, value in inputs.items()},
        "current_outputs": list(run.item.graph),
    }
