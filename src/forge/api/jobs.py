"""Jobs and batches over HTTP: ask for pictures, look, cancel, ask again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

import asyncpg
import msgspec
from litestar import Request, Response, Router, delete, get, post
from litestar.params import FromPath, QueryParameter

from forge import provenance
from forge.admissions import JobRequest, fingerprint
from forge.api import cursors, edge
from forge.api.auth import Caller, caller_of
from forge.api.fresh import MinSeq, item, listing
from forge.api.openapi import IDEMPOTENCY, taking
from forge.api.parts import Parts, parts_of
from forge.api.problems import documented
from forge.api.schemas import (
    BatchAccepted,
    BatchView,
    History,
    HistoryItem,
    JobView,
    QueuePage,
    SubmitBatch,
    SubmitJob,
)
from forge.api.views import job_of_log, job_of_row
from forge.comfyui.workflows import pictures, uploads
from forge.commands import SUBMIT_SECONDS, Loaded
from forge.domain import params
from forge.domain.ids import derived_id, keyed_job_id, new_id
from forge.domain.jobs import Cancel, Status
from forge.errors import (
    DatabaseUnavailable,
    FieldError,
    Invalid,
    JobAlreadyOver,
    LogUnavailable,
    NotFound,
)
from forge.events.envelope import Recorded
from forge.projections import queue as table
from forge.topology import job_of_anybody

Asked = Request[Any, Any, Any]
"""A request whose query or headers Litestar need not parse."""

_submit = msgspec.json.Decoder(SubmitJob)
_submit_batch = msgspec.json.Decoder(SubmitBatch)

_ACTIVE = (Status.PENDING, Status.RUNNING)
_HISTORY_SECONDS = 5.0


class Known(msgspec.Struct, frozen=True):
    """Where a job stands in the log."""

    user: str
    submitted_seq: int
    admitted_seq: int = 0


# ------------------------------------------------------------------- asking


@post(
    "/jobs",
    status_code=202,
    responses=documented(400, 413, 415, 422, 429),
    **taking(SubmitJob, IDEMPOTENCY),
    operation_id="submitJob",
)
async def submit(request: Asked) -> Response[JobView]:
    """Ask for pictures. With an `Idempotency-Key` the same request may come again and is one job for ever."""
    parts, caller = parts_of(request), caller_of(request)
    parts.capacity.spare()
    key = edge.header(request.headers, "idempotency-key", edge.MAX_KEY)
    asked = await edge.body(request, _submit)
    job_id = new_id() if key is None else keyed_job_id(caller.user, key)
    made = _request(parts, asked, "", id=job_id, keyed=key is not None, fingerprint=fingerprint(asked))
    [loaded] = await parts.admissions.submit(caller.user, [made], actor=caller.actor)
    view = job_of_log(parts.live.places, loaded)
    parts.live.wrote(view.seq)
    return Response(view, headers={"location": f"{request.scope['path']}/{view.id}"})


@post(
    "/batch",
    status_code=202,
    responses=documented(400, 413, 415, 422, 429),
    **taking(SubmitBatch, IDEMPOTENCY),
    operation_id="submitBatch",
    request_max_body_size=edge.MAX_BATCH_BODY,
)
async def submit_batch(request: Asked) -> Response[BatchAccepted]:
    """Ask for up to 100 jobs, all or none."""
    parts, caller = parts_of(request), caller_of(request)
    parts.capacity.spare()
    key = edge.header(request.headers, "idempotency-key", edge.MAX_KEY)
    asked = await edge.body(request, _submit_batch)
    batch_id = new_id() if key is None else derived_id("batch", caller.user, key)
    made = _requests(parts, asked, batch_id, caller.user, key)
    loaded = await parts.admissions.submit(caller.user, made, actor=caller.actor)
    views = [job_of_log(parts.live.places, job) for job in loaded]
    answer = BatchAccepted(batch_id=batch_id, jobs=views, seq=max(view.seq for view in views))
    parts.live.wrote(answer.seq)
    return Response(answer, headers={"location": f"{request.scope['path']}/{batch_id}"})


def _requests(
    parts: Parts, asked: SubmitBatch, batch_id: UUID, user: str, key: str | None
) -> list[JobRequest]:
    """The jobs of a batch. Its key stands for the first of them, so that it cannot name a job of its own too;
    each carries the whole batch's fingerprint, so that a longer batch is another one."""
    mark, made, wrong = fingerprint(asked), list[JobRequest](), list[FieldError]()
    for nth, job in enumerate(asked.jobs):
        id_ = new_id() if key is None else keyed_job_id(user, f"{key}\0{nth}" if nth else key)
        try:
            made.append(
                _request(
                    parts,
                    job,
                    f"jobs[{nth}].",
                    id=id_,
                    keyed=key is not None,
                    fingerprint=mark,
                    batch_id=batch_id,
                )
            )
        except Invalid as invalid:
            wrong += invalid.errors
    if wrong:
        raise Invalid(wrong)
    return made


def _request(parts: Parts, asked: SubmitJob, field: str, *, id: UUID, **more: Any) -> JobRequest:
    """What a client asks for, checked against the job type it names.

    Raises:
        Invalid: names every field, each behind the prefix ``field``.
    """
    workflow = parts.workflows.get(asked.job_type)
    if workflow is None:
        names = ", ".join(sorted(parts.workflows))
        raise edge.invalid(f"{field}job_type", f"must be one of {names}")
    edge.name(f"{field}session_id", asked.session_id)
    edge.name(f"{field}character_id", asked.character_id)
    try:
        resolved = params.resolve(workflow.params, asked.params, entropy=id.int)
    except Invalid as invalid:
        raise Invalid([FieldError(f"{field}{e.field}", e.message) for e in invalid.errors]) from None
    return JobRequest(
        job_type=workflow.name,
        asset_type=workflow.asset_type,
        params=resolved,
        workflow_version=workflow.version,
        recipe=fingerprint([workflow.version, resolved]),
        pictures=pictures(workflow, resolved),
        id=id,
        priority=asked.priority,
        session_id=asked.session_id,
        character_id=asked.character_id,
        ttl_seconds=asked.ttl_seconds,
        uploads={f"{field}params.{p}": UUID(u) for p, u in uploads(workflow, resolved).items()},
        **more,
    )


# ------------------------------------------------------------------ looking


@get("/jobs/{job_id:uuid}", responses=documented(404, 422), operation_id="getJob")
async def read(request: Asked, job_id: FromPath[UUID], min_seq: MinSeq = None) -> Response[JobView]:
    """One job."""
    parts, caller = parts_of(request), caller_of(request)

    async def look(connection: Any) -> JobView | None:
        row = await table.job(connection, job_id, caller.tenant)
        return job_of_row(row, parts.live.places) if row else None

    return await item(parts, min_seq, look, f"there is no job {job_id}", about=job_id)


@get("/jobs/{job_id:uuid}/history", responses=documented(404), operation_id="getJobHistory")
async def history(request: Asked, job_id: FromPath[UUID]) -> History:
    """Everything that happened to a job, from the log."""
    parts = parts_of(request)
    known = await _known(parts, caller_of(request), job_id)
    try:
        async with asyncio.timeout(_HISTORY_SECONDS):
            records = await provenance.of_job(
                parts.store, job_id, known.user, known.submitted_seq, known.admitted_seq
            )
    except TimeoutError:
        raise LogUnavailable("reading the history took too long") from None
    return History(items=[history_item(record) for record in records])


def history_item(record: Recorded) -> HistoryItem:
    return HistoryItem(
        seq=record.seq,
        type=record.event.type,
        at=record.meta.at,
        actor=record.meta.actor,
        correlation=record.meta.correlation,
        data=msgspec.to_builtins(record.event),
    )


@get("/queue", responses=documented(422), operation_id="listQueue")
async def queue(
    request: Asked,
    status: Annotated[
        list[Status] | None, QueryParameter(description="May be repeated; default: pending and running.")
    ] = None,
    job_type: Annotated[str | None, QueryParameter(max_length=100)] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, QueryParameter(max_length=500)] = None,
    min_seq: MinSeq = None,
) -> Response[QueuePage]:
    """Jobs by status, newest first."""
    parts, tenant = parts_of(request), caller_of(request).tenant
    statuses = sorted(set(status or _ACTIVE))
    wanted = table.Wanted(statuses=tuple(statuses), job_type=edge.name("job_type", job_type, 100))
    mark = cursors.tag("queue", tenant, statuses, wanted.job_type)
    place = cursors.read(mark, cursor, tuple[cursors.Micros, UUID])
    after = place and (cursors.moment(place[0]), place[1])
    async with listing(parts, min_seq) as tables:
        rows = await table.page(tables.connection, tenant, wanted, after, limit + 1)
        counts = await table.counts(tables.connection, tenant)
    last = rows[limit - 1] if len(rows) > limit else None
    page = QueuePage(
        items=[job_of_row(row, parts.live.places) for row in rows[:limit]],
        next_cursor=cursors.write(mark, cursors.micros(last["created_at"]), last["id"]) if last else None,
        counts=counts,
    )
    return Response(page, headers={"x-forge-seq": str(tables.seq)})


@get("/batch/{batch_id:uuid}", responses=documented(404, 422), operation_id="getBatch")
async def read_batch(request: Asked, batch_id: FromPath[UUID], min_seq: MinSeq = None) -> Response[BatchView]:
    """What became of a batch, with its jobs in the order they were given."""
    parts = parts_of(request)
    read = await _batch(parts, caller_of(request), batch_id, min_seq)
    jobs = [job_of_row(row, parts.live.places) for row in read.content]
    return Response(_rolled_up(batch_id, jobs), headers=read.headers)


async def _batch(
    parts: Parts, caller: Caller, batch_id: UUID, min_seq: int | None
) -> Response[list[asyncpg.Record]]:
    """All jobs of a batch: their admissions follow each other in the log, and where the tables end with one
    of them there may be more to come."""

    async def look(connection: Any) -> list[asyncpg.Record] | None:
        return await table.batch(connection, batch_id, caller.tenant) or None

    while True:
        read = await item(parts, min_seq, look, f"there is no batch {batch_id}")
        last = read.content[-1]["submitted_seq"]
        if int(read.headers["x-forge-seq"]) > last or await _head(parts) <= last:
            return read
        min_seq = max(min_seq or 0, last + 1)


async def _head(parts: Parts) -> int:
    """The newest event; while the log is away the newest that this process knows of."""
    try:
        return await parts.store.head()
    except LogUnavailable:
        return parts.live.newest


def _rolled_up(batch_id: UUID, jobs: Sequence[JobView]) -> BatchView:
    counts = Counter(job.status for job in jobs)
    ended = [job.completed_at for job in jobs if job.completed_at is not None]
    return BatchView(
        batch_id=batch_id,
        status=_overall(counts),
        total=len(jobs),
        counts={status: counts[status] for status in Status},
        created_at=min(job.created_at for job in jobs),
        completed_at=max(ended) if len(ended) == len(jobs) else None,
        jobs=list(jobs),
        seq=max(job.seq for job in jobs),
    )


def _overall(counts: Counter[str]) -> Status:
    """Running while any job has begun and not all are over; then the worst that befell one."""
    over = {status for status in counts if Status(status).over}
    if not over and not counts[Status.RUNNING]:
        return Status.PENDING
    if counts[Status.PENDING] or counts[Status.RUNNING]:
        return Status.RUNNING
    return next(s for s in (Status.FAILED, Status.CANCELLED, Status.COMPLETED) if s in over)


# ------------------------------------------------------------------- acting


@delete("/jobs/{job_id:uuid}", status_code=202, responses=documented(404, 409), operation_id="cancelJob")
async def cancel(request: Asked, job_id: FromPath[UUID]) -> JobView:
    """Cancel a job, waiting or running. One that is over already is 409, one that was cancelled too."""
    parts, caller = parts_of(request), caller_of(request)
    known = await _known(parts, caller, job_id)
    return job_of_log(parts.live.places, await _cancel(parts, caller, job_id, known))


async def _cancel(parts: Parts, caller: Caller, job_id: UUID, known: Known) -> Loaded:
    loaded = await _load(parts, job_id, known)
    if loaded.job.status.over:
        raise JobAlreadyOver(f"the job is {loaded.job.status}")
    loaded = await parts.jobs.act(loaded, Cancel(), actor=caller.actor, name="cancel", within=SUBMIT_SECONDS)
    parts.live.wrote(loaded.seq, about=job_id)
    return loaded


async def _load(parts: Parts, job_id: UUID, known: Known) -> Loaded:
    return await parts.jobs.load(
        known.user, job_id, known.submitted_seq, known.admitted_seq, timeout=SUBMIT_SECONDS
    )


@post(
    "/jobs/{job_id:uuid}/retry", status_code=202, responses=documented(404, 409, 429), operation_id="retryJob"
)
async def retry(request: Asked, job_id: FromPath[UUID]) -> JobView:
    """Ask for a failed job again."""
    parts, caller = parts_of(request), caller_of(request)
    parts.capacity.spare()
    known = await _known(parts, caller, job_id)
    loaded = await parts.admissions.retry(known.user, job_id, known.submitted_seq, actor=caller.actor)
    parts.live.wrote(loaded.seq, about=job_id)
    return job_of_log(parts.live.places, loaded)


@delete("/batch/{batch_id:uuid}", status_code=202, responses=documented(404), operation_id="cancelBatch")
async def cancel_batch(request: Asked, batch_id: FromPath[UUID]) -> BatchView:
    """Cancel those jobs of a batch that are not over yet."""
    parts, caller = parts_of(request), caller_of(request)
    rows = (await _batch(parts, caller, batch_id, None)).content
    return _rolled_up(batch_id, [await _cancelled(parts, caller, row) for row in rows])


async def _cancelled(parts: Parts, caller: Caller, row: asyncpg.Record) -> JobView:
    if Status(row["status"]).over:
        return job_of_row(row, None)
    known = Known(row["user_id"], row["submitted_seq"], row["admitted_seq"])
    try:
        return job_of_log(parts.live.places, await _cancel(parts, caller, row["id"], known))
    except JobAlreadyOver:  # it ended a moment ago: as the log has it
        return job_of_log(parts.live.places, await _load(parts, row["id"], known))


async def _known(parts: Parts, caller: Caller, job_id: UUID) -> Known:
    """Where the caller's job stands: from memory while it is not over, from the tables later.

    Raises:
        NotFound: there is no such job, or it is somebody else's.
        DatabaseUnavailable: the tables do not answer, and the log knows no such job.
    """
    waiting = parts.admissions.line.jobs.get(job_id)
    if waiting is not None:
        if not caller.may_see(waiting.user_id):
            raise NotFound(f"there is no job {job_id}")
        return Known(waiting.user_id, waiting.submitted_seq, waiting.admitted_seq)

    async def look(connection: Any) -> Known | None:
        row = await table.job(connection, job_id, caller.tenant)
        return Known(row["user_id"], row["submitted_seq"], row["admitted_seq"]) if row else None

    try:
        return (await item(parts, None, look, f"there is no job {job_id}")).content
    except DatabaseUnavailable:
        user = await _owner(parts, job_id) if caller.sees_all else caller.user
        seq = user and await parts.jobs.submitted_seq(user, job_id, timeout=SUBMIT_SECONDS)
        if not user or not seq:
            raise
        return Known(user, seq)


async def _owner(parts: Parts, job_id: UUID) -> str | None:
    """Whose a job is that has facts, from the log."""
    facts = await parts.store.load(job_of_anybody(job_id), timeout=SUBMIT_SECONDS)
    return next((user for r in facts.events if (user := getattr(r.event, "user_id", None))), None)


router = Router(
    "/",
    route_handlers=[
        submit,
        read,
        cancel,
        retry,
        history,
        submit_batch,
        read_batch,
        cancel_batch,
        queue,
    ],
    tags=["jobs"],
)
