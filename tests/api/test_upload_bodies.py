"""What is sent instead of a picture: always refused with the reason, never a 500, and nothing of it stays."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from api.serving import ROOT, Served
from api.test_edges import is_problem
from api.test_uploads import files, form, left_in_tmp
from forge.api import forms
from forge.domain.limits import MAX_UPLOAD_BYTES
from pictures import bomb, chunk, encoded, hostile, noise, png
from waiting import wait_until

GOOD = encoded(noise())
TYPE = "multipart/form-data; boundary=cut"
HEAD = b'--cut\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
END = b"\r\n--cut--\r\n"
WHOLE = HEAD + GOOD + END

NOT_UPRIGHT_BUT_FINE = "jpeg stored turned"
PICTURES = {
    **{what: data for what, data in hostile().items() if what != NOT_UPRIGHT_BUT_FINE},
    "ico renamed": encoded(noise(), "ico"),
    "gif and png": encoded(noise(), "gif") + GOOD,
    "pdf": b"%PDF-1.7\n" + GOOD,
    "png in a script": b"<script>alert(1)</script>" + GOOD,
    "heic": b"\0\0\0\x18ftypheic" + bytes(200),
    "one pixel too many rows": bomb(4096, 4097),
    "a million zeros": bytes(1_000_000),
}


async def test_what_is_no_picture_is_refused_with_the_reason(served: Served, mei: httpx.AsyncClient) -> None:
    for what, data in PICTURES.items():
        answer = await mei.post("/uploads", **form(data))
        assert answer.status_code == 422, (what, answer.text)
        problem = is_problem(answer, 422, "picture_refused")
        assert len(problem["detail"]) > 10, what
        assert "0x" not in problem["detail"], "an address of a process is nobody's business"
        assert files(served) == left_in_tmp(served) == [], what


async def test_what_a_picture_carries_besides_is_gone(served: Served, mei: httpx.AsyncClient) -> None:
    """A PNG that is also a ZIP, a script behind its end, and one within its compressed pixels."""
    evil = b"PK\x03\x04<script>evil</script>"
    inside = chunk(b"IDAT", zlib.compress(b"\0\x80") + evil)
    hidden = png(1, 1, 8, 0, b"\0\x80").replace(chunk(b"IDAT", zlib.compress(b"\0\x80")), inside)
    for data in (GOOD + evil, encoded(noise(), "jpeg", comment=evil), hidden):
        answer = await mei.post("/uploads", **form(data))
        assert answer.status_code == 201, answer.text
    kept = [path.read_bytes() for path in files(served)]
    assert len(kept) == 3
    assert not any(b"evil" in data for data in kept)


# ----------------------------------------------------------------------- forms


def part(disposition: bytes, data: bytes = GOOD, more: bytes = b"") -> bytes:
    return b"--cut\r\nContent-Disposition: " + disposition + b"\r\n" + more + b"\r\n" + data + b"\r\n"


FILE = b'form-data; name="image"; filename="a.png"'
MANY = b'form-data; name="image"; filename="%s"'

FORMS: dict[str, tuple[str, bytes, int]] = {
    "no body": (TYPE, b"", 400),
    "no boundary": ("multipart/form-data", WHOLE, 400),
    "an empty boundary": ("multipart/form-data; boundary=", WHOLE, 400),
    "an endless boundary": ("multipart/form-data; boundary=" + "x" * 5000, WHOLE, 400),
    "another boundary": ("multipart/form-data; boundary=other", WHOLE, 400),
    "not a form at all": (TYPE, b'{"image": "x"}', 400),
    "only a picture": (TYPE, GOOD, 400),
    "cut in the picture": (TYPE, WHOLE[:300], 400),
    "cut in the headers": (TYPE, WHOLE[:40], 400),
    "without its end": (TYPE, WHOLE[: -len(END)], 400),
    "its end not quite": (TYPE, WHOLE[:-4], 400),
    "a header without end": (TYPE, b"--cut\r\nContent-Disposition: " + b"x" * 9000, 400),
    "many headers": (TYPE, part(FILE, more=b"X-A: b\r\n" * 100) + b"--cut--", 400),
    "a header that is none": (TYPE, part(FILE, more=b"nonsense\r\n") + b"--cut--", 400),
    "a header in no charset": (TYPE, part(b'form-data; name="\xff\xfe"; filename="a"') + b"--cut--", 400),
    "an attachment": (TYPE, part(b'attachment; filename="a.png"') + b"--cut--", 400),
    "a part of another length": (TYPE, part(FILE, more=b"Content-Length: 3\r\n") + b"--cut--", 400),
    "a huge name": (TYPE, part(MANY % (b"x" * 5000)) + b"--cut--", 400),
    "nothing in it": (TYPE, b"--cut--\r\n", 422),
    "a text for a file": (TYPE, part(b'form-data; name="image"', b"abc") + b"--cut--", 422),
    "no file chosen": (TYPE, part(b'form-data; name="image"; filename=""', b"") + b"--cut--", 422),
    "an empty file": (TYPE, part(FILE, b"") + b"--cut--", 422),
    "two files": (TYPE, part(FILE) + part(FILE) + b"--cut--", 422),
    "a thousand files": (TYPE, part(FILE) * 700 + b"--cut--", 422),
    "another field": (TYPE, part(FILE) + part(b'form-data; name="ttl"', b"9") + b"--cut--", 422),
    "a thousand fields": (TYPE, part(b'form-data; name="a"', b"") * 1000 + b"--cut--", 422),
    "base64": (TYPE, part(FILE, b"iVBORw0KGgo=", b"Content-Transfer-Encoding: base64\r\n") + b"--cut--", 422),
    "json": ("application/json", b"{}", 415),
    "a bare picture": ("image/png", GOOD, 415),
    "a url-encoded form": ("application/x-www-form-urlencoded", b"image=a", 415),
    "mixed": ("multipart/mixed; boundary=cut", WHOLE, 415),
    "no type": ("", WHOLE, 415),
}


async def test_what_is_no_form_with_one_picture_is_refused(served: Served, mei: httpx.AsyncClient) -> None:
    for what, (kind, body, status) in FORMS.items():
        headers = {"content-type": kind} if kind else {}
        answer = await mei.post("/uploads", content=body, headers=headers)
        assert answer.status_code == status, (what, answer.text)
        problem = is_problem(answer, status)
        assert problem["detail"], what
        if problem["code"] == "invalid":
            assert problem["errors"][0]["message"], "names what is wrong with which field"
        assert files(served) == left_in_tmp(served) == [], what


NAMES = [
    MANY % b"../../../etc/passwd",
    MANY % b"/etc/passwd",
    MANY % b"C:\\\\evil.png",
    MANY % b"a\0b.png",
    MANY % (b"x" * 3000),
    MANY % b"%2e%2e%2f",
    b'form-data; name="../../x"; filename="a.png"',
    b'form-data; name=""; filename="a.png"',
    b"form-data; name=image; filename*=UTF-8''a.png; filename=b.png",
]


async def test_names_of_files_and_fields_are_not_looked_at(served: Served, mei: httpx.AsyncClient) -> None:
    for disposition in NAMES:
        body = part(disposition) + b"--cut--"
        answer = await mei.post("/uploads", content=body, headers={"content-type": TYPE})
        assert answer.status_code in (200, 201), (disposition, answer.text)
        [path] = files(served)
        assert path == served.parts.blobs.path(answer.json()["content_hash"], "png", "uploads")


async def test_a_form_may_come_in_any_pieces(mei: httpx.AsyncClient) -> None:
    small = HEAD + encoded(noise(8, 8)) + END

    async def pieces(size: int) -> AsyncIterator[bytes]:
        for at in range(0, len(small), size):
            yield small[at : at + size]

    ids = set()
    for size in (1, 2, 3, 7, 64, 1000):
        answer = await mei.post("/uploads", content=pieces(size), headers={"content-type": TYPE})
        assert answer.status_code in (200, 201), (size, answer.text)
        ids.add(answer.json()["id"])
    assert len(ids) == 1


# ----------------------------------------------------------------------- sizes


def padded(size: int) -> bytes:
    """A sound picture in a file of that size; what is behind the end is dropped."""
    return GOOD + bytes(size - len(GOOD))


async def test_the_size_of_a_file_is_limited_exactly(served: Served, mei: httpx.AsyncClient) -> None:
    assert (await mei.post("/uploads", **form(padded(MAX_UPLOAD_BYTES)))).status_code == 201
    over = await mei.post("/uploads", **form(padded(MAX_UPLOAD_BYTES + 1)))
    assert str(MAX_UPLOAD_BYTES) in is_problem(over, 413, "too_large")["detail"]
    assert left_in_tmp(served) == []


async def test_the_whole_body_is_limited_whatever_it_says_of_itself(
    served: Served, mei: httpx.AsyncClient
) -> None:
    is_problem(await mei.post("/uploads", **form(bytes(30_000_000))), 413, "too_large")

    async def endless() -> AsyncIterator[bytes]:
        yield HEAD
        for _ in range(250):
            yield bytes(100_000)

    headers = {"content-type": TYPE}
    is_problem(await mei.post("/uploads", content=endless(), headers=headers), 413, "too_large")

    async def preamble() -> AsyncIterator[bytes]:
        for _ in range(250):
            yield bytes(100_000)

    is_problem(await mei.post("/uploads", content=preamble(), headers=headers), 413, "too_large")
    assert left_in_tmp(served) == []


# ------------------------------------------------------------------------ time


@contextlib.asynccontextmanager
async def connection(served: Served) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = served.base_url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


def head(length: int) -> bytes:
    return (
        f"POST {ROOT}/uploads HTTP/1.1\r\nHost: localhost\r\nX-Forge-User: mei\r\n"
        f"Content-Type: {TYPE}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(forms, "BODY_SECONDS", 0.5)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("sent", [b"", HEAD[:20], HEAD + GOOD[:100]], ids=["nothing", "a header", "a half"])
async def test_a_silent_client_is_told_and_hung_up_on(served: Served, sent: bytes) -> None:
    async with connection(served) as (reader, writer):
        writer.write(head(100_000) + sent)
        answer = await asyncio.wait_for(reader.read(), 30)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"too_slow"' in answer
    assert left_in_tmp(served) == []


@pytest.mark.usefixtures("hurry")
async def test_a_trickle_is_told_and_hung_up_on(served: Served) -> None:
    """Never silent for long, and never done."""
    async with connection(served) as (reader, writer):
        writer.write(head(100_000) + HEAD)

        async def trickle() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)

        dripping = asyncio.create_task(trickle())
        answer = await asyncio.wait_for(reader.read(), 30)
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
    assert answer.startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_hangs_up_leaves_nothing(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    async with connection(served) as (_, writer):
        writer.write(head(100_000) + HEAD + GOOD)
        await wait_until(lambda: left_in_tmp(served), what="the picture arrives")
    await wait_until(lambda: not left_in_tmp(served), what="its folder is removed")
    assert files(served) == []
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_who_is_not_known_sends_nothing(serve: Any) -> None:
    served = await serve(open_to_loopback=False)
    async with served.client("mei") as client:
        is_problem(await client.post("/uploads", **form(GOOD)), 401)
    assert left_in_tmp(served) == []
