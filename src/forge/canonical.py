"""What a picture is once forge keeps it, and how foreign bytes are brought into that form.

Bytes come in, the same picture without anything that is not the picture leaves: no text, no EXIF, no XMP, no
thumbnail, nothing behind the end. Nothing is re-compressed, so the pixels are exactly those that were drawn,
and two files that differ only in their metadata become the same bytes. Doing it twice changes nothing.

What stays besides the pixels is what changes how they look: palette, transparency, and the colour space
(sRGB, gAMA, cHRM, cICP and ICC profiles), because dropping that would show other colours. It is bounded and
checked, since a profile is also a place to hide bytes: one that is not a profile is dropped, as browsers do.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from forge.errors import PictureRefused

THUMBNAIL_WIDTHS = (256, 512)
FORMATS = ("png", "jpeg", "webp")

_MAX_PROFILE = 1 << 20
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOUR_LENGTHS = {b"sRGB": 1, b"gAMA": 4, b"cHRM": 32, b"cICP": 4}
_PNG_CRITICAL = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
# Baseline, extended and progressive frames; tables; restart interval; scans. Lossless, hierarchical and
# arithmetic JPEGs are refused: no browser shows them.
_JPEG_FRAMES = {0xC0, 0xC1, 0xC2}
_JPEG_KEPT = {*_JPEG_FRAMES, 0xC4, 0xDB, 0xDD, 0xDA}
_JPEG_DROPPED = {*range(0xE0, 0xF0), 0xFE}
_JPEG_END_OF_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


class Picture(msgspec.Struct, frozen=True):
    """A canonical picture in a temp folder, ready to be kept.

    Sizes in pixels and bytes; hashes are SHA-256 in hex; `dominant_color` is `#rrggbb`.
    """

    path: Path
    format: str
    width: int
    height: int
    size_bytes: int
    content_hash: str
    pixel_hash: str
    dominant_color: str


class Canonical(msgspec.Struct, frozen=True):
    """The canonical bytes, what their header promises, and the EXIF block that was dropped."""

    format: str
    width: int
    height: int
    data: bytes
    exif: bytes


def canonical(data: bytes) -> Canonical:
    """Drop everything from a PNG, JPEG or WebP that is not the picture, decoding nothing.

    Raises:
        PictureRefused: another format, damaged or truncated structure, or more than one frame.
    """
    try:
        if data.startswith(_PNG_SIGNATURE):
            return _png(memoryview(data))
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(memoryview(data))
    except IndexError as error:
        raise PictureRefused("the picture is truncated") from error
    raise PictureRefused("only PNG, JPEG and WebP pictures are accepted")


# PNG ------------------------------------------------------------------------------------------------------


def _png(view: memoryview) -> Canonical:
    kept: list[bytes | memoryview] = [_PNG_SIGNATURE]
    seen: set[bytes] = set()
    width = height = 0
    exif = b""
    previous = b""
    for name, body, raw in _png_chunks(view):
        if not seen and (name != b"IHDR" or len(body) != 13):
            raise PictureRefused("the PNG does not begin with its header")
        if name == b"IHDR":
            width, height = _big(body[:4]), _big(body[4:8])
        elif name == b"acTL":
            raise PictureRefused("animated pictures are not accepted")
        elif name == b"eXIf":
            exif = bytes(body)
        if _png_is_kept(name, body, seen, previous):
            kept.append(_png_profile(body) if name == b"iCCP" else raw)
        seen.add(name)
        previous = name
    if b"IDAT" not in seen:
        raise PictureRefused("the PNG holds no pixels")
    return Canonical("png", width, height, b"".join(kept), exif)


def _png_chunks(view: memoryview) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """Walk to IEND; Pillow does not check the sums of pixel data, so all are checked here."""
    at = len(_PNG_SIGNATURE)
    name = b""
    while name != b"IEND":
        end = at + 12 + _big(_slice(view, at, at + 4))
        raw = _slice(view, at, end)
        name = bytes(raw[4:8])
        if not name.isalpha() or zlib.crc32(raw[4:-4]) != _big(raw[-4:]):
            raise PictureRefused("a PNG chunk is damaged")
        if name == b"IEND" and len(raw) != 12:
            raise PictureRefused("the PNG's end holds data")
        yield name, raw[8:-4], raw
        at = end


def _png_is_kept(name: bytes, body: memoryview, seen: set[bytes], previous: bytes) -> bool:
    if name in _PNG_CRITICAL:
        if name in seen and not name == previous == b"IDAT":
            raise PictureRefused("a PNG chunk comes twice")
        return True
    if name[0] < ord("a"):
        raise PictureRefused("the PNG needs an extension forge does not know")
    if name in seen or b"IDAT" in seen:
        return False
    if name == b"tRNS":
        return len(body) <= 256
    if name == b"iCCP":
        return bool(_png_profile(body))
    return _PNG_COLOUR_LENGTHS.get(name) == len(body)


def _png_profile(body: memoryview) -> bytes:
    """The chunk again, under one fixed name: the name is free text."""
    _, _, rest = bytes(body).partition(b"\0")
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(rest[1:], _MAX_PROFILE + 1)
    except zlib.error:
        return b""
    if not inflate.eof or not _is_profile(profile):
        return b""
    chunk = b"iCCPicc\0\0" + zlib.compress(profile)
    return (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)


# JPEG -----------------------------------------------------------------------------------------------------


def _jpeg(data: bytes) -> Canonical:
    kept: list[bytes | memoryview] = [b"\xff\xd8"]
    profile: list[memoryview] = []
    size: tuple[int, int] | None = None
    exif = b""
    for marker, body, raw in _jpeg_segments(data):
        if marker in _JPEG_KEPT:
            kept.append(raw)
        elif marker not in _JPEG_DROPPED:
            raise PictureRefused("this kind of JPEG is not accepted")
        if marker in _JPEG_FRAMES:
            if size:
                raise PictureRefused("the JPEG holds more than one frame")
            size = _big(body[3:5]), _big(body[1:3])
        elif marker == 0xE0 and body[:5] == b"JFIF\0" and len(body) >= 12 and len(kept) == 1:
            kept.append(b"\xff\xe0\x00\x10" + body[:12] + b"\0\0")  # without its thumbnail
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            kept.append(b"\xff\xee\x00\x0e" + body[:12])
        elif marker == 0xE2 and body[:12] == b"ICC_PROFILE\0":
            profile.append(raw)
        elif marker == 0xE1 and body[:6] == b"Exif\0\0":
            exif = body[6:]
    if size is None:
        raise PictureRefused("the JPEG holds no pixels")
    if _is_profile(b"".join(bytes(raw[18:]) for raw in profile)):
        at = _after_applications(kept)
        kept[at:at] = profile
    kept.append(b"\xff\xd9")
    return Canonical("jpeg", *size, b"".join(kept), exif)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes, memoryview]]:
    """Walk to the end marker; a scan's segment carries the pixels behind it."""
    view, at = memoryview(data), 2
    while True:
        if view[at] != 0xFF:
            raise PictureRefused("a JPEG segment is damaged")
        while view[at + 1] == 0xFF:
            at += 1
        marker = view[at + 1]
        if marker == 0xD9:
            return
        length = _big(_slice(view, at + 2, at + 4))
        if length < 2:
            raise PictureRefused("a JPEG segment is damaged")
        end = at + 2 + length
        body = bytes(_slice(view, at + 4, end))
        if marker == 0xDA:
            found = _JPEG_END_OF_SCAN.search(data, end)
            if found is None:
                raise PictureRefused("the picture is truncated")
            end = found.start()
        yield marker, body, view[at:end]
        at = end


def _after_applications(kept: list[bytes | memoryview]) -> int:
    return next(i for i, segment in enumerate(kept) if i and segment[1] not in _JPEG_DROPPED)


# WebP -----------------------------------------------------------------------------------------------------


def _webp(view: memoryview) -> Canonical:
    chunks: dict[bytes, memoryview] = {}
    for name, body in _webp_chunks(view):
        if name in (b"ANIM", b"ANMF"):
            raise PictureRefused("animated pictures are not accepted")
        if name in chunks and name in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ICCP"):
            raise PictureRefused("a WebP chunk comes twice")
        chunks[name] = body
    if (b"VP8 " in chunks) == (b"VP8L" in chunks):
        raise PictureRefused("the WebP does not hold exactly one picture")
    width, height, alpha = _webp_frame(chunks)
    kept: list[bytes] = [name for name in (b"ALPH", b"VP8 ", b"VP8L") if name in chunks]
    if _is_profile(bytes(chunks.get(b"ICCP", b""))):
        kept.insert(0, b"ICCP")
    if kept[0] in (b"ICCP", b"ALPH"):
        # The extended header is needed for these two only; written anew, it has no room for anything else.
        flags = 0x20 * (kept[0] == b"ICCP") | 0x10 * alpha
        canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        chunks[b"VP8X"] = memoryview(bytes((flags, 0, 0, 0)) + canvas)
        kept.insert(0, b"VP8X")
    payload = b"WEBP" + b"".join(_webp_chunk(name, chunks[name]) for name in kept)
    data = b"RIFF" + len(payload).to_bytes(4, "little") + payload
    return Canonical("webp", width, height, data, bytes(chunks.get(b"EXIF", b"")))


def _webp_chunks(view: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    whole = _slice(view, 0, 8 + _little(view[4:8]))
    at = 12
    while at < len(whole):
        start = at + 8
        end = start + _little(_slice(whole, at + 4, start))
        yield bytes(whole[at : at + 4]), _slice(whole, start, end)
        at = end + end % 2


def _webp_frame(chunks: dict[bytes, memoryview]) -> tuple[int, int, bool]:
    """Width, height and whether there is transparency, as the pixels' own header says."""
    if b"VP8L" in chunks:
        head = _slice(chunks[b"VP8L"], 0, 5)
        bits = _little(head[1:])
        width, height, alpha = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), bool(bits >> 28 & 1)
        sound = head[0] == 0x2F and b"ALPH" not in chunks
    else:
        head = _slice(chunks[b"VP8 "], 0, 10)
        width, height, alpha = _little(head[6:8]) & 0x3FFF, _little(head[8:10]) & 0x3FFF, b"ALPH" in chunks
        sound = bytes(head[3:6]) == b"\x9d\x01\x2a"
    if b"VP8X" in chunks:
        canvas = _slice(chunks[b"VP8X"], 0, 10)
        sound &= (_little(canvas[4:7]) + 1, _little(canvas[7:10]) + 1) == (width, height)
    if not sound or not width or not height:
        raise PictureRefused("the WebP's headers are damaged")
    return width, height, alpha


def _webp_chunk(name: bytes, body: memoryview) -> bytes:
    return b"".join((name, len(body).to_bytes(4, "little"), body, b"\0" * (len(body) % 2)))


# Shared ---------------------------------------------------------------------------------------------------


def _is_profile(profile: bytes) -> bool:
    return (
        128 <= len(profile) <= _MAX_PROFILE
        and profile[36:40] == b"acsp"
        and _big(profile[:4]) == len(profile)
    )


def _slice(view: memoryview, start: int, end: int) -> memoryview:
    """A slice that is whole, where Python's own would be silently shorter."""
    if end > len(view):
        raise PictureRefused("the picture is truncated")
    return view[start:end]


def _big(view: memoryview | bytes) -> int:
    return int.from_bytes(view, "big")


def _little(view: memoryview | bytes) -> int:
    return int.from_bytes(view, "little")
