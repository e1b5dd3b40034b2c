"""What can be asked of one ComfyUI server, one exchange at a time; what follows from it is the client's."""

from __future__ import annotations

from typing import Any, BinaryIO
from urllib.parse import quote

from forge.comfyui import protocol
from forge.comfyui.http import Http, form
from forge.comfyui.protocol import Health, Sighting
from forge.errors import BackendUnreachable, PictureRefused


class Server:
    """ComfyUI's routes. Versions are told apart by what they answer, never by their number."""

    def __init__(self, http: Http) -> None:
        self.http = http
        self._jobs_api = True
        self._version: str | None = None

    def restarted(self) -> None:
        """Forget what was learnt about it: another version may have been started."""
        self._jobs_api = True
        self._version = None

    async def look(self, prompt_id: str) -> Sighting:
        """Where it has the prompt now: one read where there is a jobs API, else queue, then history.

        In that order a prompt cannot slip through, for it moves from queue to history in one step.

        Raises:
            BackendUnreachable: no answer, or none that makes sense. Never mistaken for ABSENT.
        """
        if self._jobs_api:
            sighting = await self._look_at_job(prompt_id)
            if sighting is not None:
                return sighting
        sighting = protocol.queue_sighting(await self._read("/queue"), prompt_id)
        if sighting is not None:
            return sighting
        entry = await self.entry(prompt_id)
        return Sighting.ABSENT if entry is None else protocol.entry_sighting(entry)

    async def _look_at_job(self, prompt_id: str) -> Sighting | None:
        answer = await self.http.ask("GET", f"/api/jobs/{prompt_id}")
        body = protocol.decode(answer.body)
        if answer.status == 404 and not (isinstance(body, dict) and "error" in body):
            self._jobs_api = False  # an unknown route is 404 too, with an empty body
            return None
        if answer.status == 404:
            return Sighting.ABSENT
        # Somebody's null extra_pnginfo makes this route answer 500 for everybody.
        return protocol.job_sighting(body) if answer.status == 200 and isinstance(body, dict) else None

    async def entry(self, prompt_id: str) -> dict[str, Any] | None:
        """The prompt's entry in history, or None."""
        return protocol.history_entry(await self._read(f"/history/{prompt_id}"), prompt_id)

    async def stop(self, prompt_id: str) -> None:
        """Take the prompt out of the queue, or interrupt it if it runs; always by its id."""
        answer = await self.http.ask("POST", f"/api/jobs/{prompt_id}/cancel")
        if answer.status == 200:
            return
        body = {"delete": [prompt_id]}
        await self.http.ask("POST", "/queue", data=protocol.encode(body))
        if prompt_id in await self.running():
            await self.http.ask("POST", "/interrupt", data=protocol.encode({"prompt_id": prompt_id}))

    async def running(self) -> list[str]:
        """The prompts it says it is executing; one, or none."""
        return protocol.queued_ids(await self._read("/queue"), "queue_running")

    async def labelled(self) -> dict[str, str]:
        """Prompt id → label of the prompts it runs or queues and that were given one."""
        return protocol.queued_labels(await self._read("/queue"))

    async def forget(self, prompt_id: str) -> None:
        """Drop the prompt's entry from history; its files stay."""
        await self.http.ask("POST", "/history", data=protocol.encode({"delete": [prompt_id]}))

    async def upload(self, name: str, data: bytes | BinaryIO, folder: str) -> str:
        """Store an input picture; returns the name to use in a graph, which may differ from `name`.

        The same bytes under the same name give the same name again, so repeating is harmless.

        Raises:
            PictureRefused: ComfyUI refuses it, or answers with a name forge will not use.
        """
        answer = await self.http.ask(
            "POST", "/upload/image", data=form(name, data, {"type": "input", "subfolder": folder})
        )
        if answer.status in (400, 413):
            raise PictureRefused(f"ComfyUI refused the upload of {name!r} with {answer.status}")
        match protocol.decode(answer.body):
            case {"name": str(stored), "subfolder": str(place)} if answer.status == 200:
                if protocol.is_safe_name(stored) and protocol.is_safe_folder(place):
                    return f"{place}/{stored}" if place else stored
                raise PictureRefused(f"ComfyUI stored the upload under {stored[:80]!r}")
            case _:
                raise BackendUnreachable(f"ComfyUI answered {answer.status} to an upload")

    async def node(self, name: str) -> dict[str, Any]:
        """What it says of a node class, empty where it has none.

        Raises:
            BackendUnreachable: no answer.
        """
        found = (await self._read(f"/object_info/{quote(name, safe='')}")).get(name)
        return found if isinstance(found, dict) else {}

    async def health(self, timeout: float) -> Health:
        """One probe of at most `timeout` seconds; never raises."""
        try:
            match await self._read("/prompt", timeout=timeout):
                case {"exec_info": {"queue_remaining": int(remaining)}}:
                    return Health(True, await self._known_version(timeout), remaining)
                case _:
                    return Health(False, detail="it is no ComfyUI")
        except BackendUnreachable as error:
            return Health(False, detail=error.detail)

    async def _known_version(self, timeout: float) -> str:
        if self._version is None:
            stats = await self._read("/system_stats", timeout=timeout)
            system = stats.get("system")
            self._version = str(system.get("comfyui_version", "")) if isinstance(system, dict) else ""
        return self._version

    async def _read(self, path: str, timeout: float | None = None) -> dict[str, Any]:
        answer = await self.http.ask("GET", path, timeout=timeout)
        body = protocol.decode(answer.body)
        if answer.status != 200 or not isinstance(body, dict):
            raise BackendUnreachable(f"ComfyUI answered {answer.status} to GET {path}")
        return body
