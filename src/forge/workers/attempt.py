"""One attempt of one job: start or adopt, wait, keep the pictures, conclude. What happens ends in the log.

An attempt is one prompt at ComfyUI, whose id follows from job and attempt: a redelivered order finds it there
and adopts it instead of drawing twice. A place is given back only when the outcome is in the log and ComfyUI
neither runs nor queues the prompt. However an attempt ends, nothing of it stays at ComfyUI: no prompt, no
entry in its history, and no files where forge shares its folders.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import uuid4

import msgspec
from nats.aio.client import Client

from forge.comfyui.backends import Backends
from forge.comfyui.client import Comfy
from forge.comfyui.folders import Folders
from forge.comfyui.protocol import Output
from forge.comfyui.workflows import Workflow, labels, render
from forge.commands import Jobs, Loaded, no_entries
from forge.domain.assets import answers, produced, regenerated
from forge.domain.ids import asset_id, prompt_id
from forge.domain.jobs import (
    Adopt,
    Complete,
    FailAttempt,
    Redirect,
    Reuse,
    Start,
    Status,
    exhausted,
    sent_to,
    stranded,
    suspect,
)
from forge.errors import (
    BackendUnreachable,
    BackendWedged,
    DiskFull,
    ForgeError,
    LimitReached,
    LogUnavailable,
    NeverSent,
    PromptLost,
    PromptRejected,
    StaleAttempt,
    UploadGone,
    WorkflowInvalid,
)
from forge.events.assets import AssetStored
from forge.eventstore import Entry
from forge.images import Picture, Workshop
from forge.library import Library, Shelf
from forge.resources import Capacity
from forge.store import Store
from forge.telemetry import CLIENT, part
from forge.uploads import Uploads
from forge.workers import inputs
from forge.workers.loop import Delivery, Outcome
from forge.workers.orders import Order
from forge.workers.progress import Feed
from forge.workers.thumbnails import Thumbnails

log = logging.getLogger("forge.generation")

MAX_PICTURE_BYTES = 256 * 1024 * 1024
"""More than any picture of 4096² takes; a ComfyUI that sends more is not drawing."""


class Studio(msgspec.Struct, frozen=True):
    """What every attempt of this worker works with; ``folders`` by the address of their backend."""

    worker: str
    nc: Client
    jobs: Jobs
    library: Library
    shelf: Shelf
    uploads: Uploads
    backends: Backends
    folders: dict[str, Folders]
    workflows: dict[str, Workflow]
    store: Store
    workshop: Workshop
    thumbnails: Thumbnails
    ttl_of: Callable[[str], int]
    capacity: Capacity
    suspects: asyncio.Lock = msgspec.field(default_factory=asyncio.Lock)
    """Held by the one attempt of this worker that may be what ends workers."""


class Attempt:
    """Runs one order to its end."""

    def __init__(self, studio: Studio, order: Order, loaded: Loaded, delivery: Delivery) -> None:
        self.studio, self.order, self.loaded, self.delivery = studio, order, loaded, delivery
        self.prompt = prompt_id(order.job_id, order.attempt)
        # of two deliveries of one order, to this very worker too, none may take the other's act for its own
        self._self = f"{studio.worker}/{uuid4().hex[:8]}"

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
        if not suspect(self.loaded.job):
            return await self._through()
        # Orders that were lost with one worker come to the next at one moment. Beside the one that ends every
        # worker the others would be lost each time, and be given up with it; one by one they get through.
        async with self.studio.suspects:
            return await self._through()

    async def _through(self) -> Outcome:
        try:
            if await self._reuse():
                return Outcome.DONE
            comfy = await (self._start() if self.loaded.job.status is Status.PENDING else self._adopt())
            outputs = await self._wait(comfy)
            await self._keep_when_there_is_room(outputs, comfy)
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

    async def _reuse(self) -> bool:
        """Conclude at once with what was drawn for this very recipe before, if it is still there."""
        drawn_at, request, shelf = self.order.drawn_at, self.loaded.request, self.studio.shelf
        if not drawn_at or self.loaded.job.status is not Status.PENDING:
            return False
        found = await shelf.recall(request.recipe, drawn_at)
        if not found or not answers(request.regenerates, found):
            return False
        now = datetime.now(UTC)
        pictures = [shelf.lent(picture, request, now) for picture in found]
        command = Reuse(tuple(map(produced, pictures)), now, regenerated(request.regenerates, pictures))
        await self._conclude(command, "reuse", pictures)
        return True

    # ------------------------------------------------------------- beginning

    async def _start(self) -> Comfy:
        """Choose a backend, write down the start, submit."""
        order, studio = self.order, self.studio
        workflow = self._workflow()
        await studio.capacity.opened()  # between the order and now it may have become full
        comfy, why = await studio.backends.available()
        reason = f"{order.reason}; backend: {why}"
        await self._act(Start(order.attempt, studio.worker, comfy.url, reason), "start")
        label = f"{order.job_id}/{order.attempt}"
        folder, request = f"forge/{label}", self.loaded.request
        while True:
            try:
                images = await inputs.send(comfy, studio.uploads, studio.store, workflow, request, folder)
                graph = render(workflow, request.params, filename_prefix=f"{folder}/picture", images=images)
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
        log.info("adopted", extra={"backend": job.backend})
        return comfy

    async def _wait(self, comfy: Comfy) -> list[Output]:
        async with Feed(self.studio.nc, self.order) as feed:
            return await comfy.wait(
                self.prompt, timeout=self._workflow().timeout_seconds, on_progress=feed.update
            )

    def _workflow(self) -> Workflow:
        request, job_type = self.loaded.request, self.loaded.request.job_type
        try:
            workflow = self.studio.workflows[job_type]
        except KeyError:
            raise WorkflowInvalid(f"this forge has no job type {job_type!r} any more") from None
        if request.regenerates is not None and workflow.version != request.workflow_version:
            raise WorkflowInvalid(f"job type {job_type!r} has changed since, so it would be another recipe")
        return workflow

    # --------------------------------------------------------------- keeping

    async def _keep_when_there_is_room(self, outputs: list[Output], comfy: Comfy) -> None:
        """A full volume costs no attempt: the picture waits at ComfyUI until there is room for it."""
        capacity = self.studio.capacity
        while True:
            try:
                return await self._keep(outputs, comfy)
            except DiskFull as full:
                capacity.refused()
                log.warning("no room for a picture: it waits at ComfyUI", extra={"error": full.detail})
            await capacity.opened()

    async def _keep(self, outputs: list[Output], comfy: Comfy) -> None:
        """File first, event after: a row is never without its picture."""
        studio, order = self.studio, self.order
        async with studio.store.workspace(f"{order.job_id}-{order.attempt}-{uuid4().hex[:8]}") as folder:
            pictures: list[AssetStored] = []
            for position, output in enumerate(outputs):
                source = await self._fetch(comfy, output, folder / f"{position}")
                picture = await studio.workshop.develop(source, folder)
                await studio.capacity.room_for(picture.size_bytes)
                path = await studio.store.keep(picture)
                studio.capacity.took(picture.size_bytes)
                pictures.append(self._stored(position, picture, path))
            # the folder goes afterwards: nobody should wait for that
            made, wanted = tuple(map(produced, pictures)), self.loaded.request.regenerates
            now, drew_again = datetime.now(UTC), regenerated(wanted, pictures)
            followed = self._followed()
            command = Complete(order.attempt, studio.worker, made, now, drew_again, followed)
            await self._conclude(command, "complete", pictures)
            for stored in pictures:
                studio.thumbnails.want(stored)
        await self._tidy(comfy)

    def _followed(self) -> bool:
        """Whether what was asked for has drawn it: in a restart it may be another version of the job type,
        and then nobody may be lent the picture."""
        drew, asked = self._workflow().version, self.loaded.request.workflow_version
        if drew != asked:
            log.warning("drawn by another version of the job type", extra={"drew": drew, "asked": asked})
        return drew == asked

    @part("forge.comfyui.fetch", kind=CLIENT)
    async def _fetch(self, comfy: Comfy, output: Output, target: Path) -> Path:
        chunks = comfy.fetch(output, max_bytes=MAX_PICTURE_BYTES)
        await self.studio.store.receive(chunks, target, max_bytes=MAX_PICTURE_BYTES)
        return target

    @part("forge.job.conclude")
    async def _conclude(self, command: Complete | Reuse, name: str, pictures: Sequence[AssetStored]) -> None:
        await self._act(command, name, before=partial(self.studio.library.entries, pictures))
        log.info("completed", extra={"backend": self.loaded.job.backend})

    def _stored(self, position: int, picture: Picture, path: Path) -> AssetStored:
        request, now = self.loaded.request, datetime.now(UTC)
        marks = labels(self._workflow(), request.params)
        ttl = request.ttl_seconds or self.studio.ttl_of(request.asset_type)
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
            category=marks["category"],
            archetype_id=marks["archetype_id"],
            variant_key=marks["variant_key"],
        )

    # ---------------------------------------------------------------- ending

    async def _fail(self, error: Exception) -> Outcome:
        """Write down that the attempt came to nothing, once ComfyUI is rid of the prompt."""
        if isinstance(error, ForgeError):
            code, message = error.code, error.detail[:500]
        else:
            log.error("an attempt broke", exc_info=error)
            code, message = "internal", "something in forge broke; its log tells more"
        # the event has the rest, which may quote a prompt
        log.warning("an attempt failed", extra={"code": code})
        known = self.loaded.job.worker
        await self._reload()
        if not self._current() or self.loaded.job.worker != known:
            return await self._withdraw()
        if not isinstance(error, NeverSent):
            await self._rid(error)
        final = isinstance(error, PromptRejected | WorkflowInvalid | LimitReached | UploadGone)
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
                log.warning("left at ComfyUI", extra={"reason": str(error)})

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
        command: Start | Adopt | Redirect | Complete | Reuse | FailAttempt,
        name: str,
        before: Callable[[], Awaitable[Sequence[Entry]]] = no_entries,
    ) -> None:
        worker = self.studio.worker
        self.loaded = await self.studio.jobs.act(
            self.loaded,
            command,
            actor=f"worker:{worker}",
            name=f"{self.order.attempt}/{name}/{self._self}",
            before=before,
        )
