"""Uploads over HTTP: send a picture, look at it. Its id is then the value of a param of type image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from litestar import HttpMethod, Request, Response, Router, get, post, route
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath

from forge.api import files, forms, openapi
from forge.api.auth import caller_of
from forge.api.fresh import MinSeq, item
from forge.api.parts import Parts, parts_of
from forge.api.problems import documented
from forge.api.schemas import UploadView
from forge.api.views import upload_of_log, upload_of_row
from forge.domain.ids import upload_id
from forge.domain.limits import MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS
from forge.errors import Limit, LimitReached, Unavailable
from forge.events.uploads import UploadStored
from forge.images import Picture
from forge.projections import uploads as table

Asked = Request[Any, Any, Any]

MOST_AT_ONCE = 8
"""Uploads an API process has in hand: each holds a mebibyte, and they share the process that decodes."""

MOST_OF_A_USER = 3


class Reception:
    """Who is sending pictures to this process right now."""

    def __init__(self) -> None:
        self._by_user: Counter[str] = Counter()

    @contextmanager
    def place(self, user: str) -> Iterator[None]:
        """A place for one upload.

        Raises:
            LimitReached: the user has too many under way.
            Unavailable: all users together have.
        """
        if self._by_user[user] >= MOST_OF_A_USER:
            raise LimitReached(Limit("concurrent_uploads", MOST_OF_A_USER, self._by_user[user]))
        if self._by_user.total() >= MOST_AT_ONCE:
            raise Unavailable("many pictures are arriving; come again")
        self._by_user[user] += 1
        try:
            yield
        finally:
            self._by_user[user] -= 1
            if not self._by_user[user]:
                del self._by_user[user]


@post(
    "/uploads",
    status_code=201,
    responses=documented(400, 408, 413, 415, 422, 429)
    | {200: ResponseSpec(UploadView, description="You had sent it before.", generate_examples=False)},
    **openapi.taking_picture(),
    operation_id="uploadPicture",
    request_max_body_size=forms.MAX_FORM,
)
async def send(request: Asked) -> Response[UploadView]:
    """Send a picture, to be used as a param of type image. PNG, JPEG or WebP, at most 10 MiB and 16.7 Mpx.

    It is drawn anew: only its pixels stay. The same picture again is the same upload, and lives on from now.
    """
    parts, caller = parts_of(request), caller_of(request)
    parts.capacity.spare()
    await parts.capacity.room()
    with request.app.state.reception.place(caller.user):
        name = f"upload-{uuid4().hex}"
        async with parts.blobs.workspace(name) as folder:
            picture = await _received(parts, request, folder)
            path = await parts.blobs.keep(picture, "uploads")  # file first, event after
            parts.capacity.took(picture.size_bytes)
            stored = _stored(parts, caller.user, picture, path)
            upload, seq, new = await parts.uploads.keep(stored, actor=caller.actor)
    parts.live.wrote(seq, about=upload.id)
    view = upload_of_log(upload, seq)
    where = {"location": f"{request.scope['path']}/{view.id}"}
    return Response(view, status_code=201 if new else 200, headers=where)


async def _received(parts: Parts, request: Asked, folder: Path) -> Picture:
    source = folder / "received"
    async with aclosing(forms.file(request)) as chunks:
        await parts.blobs.receive(chunks, source, max_bytes=MAX_UPLOAD_BYTES)
    return await parts.workshop.redraw(source, folder, MAX_UPLOAD_PIXELS)


def _stored(parts: Parts, user: str, picture: Picture, path: Path) -> UploadStored:
    now, ttl = datetime.now(UTC), parts.settings.asset_ttl_seconds
    return UploadStored(
        upload_id=upload_id(user, picture.content_hash),
        user_id=user,
        content_hash=picture.content_hash,
        file_path=str(path),
        file_size_bytes=picture.size_bytes,
        width=picture.width,
        height=picture.height,
        ttl_seconds=ttl,
        created_at=now,
        expires_at=now + timedelta(seconds=ttl),
    )


@get("/uploads/{upload_id:uuid}", responses=documented(404, 422), operation_id="getUpload")
async def read(request: Asked, upload_id: FromPath[UUID], min_seq: MinSeq = None) -> Response[UploadView]:
    """One upload."""
    row = await _row(request, upload_id, min_seq)
    return Response(upload_of_row(row.content), headers=row.headers)


@route(
    "/uploads/{upload_id:uuid}/file",
    http_method=[HttpMethod.GET, HttpMethod.HEAD],
    media_type="image/png",
    status_code=200,
    responses=documented(404, 416, 422) | openapi.PARTIAL,
    operation_id=openapi.for_each_method("UploadFile"),
)
async def file(request: Asked, upload_id: FromPath[UUID], min_seq: MinSeq = None) -> Response[bytes]:
    """The picture as it was drawn anew."""
    row = (await _row(request, upload_id, min_seq)).content
    path = parts_of(request).blobs.path(row["content_hash"], "png", "uploads")
    return await files.send(request, path, row["content_hash"], "image/png", digest=row["content_hash"])


async def _row(request: Asked, upload_id: UUID, min_seq: int | None) -> Response[asyncpg.Record]:
    parts, tenant = parts_of(request), caller_of(request).tenant

    async def look(connection: Any) -> asyncpg.Record | None:
        return await table.upload(connection, upload_id, tenant)

    return await item(parts, min_seq, look, f"there is no upload {upload_id}", about=upload_id)


router = Router("/", route_handlers=[send, read, file], tags=["uploads"])
