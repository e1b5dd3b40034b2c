"""Pictures for tests: made here, byte by byte where an encoder would be too well behaved."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

from PIL import Image, PngImagePlugin


def profile(space: bytes) -> bytes:
    """As much of an ICC profile as anybody looks at."""
    return struct.pack(">I12x4s16x4s", 200, space, b"acsp").ljust(200, b"\0")


PROFILE = profile(b"RGB ")


def noise(width: int = 64, height: int = 64, seed: int = 1, mode: str = "RGB") -> Image.Image:
    size = width * height * len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), random.Random(seed).randbytes(size))


def encoded(image: Image.Image, fmt: str = "png", **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, fmt, **options)
    return target.getvalue()


def with_text(image: Image.Image, text: str) -> bytes:
    """As ComfyUI does it: the whole graph in a text chunk."""
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", text)
    info.add_itxt("workflow", text, zip=True)
    return encoded(image, pnginfo=info)


def exif(orientation: int = 1) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    block[0x010E] = "a secret description"
    return block.tobytes()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *before: bytes, after: bytes = b""
) -> bytes:
    """A PNG of raw scanlines (each with its filter byte) and whatever chunks lie around the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + pixels + after + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """A few kilobytes that decode to width x height grey pixels."""
    deflate, row = zlib.compressobj(9), bytes(1 + width)
    rows = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 0x10,)) + data[at + 1 :]


def _without_extended_header(webp: bytes) -> bytes:
    return webp[:4] + (len(webp) - 26).to_bytes(4, "little") + webp[8:12] + webp[30:]


def hostile() -> dict[str, bytes]:
    """What must be refused, by what is wrong with it."""
    good, jpeg = encoded(noise()), encoded(noise(), "jpeg")
    webp = encoded(noise(), "webp", lossless=True)
    clear = encoded(noise(mode="RGBA"), "webp", quality=50)
    frames = {"save_all": True, "append_images": [noise(seed=2)], "duration": 100}
    return {
        "nothing": b"",
        "one byte": b"\x89",
        "html": b"<html><script>alert(1)</script></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        "gif": encoded(noise(), "gif"),
        "bmp": encoded(noise(), "bmp"),
        "tiff": encoded(noise(), "tiff"),
        "mp4": b"\0\0\0\x18ftypmp42" + bytes(500),
        "zip": b"PK\x03\x04" + bytes(500),
        "png signature only": good[:8],
        "png without end": good[:-12],
        "png cut in its pixels": good[: len(good) // 2],
        "png with a wrong sum over its pixels": _damaged(good, 200),
        "png with a wrong sum over its header": _damaged(good, 19),
        "png with a wrong sum over what is sound": _damaged(good, len(good) - 14),
        "png whose pixels are not deflate": png(1, 1, 8, 0, b"").replace(zlib.compress(b""), b"nonsense"),
        "png without pixels": good[:33] + good[-12:],
        "png without a header": good[:8] + good[33:],
        "png of two headers": good[:33] + good[8:],
        "png in an unknown colour type": png(1, 1, 8, 5, b"\0\0"),
        "png of no width": png(0, 1, 8, 0, b"\0"),
        "png that needs an extension": png(1, 1, 8, 0, b"\0\0", chunk(b"CgBI", b"abcd")),
        "png with pixels in two places": png(
            1, 1, 8, 0, b"\0\0", after=chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", b"x")
        ),
        "png palette missing": png(1, 1, 8, 3, b"\0\0"),
        "png with a chunk beyond the file": good[:33] + b"\x7f\xff\xff\xffIDAT" + good[41:],
        "animated png": encoded(noise(), "png", **frames),
        "bomb: huge header": png(50_000, 50_000, 8, 2, bytes(100)),
        "bomb: 4 billion wide": png(2**31 - 1, 2**31 - 1, 8, 2, bytes(100)),
        "bomb: just over the limit": bomb(64_000_001, 1),
        "jpeg cut": jpeg[: len(jpeg) // 2],
        "jpeg without end": jpeg[:-2],
        "jpeg without pixels": b"\xff\xd8\xff\xd9",
        "jpeg start only": b"\xff\xd8\xff",
        "jpeg of two frames": jpeg[:-2] + jpeg[2:],
        "jpeg huge header": jpeg.replace(b"\x08\x00\x40\x00\x40", b"\x08\xff\xff\xff\xff"),
        "jpeg lying about its size": jpeg.replace(b"\xff\xc0", b"\xff\xc9"),
        "jpeg stored turned": encoded(noise(), "jpeg", exif=exif(6)),
        "webp cut": webp[: len(webp) // 2],
        "webp empty": b"RIFF\x04\0\0\0WEBP",
        "webp damaged": webp[:40] + bytes(len(webp) - 40),
        "webp whose headers disagree": _damaged(clear, 24),
        "webp of no width": _without_extended_header(clear).replace(
            b"\x9d\x01\x2a\x40\0", b"\x9d\x01\x2a\0\0"
        ),
        "animated webp": encoded(noise(), "webp", **frames),
    }
