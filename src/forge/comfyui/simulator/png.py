"""Writing PNG files with ComfyUI's text chunks; flat pictures cost microseconds."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo


class Flat(NamedTuple):
    """A picture of one colour, kept as numbers until somebody needs pixels."""

    width: int
    height: int
    rgb: int

    def image(self) -> Image.Image:
        return Image.new("RGB", (self.width, self.height), tuple(self.rgb.to_bytes(3, "big")))


Frame = Flat | Image.Image


def image_of(frame: Frame) -> Image.Image:
    """The frame as a Pillow image."""
    return frame.image() if isinstance(frame, Flat) else frame


def png_bytes(frame: Frame, texts: Mapping[str, str]) -> bytes:
    """A PNG file with one text chunk per item of `texts`."""
    if isinstance(frame, Flat):
        return _flat_png(frame, texts)
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    frame.save(buffer, "PNG", pnginfo=info, compress_level=4)
    return buffer.getvalue()


def bomb_png() -> bytes:
    """A few hundred bytes that claim to be 60 000 pixels square."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        _SIGNATURE
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(bytes(1000)))
        + _chunk(b"IEND", b"")
    )


_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _flat_png(flat: Flat, texts: Mapping[str, str]) -> bytes:
    header = struct.pack(">IIBBBBB", flat.width, flat.height, 8, 2, 0, 0, 0)
    row = b"\0" + flat.rgb.to_bytes(3, "big") * flat.width
    chunks = [_chunk(b"IHDR", header)]
    chunks += [_chunk(b"tEXt", key.encode("latin-1") + b"\0" + _latin(text)) for key, text in texts.items()]
    chunks += [_chunk(b"IDAT", zlib.compress(row * flat.height, 1)), _chunk(b"IEND", b"")]
    return _SIGNATURE + b"".join(chunks)


def _latin(text: str) -> bytes:
    return text.encode("latin-1", "replace")  # json.dumps leaves ASCII only; this is for hand-made texts


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
