"""Assets over HTTP: list, look, fetch, give up."""

from __future__ import annotations

import asyncio
import unicodedata
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import asyncpg
import msgspec
from litestar import HttpMethod, Request, Response, Router, delete, get, post, put, route
from litestar.params import FromPath, FromQuery, QueryParameter

from forge import provenance
from forge.admissions import JobRequest, fingerprint
from forge.api import cursors, edge, files, openapi
from forge.api.auth import Caller, caller_of
from forge.api.fresh import MinSeq, item, listing
from forge.api.gate import IS_HEAD
from forge.api.jobs import history_item
from forge.api.openapi import IDEMPOTENCY, with_headers
from forge.api.parts import Parts, parts_of
from forge.api.problems import documented
from forge.api.schemas import AssetPage, AssetUsage, AssetView, History, JobView, UserReads
from forge.api.views import ROOT, asset_of_row, job_of_log
from forge.canonical import THUMBNAIL_WIDTHS
from forge.comfyui.workflows import Workflow, uploads
from forge.commands import SUBMIT_SECONDS
from forge.domain import params
from forge.domain.assets import original
from forge.domain.ids import keyed_job_id, new_id
from forge.errors import (
    CannotRegenerate,
    ForgeError,
    Invalid,
    LogUnavailable,
    NotFound,
    PictureRefused,
    StoreFailed,
)
from forge.events.assets import (
    AssetDamaged,
    AssetDeleted,
    AssetLost,
    AssetPinned,
    AssetsAccessed,
    AssetUnpinned,
)
from forge.events.envelope import Recorded
from forge.events.jobs import JobSubmitted, Terminal
from forge.projections import asset_lists as table
from forge.projections import queue as jobs_table
from forge.projections.reading import EACH_TIME, ONCE
from forge.store import Store
from forge.topology import job as facts_of

Asked = Request[Any, Any, Any]

Text = Annotated[str | None, QueryParameter(min_length=1, max_length=edge.MAX_ID)]
Time = Annotated[str | None, QueryParameter(max_length=40, schema_extra={"format": "date-time"})]
Order = Literal["-created_at", "created_at", "-file_size_bytes", "file_size_bytes"]

WIDTHS = (64, 128, *THUMBNAIL_WIDTHS, 768, 1024, 1536, 2048)
"""Thumbnails there can be; any other width gets the next larger one."""

_SHORTEST_SEARCH = 3
_HISTORY_SECONDS = 5.0
_REPORT_SECONDS = 1.0
_MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


# -------------------------------------------------------------------- listing


@get("/assets", responses=documented(422), operation_id="listAssets")
async def find(
    request: Asked,
    asset_type: Text = None,
    category: Text = None,
    archetype_id: Text = None,
    variant_key: Text = None,
    character_id: Text = None,
    session_id: Text = None,
    created_after: Time = None,
    created_before: Time = None,
    q: Annotated[
        str | None,
        QueryParameter(
            max_length=200,
            description="Up to 8 words that all occur; one has 3 letters or more, or a Chinese sign.",
        ),
    ] = None,
    sort: FromQuery[Order] = "-created_at",
    limit: Annotated[int, QueryParameter(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, QueryParameter(max_length=500)] = None,
    min_seq: MinSeq = None,
) -> Response[AssetPage]:
    """Stored pictures, by any of their facets."""
    parts, tenant = parts_of(request), caller_of(request).tenant
    wanted = table.Wanted(
        asset_type=edge.name("asset_type", asset_type),
        category=edge.name("category", category),
        archetype_id=edge.name("archetype_id", archetype_id),
        variant_key=edge.name("variant_key", variant_key),
        character_id=edge.name("character_id", character_id),
        session_id=edge.name("session_id", session_id),
        created_after=edge.moment("created_after", created_after),
        created_before=edge.moment("created_before", created_before),
        words=_words(q),
    )
    mark = cursors.tag("assets", tenant, wanted, sort)
    key = sort.removeprefix("-")
    after = _place(mark, key, cursor)
    async with listing(parts, min_seq, plans=EACH_TIME if wanted.words else ONCE) as tables:
        rows = await table.page(tables.connection, tenant, wanted, sort, after, limit + 1)
        whole = after is None and len(rows) <= limit  # seen to its end, it need not be counted
        counted = 0 if whole else await table.estimate(tables.connection, tenant, wanted)
    page = AssetPage(
        items=[asset_of_row(row) for row in rows[:limit]],
        next_cursor=_cursor(mark, key, rows[limit - 1]) if len(rows) > limit else None,
        total_estimate=max(counted, len(rows)),
    )
    return Response(page, headers={"x-forge-seq": str(tables.seq)})


def _words(q: str | None) -> tuple[str, ...]:
    """What to look for, as the table holds it.

    Raises:
        Invalid: too short to be found through an index, or with characters that no text has.
    """
    if q is None or not q.strip():
        return ()
    edge.name("q", q, 200)
    words = tuple(unicodedata.normalize("NFC", q).lower().split())
    if max(len(word) for word in words) < _SHORTEST_SEARCH and not any(map(table.SIGNS.search, words)):
        raise edge.invalid("q", f"must have a word of at least {_SHORTEST_SEARCH} letters, or a Chinese sign")
    if len(words) > table.MOST_WORDS:
        raise edge.invalid("q", f"must have at most {table.MOST_WORDS} words")
    return words


def _place(mark: str, key: str, cursor: str | None) -> tuple[Any, UUID] | None:
    if key == "created_at":
        timed = cursors.read(mark, cursor, tuple[cursors.Micros, UUID])
        return timed and (cursors.moment(timed[0]), timed[1])
    return cursors.read(mark, cursor, tuple[cursors.Number, UUID])


def _cursor(mark: str, key: str, row: asyncpg.Record) -> str:
    value = cursors.micros(row[key]) if key == "created_at" else row[key]
    return cursors.write(mark, value, row["id"])


# ------------------------------------------------------------------ one asset


@get("/assets/{asset_id:uuid}", responses=documented(404, 422), operation_id="getAsset")
async def read(request: Asked, asset_id: FromPath[UUID], min_seq: MinSeq = None) -> Response[AssetView]:
    """One asset."""
    row = await _row(request, asset_id, min_seq)
    return Response(asset_of_row(row.content), headers=row.headers)


async def _row(request: Asked, asset_id: UUID, min_seq: int | None) -> Response[asyncpg.Record]:
    parts, tenant = parts_of(request), caller_of(request).tenant

    async def look(connection: Any) -> asyncpg.Record | None:
        return await table.asset(connection, asset_id, tenant)

    return await item(parts, min_seq, look, f"there is no asset {asset_id}", about=asset_id)


@route(
    "/assets/{asset_id:uuid}/file",
    http_method=[HttpMethod.GET, HttpMethod.HEAD],
    media_type="image/png",
    status_code=200,
    responses=documented(404, 416, 422) | openapi.PARTIAL,
    operation_id=openapi.for_each_method("AssetFile"),
)
async def file(request: Asked, asset_id: FromPath[UUID], min_seq: MinSeq = None) -> Response[bytes]:
    """The picture's bytes; they never change."""
    parts = parts_of(request)
    row = (await _row(request, asset_id, min_seq)).content
    path = parts.blobs.path(row["content_hash"], row["format"])
    try:
        sent = await files.send(
            request, path, row["content_hash"], _MEDIA_TYPES[row["format"]], digest=row["content_hash"]
        )
    except files.Unfit as unfit:
        await _report(parts, row, unfit)
        raise
    return _counted(request, asset_id, sent)


async def _report(parts: Parts, row: asyncpg.Record, unfit: files.Unfit) -> None:
    """Say it by event, for the scheduler to see to; the answer does not wait long for that."""
    kind = AssetLost if unfit.found == Store.NO_FILE else AssetDamaged
    fault = kind(
        asset_id=row["id"],
        asset_type=row["asset_type"],
        content_hash=row["content_hash"],
        format=row["format"],
        file_size_bytes=row["file_size_bytes"],
        found=unfit.found,
        stored_seq=row["seq"],
    )
    with suppress(ForgeError, TimeoutError):
        async with asyncio.timeout(_REPORT_SECONDS):
            await parts.retention.report(fault, actor="api")


@route(
    "/assets/{asset_id:uuid}/thumbnail",
    http_method=[HttpMethod.GET, HttpMethod.HEAD],
    media_type="image/webp",
    status_code=200,
    responses=documented(404, 416, 422) | openapi.PARTIAL,
    operation_id=openapi.for_each_method("AssetThumbnail"),
)
async def thumbnail(
    request: Asked,
    asset_id: FromPath[UUID],
    width: Annotated[
        int,
        QueryParameter(
            ge=16, le=2048, description=f"Pixels; rounded up to one of {', '.join(map(str, WIDTHS))}."
        ),
    ] = 256,
    min_seq: MinSeq = None,
) -> Response[bytes]:
    """A WebP of the picture, never larger than the picture itself."""
    parts = parts_of(request)
    row = (await _row(request, asset_id, min_seq)).content
    wide = next(w for w in WIDTHS if w >= width)
    path = parts.blobs.thumbnail_path(row["content_hash"], wide)
    if not await asyncio.to_thread(path.is_file):
        await _made(parts, row, wide)
    sent = await files.send(request, path, f"{row['content_hash']}.{wide}", "image/webp")
    return _counted(request, asset_id, sent)


def _counted(request: Asked, asset_id: UUID, sent: Response[bytes]) -> Response[bytes]:
    """Take note that the picture, a part or a thumbnail of it was fetched, or asked for once more."""
    if not request.scope.get(IS_HEAD):
        parts_of(request).reads.count(asset_id, caller_of(request).user, datetime.now(UTC))
    return sent


@get("/assets/{asset_id:uuid}/usage", responses=documented(404, 422), operation_id="getAssetUsage")
async def usage(request: Asked, asset_id: FromPath[UUID], min_seq: MinSeq = None) -> Response[AssetUsage]:
    """Who fetched the file or a thumbnail, how often and when; up to the last flush of each API. An operator
    sees everybody, anyone else itself only."""
    parts, tenant = parts_of(request), caller_of(request).tenant

    async def look(connection: Any) -> AssetUsage | None:
        if await table.asset(connection, asset_id, tenant) is None:
            return None
        rows = await table.used(connection, asset_id, tenant)
        return AssetUsage(items=[UserReads(**row) for row in rows])

    return await item(parts, min_seq, look, f"there is no asset {asset_id}", about=asset_id)


async def _made(parts: Parts, row: asyncpg.Record, width: int) -> None:
    """Make a thumbnail that is not there; making it twice at once does no harm."""
    content_hash, fmt = row["content_hash"], row["format"]
    try:
        async with parts.blobs.workspace(f"thumbnail-{content_hash[:16]}") as folder:
            made = await parts.workshop.thumbnails(parts.blobs.path(content_hash, fmt), folder, (width,))
            await parts.blobs.keep_thumbnails(content_hash, fmt, made)
    except PictureRefused as error:
        raise StoreFailed("the stored file cannot be read") from error


@get("/assets/{asset_id:uuid}/history", responses=documented(404), operation_id="getAssetHistory")
async def history(
    request: Asked,
    asset_id: FromPath[UUID],
    accesses: Annotated[
        bool, QueryParameter(description="Also when it was fetched; of a long log `/usage` is quicker.")
    ] = False,
) -> History:
    """Everything that happened to the caller's references to an asset, from the log: stored, ready, pinned,
    found lost or damaged, given up, drawn again; also when it is long gone."""
    parts, caller = parts_of(request), caller_of(request)
    try:
        async with asyncio.timeout(_HISTORY_SECONDS):
            seen = await _traces(parts, caller, asset_id)
            seen += await _redrawn(parts, caller, asset_id)
            if accesses:
                seen += await _fetched(parts, caller, asset_id, seen[0].seq)
    except TimeoutError:
        raise LogUnavailable("reading the history took too long") from None
    seen.sort(key=lambda record: record.seq)
    return History(items=[history_item(record) for record in seen])


async def _traces(parts: Parts, caller: Caller, asset_id: UUID) -> list[Recorded]:
    """What the log tells the caller about an asset.

    Raises:
        NotFound: the caller never had it.
    """
    seen = provenance.visible(await provenance.facts(parts.store, asset_id), caller.may_see)
    if not seen:
        raise NotFound(f"there is no asset {asset_id}")
    return seen


async def _redrawn(parts: Parts, caller: Caller, asset_id: UUID) -> list[Recorded]:
    """The requests to draw an asset again, and how each ended."""
    async with listing(parts, None) as tables:
        rows = await jobs_table.regenerating(tables.connection, asset_id, caller.tenant)
    found: list[Recorded] = []
    for row in rows:
        asked = await parts.store.at(row["submitted_seq"], timeout=SUBMIT_SECONDS)
        facts = await parts.store.load(facts_of(row["user_id"], row["id"]), timeout=SUBMIT_SECONDS)
        found += [asked] if asked is not None else []
        found += [fact for fact in facts.events if isinstance(fact.event, Terminal)]
    return found


async def _fetched(parts: Parts, caller: Caller, asset_id: UUID, since: int) -> list[Recorded]:
    found = []
    for record in await provenance.accesses(parts.store, asset_id, since):
        assert isinstance(record.event, AssetsAccessed)
        reads = [read for read in record.event.reads if caller.may_see(read.user_id)]
        if reads:
            found.append(
                msgspec.structs.replace(record, event=msgspec.structs.replace(record.event, reads=reads))
            )
    return found


@post(
    "/assets/{asset_id:uuid}/regenerate",
    status_code=202,
    responses=documented(404, 409, 429),
    **with_headers(IDEMPOTENCY),
    operation_id="regenerateAsset",
)
async def regenerate(request: Asked, asset_id: FromPath[UUID]) -> Response[JobView]:
    """Ask for an asset again, from its record: also when it expired or was deleted. The job has the params,
    the seed, the session and the character of the caller's newest one that made it, and all limits count;
    its `regenerates` says in the end how far the picture is the same. 409 where it cannot be, and why."""
    parts, caller = parts_of(request), caller_of(request)
    parts.capacity.spare()
    key = edge.header(request.headers, "idempotency-key", edge.MAX_KEY)
    try:
        async with asyncio.timeout(_HISTORY_SECONDS):
            records = await _traces(parts, caller, asset_id)
            stored, made = await provenance.origin(parts.jobs, records, timeout=SUBMIT_SECONDS)
    except TimeoutError:
        raise LogUnavailable("finding the asset's record took too long") from None
    user = made.request.user_id
    id_ = new_id() if key is None else keyed_job_id(user, key)
    images: dict[str, str] = {}
    if key is None or not await _is_known(parts, user, id_):  # a key's answer stays, whatever changed since
        images = uploads(_followable(parts.workflows, made.request), made.request.params)
    again = JobRequest(
        job_type=made.request.job_type,
        asset_type=made.request.asset_type,
        params=made.request.params,
        workflow_version=made.request.workflow_version,
        fingerprint=fingerprint(["regenerate", str(asset_id)]),
        recipe=made.request.recipe,
        pictures=made.request.pictures,
        id=id_,
        keyed=key is not None,
        priority=made.request.priority,
        session_id=made.request.session_id,
        character_id=made.request.character_id,
        ttl_seconds=made.request.ttl_seconds,
        uploads={f"params.{p}": UUID(u) for p, u in images.items()},
        regenerates=original(stored),
    )
    [loaded] = await parts.admissions.submit(user, [again], actor=caller.actor)
    view = job_of_log(parts.live.places, loaded)
    parts.live.wrote(view.seq)
    return Response(view, headers={"location": f"{ROOT}/jobs/{view.id}"})


async def _is_known(parts: Parts, user: str, job_id: UUID) -> bool:
    """Whether a job was admitted under this id."""
    if job_id in parts.admissions.line.jobs:
        return True
    return await parts.jobs.submitted_seq(user, job_id, timeout=SUBMIT_SECONDS) is not None


def _followable(workflows: dict[str, Workflow], asked: JobSubmitted) -> Workflow:
    """The job type by which a recipe can be followed once more.

    Raises:
        CannotRegenerate: there is none, or it has changed.
    """
    workflow = workflows.get(asked.job_type)
    if workflow is None:
        raise CannotRegenerate(f"there is no job type {asked.job_type!r} any more")
    if workflow.version != asked.workflow_version:
        raise CannotRegenerate(
            f"the job type {asked.job_type!r} has changed since: it would be another recipe"
        )
    try:
        same = params.resolve(workflow.params, asked.params, entropy=0) == asked.params
    except Invalid as invalid:
        raise CannotRegenerate(f"its params are not accepted any more: {invalid.detail}") from None
    if not same:
        raise CannotRegenerate("its params would be read differently now")
    return workflow


async def _references(request: Asked, asset_id: UUID) -> list[asyncpg.Record]:
    parts, tenant = parts_of(request), caller_of(request).tenant

    async def look(connection: Any) -> list[asyncpg.Record] | None:
        return await table.references(connection, asset_id, tenant) or None

    return (await item(parts, None, look, f"there is no asset {asset_id}")).content


@delete("/assets/{asset_id:uuid}", status_code=204, responses=documented(404), operation_id="deleteAsset")
async def give_up(request: Asked, asset_id: FromPath[UUID]) -> Response[None]:
    """Give an asset up. Its file goes when nobody else refers to it. `X-Forge-Seq` is the event."""
    parts, caller = parts_of(request), caller_of(request)
    seq = 0
    by_job: dict[UUID, list[asyncpg.Record]] = {}
    for row in await _references(request, asset_id):
        by_job.setdefault(row["job_id"], []).append(row)
    for job_id, [reference, *more] in by_job.items():
        gone = AssetDeleted(
            asset_id=asset_id,
            asset_type=reference["asset_type"],
            job_id=job_id,
            user_id=reference["user_id"],
            content_hash=reference["content_hash"],
            format=reference["format"],
            reason="requested",
            pictures=1 + len(more),
            file_size_bytes=(1 + len(more)) * reference["file_size_bytes"],
            session_id=reference["session_id"],
            character_id=reference["character_id"],
        )
        seq = await parts.library.give_up(gone, actor=caller.actor, within=SUBMIT_SECONDS)
    parts.live.wrote(seq, about=asset_id)
    return Response(None, status_code=204, headers={"x-forge-seq": str(seq)})


@put("/assets/{asset_id:uuid}/pin", status_code=204, responses=documented(404), operation_id="pinAsset")
async def pin(request: Asked, asset_id: FromPath[UUID]) -> Response[None]:
    """Pin an asset: it does not expire and does not make room, until it is unpinned or deleted."""
    return await _pinned(request, asset_id, AssetPinned)


@delete("/assets/{asset_id:uuid}/pin", status_code=204, responses=documented(404), operation_id="unpinAsset")
async def unpin(request: Asked, asset_id: FromPath[UUID]) -> Response[None]:
    """Unpin an asset: it lives as long as it was given, which may be over."""
    return await _pinned(request, asset_id, AssetUnpinned)


async def _pinned(
    request: Asked, asset_id: UUID, fact: type[AssetPinned] | type[AssetUnpinned]
) -> Response[None]:
    """Say so about each of the caller's references that is still there; 404 when none is by now."""
    parts, caller = parts_of(request), caller_of(request)
    seqs: list[int] = []
    gone: NotFound | None = None
    for row in {row["job_id"]: row for row in await _references(request, asset_id)}.values():
        wanted = fact(
            asset_id=asset_id,
            asset_type=row["asset_type"],
            job_id=row["job_id"],
            user_id=row["user_id"],
            session_id=row["session_id"],
            character_id=row["character_id"],
        )
        try:
            seqs.append(await parts.library.pin(wanted, actor=caller.actor, within=SUBMIT_SECONDS))
        except NotFound as error:
            gone = error
    if not seqs and gone is not None:
        raise gone
    parts.live.wrote(max(seqs), about=asset_id)
    return Response(None, status_code=204, headers={"x-forge-seq": str(max(seqs))})


router = Router(
    "/",
    route_handlers=[find, read, file, thumbnail, usage, history, give_up, pin, unpin, regenerate],
    tags=["assets"],
)
