"""The one worker of a ComfyUI: runs prompts in order, says what it does, saves files, writes history."""

from __future__ import annotations

import asyncio
import json
import random
import string
import time
import traceback
from hashlib import blake2b
from typing import Any

import msgspec

from forge.comfyui.simulator import hostile
from forge.comfyui.simulator.cache import Result, ResultCache, signatures
from forge.comfyui.simulator.catalogue import Catalogue
from forge.comfyui.simulator.folders import Folders
from forge.comfyui.simulator.nodes import compute, is_heavy
from forge.comfyui.simulator.options import Faults, Version
from forge.comfyui.simulator.png import Flat, Frame, png_bytes
from forge.comfyui.simulator.queue import Item, PromptQueue
from forge.comfyui.simulator.record import Record
from forge.comfyui.simulator.sockets import Sockets

PROGRESS_SECONDS = 0.1
SAVERS = {"SaveImage": "output", "PreviewImage": "temp"}
SAMPLERS = ("KSampler", "KSamplerAdvanced")


class Interrupted(Exception):
    """The interrupt flag was seen."""


class Run:
    """One prompt while it executes: messages so far, outputs so far, progress of each node."""

    def __init__(self, item: Item, sockets: Sockets, *, noise: bool) -> None:
        self.item = item
        self.outputs: dict[str, Any] = {}
        self.values: dict[str, tuple[Any, ...]] = {}
        self.executed: list[str] = []
        self.messages: list[list[Any]] = []
        self.progress: dict[str, dict[str, Any]] = {}
        self._sockets = sockets
        self._noise = noise

    @property
    def prompt_id(self) -> str:
        return self.item.prompt_id

    def message(self, event: str, facts: dict[str, Any], *, everybody: bool = False) -> None:
        """A message that history keeps, too."""
        data = {"prompt_id": self.prompt_id, **facts, "timestamp": int(time.time() * 1000)}
        if event == "execution_cached":
            data = {"nodes": facts["nodes"], "prompt_id": self.prompt_id, "timestamp": data["timestamp"]}
        self.messages.append([event, data])
        if self.item.client_id is not None or everybody:
            self._sockets.send(event, data, self.item.client_id)

    def tell_owner(self, event: str, data: dict[str, Any]) -> None:
        if self.item.client_id is not None:
            if self._noise:
                self._sockets.send("forge.unheard_of", {"any": ["thing", None]}, self.item.client_id)
                data = {**data, "unheard_of": {"extra": True}}
            self._sockets.send(event, data, self.item.client_id)

    def tell_progress(self, node_id: str, value: float, limit: float, state: str) -> None:
        """`progress_state` of every node started so far; without an owner it goes to everybody."""
        self.progress[node_id] = {
            "value": value,
            "max": limit,
            "state": state,
            "node_id": node_id,
            "prompt_id": self.prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }
        data = {"prompt_id": self.prompt_id, "nodes": self.progress}
        self._sockets.send("progress_state", data, self.item.client_id)

    def tell_step(self, node_id: str, step: int, steps: int) -> None:
        data = {"value": step, "max": steps, "prompt_id": self.prompt_id, "node": node_id}
        self._sockets.send("progress", data, self.item.client_id)

    def show(self, node_id: str, shown: dict[str, Any]) -> None:
        self.outputs[node_id] = shown
        self.tell_owner(
            "executed",
            {"node": node_id, "display_node": node_id, "output": shown, "prompt_id": self.prompt_id},
        )

    def entry(self, status_str: str) -> dict[str, Any]:
        """What history keeps of this run."""
        entry = {
            "prompt": list(self.item),
            "outputs": self.outputs,
            "status": {
                "status_str": status_str,
                "completed": status_str == "success",
                "messages": self.messages,
            },
            "meta": {
                node_id: {
                    "node_id": node_id,
                    "display_node": node_id,
                    "parent_node": None,
                    "real_node_id": node_id,
                }
                for node_id in self.outputs
            },
        }
        return entry | {"unheard_of": [1]} if self._noise else entry


class Worker:
    """Takes prompts from the queue until cancelled."""

    def __init__(
        self,
        queue: PromptQueue,
        sockets: Sockets,
        folders: Folders,
        catalogue: Catalogue,
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
        self._catalogue = catalogue
        self._record = record
        self._version = version
        self._durations = random.Random(seed)
        self._temp_name = "ComfyUI_temp_" + "".join(random.choices(string.ascii_lowercase, k=5))

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
        plan = _plan(run.item, {node_id for node_id, result in found.items() if result})
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
            await self._sample(run, node_id, int(inputs["steps"]), seconds)
        elif seconds:
            await self._wait(seconds)
        if class_type in SAVERS:
            images = await self._save(run, class_type, inputs)
            return Result((inputs["images"],), {"images": images})
        if class_type == "PreviewAny":
            return Result((str(inputs["source"]),), {"text": [str(inputs["source"])]})
        if is_heavy(class_type):
            return Result(await asyncio.to_thread(compute, class_type, inputs, self._folders), None)
        return Result(compute(class_type, inputs, self._folders), None)

    async def _sample(self, run: Run, node_id: str, steps: int, seconds: float) -> None:
        """Progress at the first and the last step, and in between at most ten times a second."""
        said = 0.0
        for step in range(1, steps + 1):
            await self._wait(seconds / steps)
            now = time.monotonic()
            if step in (1, steps) or now - said >= PROGRESS_SECONDS:
                said = now
                if self.interrupt_flag.is_set():
                    raise Interrupted
                run.tell_progress(node_id, float(step), float(steps), "running")
                run.tell_step(node_id, step, steps)

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

    async def _save(self, run: Run, class_type: str, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        kind = SAVERS[class_type]
        frames = inputs["images"]
        if isinstance(frames, str):
            raise AttributeError("'str' object has no attribute 'shape'")
        prefix = inputs["filename_prefix"] if kind == "output" else self._temp_name
        size = frames[0].width, frames[0].height
        folder, name, number = self._folders.numbered(kind, prefix, size)
        texts = _texts(run.item)
        saved: list[dict[str, Any]] = []
        for index, frame in enumerate(frames):
            file_name = f"{name.replace('%batch_num%', str(index))}_{number + index:05}_.png"
            content = (
                await asyncio.to_thread(png_bytes, frame, texts) if _large(frame) else png_bytes(frame, texts)
            )
            (folder / file_name).write_bytes(content)
            subfolder = str(folder.relative_to(self._folders.path(kind)))
            saved.append({"filename": file_name, "subfolder": subfolder.removeprefix("."), "type": kind})
        if self.faults.hostile:
            saved = hostile.spoil(self.faults.hostile, saved, self._folders)
        if self.faults.noise:
            saved = [entry | {"id": "a1", "metadata": {"unheard_of": 1}} for entry in saved]
        return saved

    def _fingerprint(self, name: str) -> str:
        path = self._folders.named_file(name)
        return "" if path is None else blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _large(frame: Frame) -> bool:
    return not isinstance(frame, Flat) and frame.width * frame.height > 256 * 256


def _resolved(run: Run, value: Any) -> Any:
    return run.values[value[0]][value[1]] if isinstance(value, list) and len(value) == 2 else value


def _texts(item: Item) -> dict[str, str]:
    extra: dict[str, Any] = item.extra_data.get("extra_pnginfo") or {}
    return {key: json.dumps(value) for key, value in ({"prompt": item.graph} | extra).items()}


def _plan(item: Item, cached: set[str]) -> list[str]:
    """The nodes to run, in order: as soon as they are ready, outputs first, then what an output waits for."""
    links: dict[str, set[str]] = {}
    waiting = [node_id for node_id in item.outputs if node_id not in cached]
    while waiting:
        node_id = waiting.pop()
        if node_id in links:
            continue
        inputs = item.graph[node_id]["inputs"].values()
        sources = {value[0] for value in inputs if isinstance(value, list) and len(value) == 2}
        links[node_id] = sources - cached
        waiting += links[node_id]
    outputs = set(item.outputs)
    plan: list[str] = []
    left = [node_id for node_id in item.graph if node_id in links]
    while left:
        done = set(plan)
        ready = [node_id for node_id in left if links[node_id] <= done]
        awaited = {source for node_id in left if node_id in outputs for source in links[node_id]}
        chosen = min(ready, key=lambda node_id: (node_id not in outputs, node_id not in awaited))
        plan.append(chosen)
        left.remove(chosen)
    return plan


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
