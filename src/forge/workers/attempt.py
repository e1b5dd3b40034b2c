"""One attempt of one job: start or adopt, wait, keep the pictures, conclude. What happens ends in the log.

An attempt is one prompt at ComfyUI, whose id follows from job and attempt: a redelivered order finds it there
and adopts it instead of drawing twice. A place is given back only when the outcome is in the log and ComfyUI
neither runs nor queues the prompt. However an attempt ends, nothing of it stays at ComfyUI: no prompt, no
entry in its history, and no files where forge shares its folders.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import msgspec
from nats.aio.client import Client

from forge.comfyui.backends import Backends
from forge.comfyui.client import Comfy
from forge.comfyui.folders import Folders
from forge.comfyui.protocol import Output
from forge.comfyui.workflows import Workflow, labels, render
from forge.commands import Jobs, Loaded
from forge.domain.ids import asset_id, prompt_id
from forge.domain.jobs import (
    Adopt,
    Complete,
    FailAttempt,
    Redirect,
    Start,
    Status,
    exhausted,
    sent_to,
    stranded,
)
from forge.errors import (
    BackendUnreachable,
    BackendWedged,
    ForgeError,
    LogUnavailable,
    NeverSent,
    PromptLost,
    PromptRejected,
    StaleAttempt,
    WorkflowInvalid,
)
from forge.events.assets import AssetReady, AssetStored
from forge.events.catalogue import Event
from forge.events.jobs import Produced
from forge.images import Picture, Workshop
from forge.store import Store
from forge.workers.loop import Delivery, Outcome
from forge.workers.orders import Order
from forge.workers.progress import Feed

log = logging.getLogger("forge.generation")

MAX_PICTURE_BYTES = 256 * 1024 * 1024
"""More than any picture of 4096² takes; a ComfyUI that sends more is not drawing."""


class Studio(msgspec.Struct, frozen=True):
    """What every attempt of this worker works with; ``folders`` by the address of their backend."""

    worker: str
    nc: Client
    jobs: Jobs
    backends: Backends
    folders: dict[str, Folders]
    workflows: dict[str, Workflow]
    store: Store
    workshop: Workshop
    asset_ttl_seconds: int


class Attempt:
    """Runs one order to its end."""

    def __init__(self, studio: Studio, order: Order, loaded: Loaded, delivery: Delivery) -> None:
        self.studio, self.order, self.loaded, self.delivery = studio, order, loaded, delivery
        self.prompt = prompt_id(order.job_id, order.attempt)

    async def run(self, cancelled: asyncio.Event) -> Outcome:
        """Do what is left to do; ends early, with everything withdrawn, when the job is cancelled."""
        flow = asyncio.create_task(self._flow(), name=f"attempt {self.order.attempt} of {self.order.job_id}")
        notice = asyncio.create_task(cancelled.wait())
        try:
            await asyncio.wait({flow, notice}, return_when=asyncio.FIRST_COMPLETED)
            if flow.done():
                return flow.result()
        finally:
            flow.cancel()
            notice.cancel()
            await asyncio.gather(flow, notice, return_exceptions=True)
        return await self._withdraw()

    async def _flow(self) -> Outcome:
        if not self._current():
            return await self._withdraw()
        try:
            comfy = await (self._start() if self.loaded.job.status is Status.PENDING else self._adopt())
            outputs = await self._wait(comfy)
            await self._keep(outputs, comfy)
        except StaleAttempt:
            return await self._withdraw()
        except LogUnavailable:
            raise
        except Exception as error:
            return await self._fail(error)
        return Outcome.DONE

    def _current(self) -> bool:
        """Whether the log still wants this order's attempt."""
        job, attempt = self.loaded.job, self.order.attempt
        return (job.status is Status.PENDING and attempt == job.attempt + 1) or (
            job.status is Status.RUNNING and attempt == job.attempt
        )

    # ------------------------------------------------------------- beginning

    async def _start(self) -> Comfy:
        """Choose a backend, write down the start, submit."""
        order, studio = self.order, self.studio
        workflow = self._workflow()
        comfy, why = await studio.backends.available()
        reason = f"{order.reason}; backend: {why}"
        await self._act(Start(order.attempt, studio.worker, comfy.url, reason), "start")
        label = f"{order.job_id}/{order.attempt}"
        graph = render(workflow, self.loaded.request.params, filename_prefix=f"forge/{label}/picture")
        while True:
            try:
                await comfy.submit(
                    self.prompt, graph, outputs=workflow.outputs, label=label, permitted=self._permitted
                )
            except NeverSent as unsent:
                comfy = await self._redirect(comfy, unsent)
            else:
                return comfy

    def _permitted(self) -> None:
        if not self.delivery.held:
            raise LogUnavailable("the lease was lost before submitting")

    async def _redirect(self, comfy: Comfy, unsent: NeverSent) -> Comfy:
        """Choose again, which may mean to wait: no attempt is spent where nothing was sent."""
        studio, job = self.studio, self.loaded.job
        studio.backends.refused(comfy.url, unsent.detail)
        if stranded(job):
            raise unsent
        other, why = await studio.backends.available()
        command = Redirect(job.attempt, studio.worker, other.url, f"{self.order.reason}; backend: {why}")
        await self._act(command, f"redirect/{job.redirection + 1}")
        return other

    async def _adopt(self) -> Comfy:
        """Take over a prompt that was submitted before; waiting for it tells whether ComfyUI knows it."""
        job, studio = self.loaded.job, self.studio
        if exhausted(job):
            raise PromptLost(f"{job.adoption} workers were lost on this attempt")
        await self._act(Adopt(job.attempt, studio.worker), f"adopt/{job.adoption + 1}")
        comfy = studio.backends.named(job.backend)
        if comfy is None:
            raise PromptLost(f"{job.backend} is no longer a backend of this forge")
        log.info("adopted", extra={"job": str(job.id), "attempt": job.attempt, "backend": job.backend})
        return comfy

    async def _wait(self, comfy: Comfy) -> list[Output]:
        async with Feed(self.studio.nc, self.order) as feed:
            return await comfy.wait(
                self.prompt, timeout=self._workflow().timeout_seconds, on_progress=feed.update
            )

    def _workflow(self) -> Workflow:
        job_type = self.loaded.request.job_type
        try:
            return self.studio.workflows[job_type]
        except KeyError:
            raise WorkflowInvalid(f"this forge has no job type {job_type!r} any more") from None

    # --------------------------------------------------------------- keeping

    async def _keep(self, outputs: list[Output], comfy: Comfy) -> None:
        """File first, event after: a row is never without its picture."""
        studio, order = self.studio, self.order
        async with studio.store.workspace(f"{order.job_id}-{order.attempt}-{uuid4().hex[:8]}") as folder:
            events: list[Event] = []
            produced: list[Produced] = []
            for position, output in enumerate(outputs):
                picture = await self._fetch(comfy, output, folder / f"{position}")
                path = await studio.store.keep(picture)
                stored = self._stored(position, picture, path)
                events += [stored, _ready(stored)]
                produced.append(_produced(stored))
            # the folder goes afterwards: nobody should wait for that
            command = Complete(order.attempt, studio.worker, tuple(produced), datetime.now(UTC))
            await self._act(command, "complete", before=events)
        await self._tidy(comfy)

    async def _fetch(self, comfy: Comfy, output: Output, target: Path) -> Picture:
        chunks = comfy.fetch(output, max_bytes=MAX_PICTURE_BYTES)
        await self.studio.store.receive(chunks, target, max_bytes=MAX_PICTURE_BYTES)
        return await self.studio.workshop.develop(target, target.parent)

    def _stored(self, position: int, picture: Picture, path: Path) -> AssetStored:
        request, now = self.loaded.request, datetime.now(UTC)
        ttl = request.ttl_seconds or self.studio.asset_ttl_seconds
        return AssetStored(
            asset_id=asset_id(picture.content_hash),
            job_id=request.job_id,
            user_id=request.user_id,
            asset_type=request.asset_type,
            content_hash=picture.content_hash,
            pixel_hash=picture.pixel_hash,
            format=picture.format,
            file_path=str(path),
            file_size_bytes=picture.size_bytes,
            width=picture.width,
            height=picture.height,
            dominant_color=picture.dominant_color,
            position=position,
            generation_params=request.params,
            created_at=now,
            expires_at=now + timedelta(seconds=ttl),
            session_id=request.session_id,
            character_id=request.character_id,
            **labels(self._workflow(), request.params),
        )

    # ---------------------------------------------------------------- ending

    async def _fail(self, error: Exception) -> Outcome:
        """Write down that the attempt came to nothing, once ComfyUI is rid of the prompt."""
        if isinstance(error, ForgeError):
            code, message = error.code, error.detail[:500]
        else:
            log.error("an attempt broke", exc_info=error, extra={"job": str(self.order.job_id)})
            code, message = "internal", "something in forge broke; its log tells more"
        known = self.loaded.job.worker
        await self._reload()
        if not self._current() or self.loaded.job.worker != known:
            return await self._withdraw()
        if not isinstance(error, NeverSent):
            await self._rid(error)
        final = isinstance(error, PromptRejected | WorkflowInvalid)
        command = FailAttempt(self.order.attempt, code, message, final, datetime.now(UTC))
        with suppress(StaleAttempt):
            if self.loaded.job.status is Status.PENDING:  # it broke before its start was written
                await self._act(Start(self.order.attempt, self.studio.worker, "", self.order.reason), "start")
            await self._act(command, "fail")
        return Outcome.DONE

    async def _withdraw(self) -> Outcome:
        """The log no longer wants this attempt: take its prompt out of ComfyUI, throw its result away."""
        await self._reload()
        job, same = self.loaded.job, self.loaded.job.attempt == self.order.attempt
        if same and job.status is Status.RUNNING:
            return Outcome.LEAVE  # somebody else has it, and waits for that very prompt
        comfy = self._comfy()
        if same and job.status is Status.COMPLETED and comfy is not None:
            await self._tidy(comfy)
        else:
            await self._rid(None)
        return Outcome.DONE

    async def _rid(self, cause: Exception | None) -> None:
        """Take the prompt and all that came of it out of ComfyUI, or see to it that this is done later."""
        comfy = self._comfy()
        if comfy is None:
            return
        try:
            if isinstance(cause, BackendUnreachable):
                raise cause
            if not isinstance(cause, PromptRejected):
                await comfy.cancel(self.prompt)
        except BackendWedged as wedged:
            self.studio.backends.quarantine(comfy.url, wedged.detail, self.prompt)
        except BackendUnreachable:
            self.studio.backends.disown(comfy.url, self.prompt)
        else:
            await self._tidy(comfy)

    async def _tidy(self, comfy: Comfy) -> None:
        """Remove what the ended prompt left: its history entry, and its files where they can be reached.

        What stays is found by the scheduler, see ``workers/leftovers.py``.
        """
        with suppress(ForgeError):
            await comfy.forget(self.prompt)
        folders = self.studio.folders.get(comfy.url)
        if folders is not None:
            try:
                await asyncio.to_thread(folders.remove, self.order.job_id, self.order.attempt)
            except OSError as error:
                log.warning("left at ComfyUI", extra={"job": str(self.order.job_id), "reason": str(error)})

    def _comfy(self) -> Comfy | None:
        """The backend this order's attempt was meant for."""
        facts = (record.event for record in self.loaded.facts)
        return self.studio.backends.named(sent_to(facts, self.order.attempt))

    async def _reload(self) -> None:
        order = self.order
        self.loaded = await self.studio.jobs.load(
            order.user_id, order.job_id, order.submitted_seq, order.admitted_seq
        )

    async def _act(
        self,
        command: Start | Adopt | Redirect | Complete | FailAttempt,
        name: str,
        before: list[Event] | None = None,
    ) -> None:
        worker = self.studio.worker
        self.loaded = await self.studio.jobs.act(
            self.loaded,
            command,
            actor=f"worker:{worker}",
            name=f"{self.order.attempt}/{name}/{worker}",
            before=before or (),
        )


def _ready(stored: AssetStored) -> AssetReady:
    return AssetReady(
        asset_id=stored.asset_id,
        asset_type=stored.asset_type,
        job_id=stored.job_id,
        user_id=stored.user_id,
        content_hash=stored.content_hash,
        format=stored.format,
        width=stored.width,
        height=stored.height,
        file_size_bytes=stored.file_size_bytes,
        url=f"/api/v1/comfyui/assets/{stored.asset_id}/file",
        session_id=stored.session_id,
        character_id=stored.character_id,
        category=stored.category,
        archetype_id=stored.archetype_id,
        variant_key=stored.variant_key,
    )


def _produced(stored: AssetStored) -> Produced:
    return Produced(
        asset_id=stored.asset_id,
        asset_type=stored.asset_type,
        content_hash=stored.content_hash,
        format=stored.format,
        size_bytes=stored.file_size_bytes,
    )
