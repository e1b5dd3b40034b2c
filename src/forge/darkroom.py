"""The child process that decodes foreign pictures: `python -m forge.darkroom MEMORY_BYTES MAX_PIXELS`.

An order is one JSON line over the socket on fd 0, its files attached as open descriptors; one JSON line goes
back. Those files are all this process has: no environment, no way to open another file or a connection
(Landlock, where the kernel has it), bounded memory. A picture that takes the decoder over can spoil itself,
and nothing else.

It ends with its parent: by the closed socket while it waits, by a signal while it draws.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import os
import resource
import signal
import socket
import struct
import sys
import warnings
from collections import defaultdict
from typing import Any, BinaryIO

import msgspec
from PIL import Image, UnidentifiedImageError

from forge.canonical import FORMATS, THUMBNAIL_WIDTHS, Canonical, canonical
from forge.errors import FULL_VOLUME, PictureRefused

_MAX_SOURCE_BYTES = 256 << 20
_MAX_FILES = 1 + len(THUMBNAIL_WIDTHS)
_BAND_PIXELS = 1 << 22  # hashed at a time, so that hashing needs no second copy of a large picture
_TALLEST = 4  # a thumbnail is at most this many times as high as the asked width
_ORIENTATION = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_LEVEL = 4  # half the time of the default, a few per cent more bytes
_KEPT_BYTES = 32 << 20  # of memory that the next picture finds; as much as glibc can be told


class VolumeFailed(Exception):
    """Reading or writing a file failed: the volume's fault, not the picture's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.full = error.errno in FULL_VOLUME


# Pictures -------------------------------------------------------------------------------------------------


def develop(files: list[BinaryIO], max_pixels: int) -> dict[str, Any]:
    """Write the canonical picture; `files` are source and target."""
    source, target = files
    plain = _admit(source, max_pixels)
    image = _flat(_decode(plain))
    pixel_hash = _pixel_hash(image)
    _write(target, plain.data)
    return _facts(plain.format, (plain.width, plain.height), plain.data, pixel_hash, _viewable(image))


def redraw(files: list[BinaryIO], max_pixels: int) -> dict[str, Any]:
    """Write the pixels alone as a new PNG; `files` are source and target.

    Not one byte of the source is copied, so what hides in a picture's structure or compression ends here. A
    picture that is stored turned is turned upright. Colour profiles go: ComfyUI, for which this is, reads the
    numbers without them.
    """
    source, target = files
    plain = _admit(source, max_pixels, upright=False)
    image = _viewable(_flat(_decode(plain)))
    orientation = _orientation(plain)
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    image.info = {}  # the encoder would write some of it
    data = _png(image)
    _write(target, data)
    return _facts("png", image.size, data, _pixel_hash(image), image)


def _facts(
    fmt: str, size: tuple[int, int], data: bytes, pixel_hash: str, image: Image.Image
) -> dict[str, Any]:
    return {
        "format": fmt,
        "width": size[0],
        "height": size[1],
        "size_bytes": len(data),
        "content_hash": hashlib.sha256(data).hexdigest(),
        "pixel_hash": pixel_hash,
        "dominant_color": _dominant_color(image),
    }


def thumbnails(files: list[BinaryIO], max_pixels: int, widths: list[int]) -> dict[str, Any]:
    """Write one WebP for each width, at most so many pixels across; `files` are source and targets."""
    source, *targets = files
    image = _viewable(_flat(_decode(_admit(source, max_pixels))))
    encoded = dict[tuple[int, int], bytes]()
    for width, file in sorted(zip(widths, targets, strict=True), key=lambda each: -each[0]):
        image = _shrink(image, width)  # each from the one before
        if image.size not in encoded:
            encoded[image.size] = _webp(image)
        _write(file, encoded[image.size])
    return {}


def _admit(source: BinaryIO, max_pixels: int, *, upright: bool = True) -> Canonical:
    """Everything that can be refused before a single pixel is decoded."""
    try:
        size = os.fstat(source.fileno()).st_size
        data = source.read() if size <= _MAX_SOURCE_BYTES else b""
    except OSError as error:
        raise VolumeFailed(error) from error
    if not data:
        raise PictureRefused("the picture is empty" if not size else "the file is too large for a picture")
    plain = canonical(data)
    if not 0 < plain.width * plain.height <= max_pixels:
        raise PictureRefused(f"{plain.width} x {plain.height} is not a size forge accepts")
    if upright and _orientation(plain) != 1:
        raise PictureRefused(
            "the picture is stored turned and says so in EXIF, which forge drops; save it upright"
        )
    return plain


def _orientation(plain: Canonical) -> int:
    exif = Image.Exif()
    with contextlib.suppress(Exception):  # a broken block says nothing about orientation either
        exif.load(plain.exif)
    return exif.get(_ORIENTATION, 1)  # type: ignore[no-any-return]  # whatever the file says


def _decode(plain: Canonical) -> Image.Image:
    """Decode what will be stored, not what came, so that the stored bytes are known to be a picture."""
    image = Image.open(io.BytesIO(plain.data), formats=[plain.format])
    if image.size != (plain.width, plain.height):
        raise PictureRefused("the picture's headers contradict each other")
    image.load()
    return image


def _flat(image: Image.Image) -> Image.Image:
    """Pixels that mean the same everywhere: no palette, no colour that stands for transparent."""
    if image.mode in ("RGB", "RGBA", "L", "I;16", "CMYK") and "transparency" not in image.info:
        return image
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _viewable(image: Image.Image) -> Image.Image:
    if image.mode == "I;16":
        image = image.point(lambda value: value * (1 / 256)).convert(
            "L"
        )  # convert() alone would clip to white
    return image if image.mode in ("RGB", "RGBA") else image.convert("RGB")


def _pixel_hash(image: Image.Image) -> str:
    width, height = image.size
    digest = hashlib.sha256(f"{image.mode} {width} {height}\n".encode())
    rows = max(1, _BAND_PIXELS // width)
    if rows >= height:  # cutting it out would copy it
        digest.update(image.tobytes())
        return digest.hexdigest()
    for top in range(0, height, rows):
        digest.update(image.crop((0, top, width, min(top + rows, height))).tobytes())
    return digest.hexdigest()


def _shrink(image: Image.Image, width: int) -> Image.Image:
    scale = min(1.0, width / image.width, _TALLEST * width / image.height)
    if scale == 1.0:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)


def _webp(image: Image.Image) -> bytes:
    profile = image.info.get("icc_profile") or b""
    target = io.BytesIO()
    # A grey or CMYK picture's profile does not fit the RGB of its thumbnail.
    image.save(
        target, "WEBP", quality=80, method=4, icc_profile=profile if profile[16:20] == b"RGB " else b""
    )
    return target.getvalue()


def _png(image: Image.Image) -> bytes:
    target = io.BytesIO()
    image.save(target, "PNG", compress_level=_PNG_LEVEL)
    return target.getvalue()


def _dominant_color(image: Image.Image) -> str:
    """The mean of the largest group of similar colours, counting only what is not transparent."""
    size = min(16, image.width), min(16, image.height)
    few = image.resize(size, Image.Resampling.BOX, reducing_gap=1.0).convert("RGBA")
    groups: defaultdict[tuple[int, int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for red, green, blue, alpha in few.get_flattened_data():  # type: ignore[misc]  # of RGBA they are tuples
        if alpha >= 128:
            groups[red >> 6, green >> 6, blue >> 6].append((red, green, blue))
    largest = max(groups.values(), key=len, default=[(0, 0, 0)])
    return "#" + "".join(f"{sum(channel) // len(largest):02x}" for channel in zip(*largest, strict=True))


def _write(file: BinaryIO, data: bytes) -> None:
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise VolumeFailed(error) from error


# Orders ---------------------------------------------------------------------------------------------------


def serve(orders: socket.socket, max_pixels: int) -> None:
    """Carry out one order after the other until the parent hangs up."""
    while True:
        line, descriptors, _, _ = socket.recv_fds(orders, 4096, _MAX_FILES)
        if not line:
            return
        with contextlib.ExitStack() as stack:
            # Unbuffered: what is written is written, and `fsync` speaks of all of it.
            files = [
                stack.enter_context(open(fd, "wb" if i else "rb", 0)) for i, fd in enumerate(descriptors)
            ]
            answer = _answer(msgspec.json.decode(line), files, max_pixels)  # type: ignore[arg-type]  # unbuffered
        orders.sendall(msgspec.json.encode(answer) + b"\n")


def _answer(order: dict[str, Any], files: list[BinaryIO], max_pixels: int) -> dict[str, Any]:
    try:
        if widths := order.get("thumbnails"):
            return thumbnails(files, max_pixels, widths)
        if fewer := order.get("redraw"):
            return redraw(files, min(max_pixels, fewer))
        return develop(files, max_pixels)
    except VolumeFailed as error:
        return {"failed": str(error), "full": error.full}
    except PictureRefused as error:
        return {"refused": error.detail}
    except MemoryError:
        return {"refused": "the picture needs more memory than a decoder may use"}
    except UnidentifiedImageError:  # its message names an object of this process
        return {"refused": "the picture cannot be decoded"}
    except Exception as error:  # a decoder of hostile bytes may raise anything
        return {"refused": f"the picture cannot be decoded: {error}"[:200]}


# Confinement ----------------------------------------------------------------------------------------------


def confine(memory_bytes: int, max_pixels: int) -> bool:
    """Give up what decoding does not need; True if the kernel also closed the file system (Landlock)."""
    for ignored in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # sent to the whole group; the parent drains and still needs us
        signal.signal(ignored, signal.SIG_IGN)
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    _keep_memory()
    Image.MAX_IMAGE_PIXELS = max_pixels
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    _warm_up()
    return sys.platform == "linux" and _lock_the_door()


def _keep_memory() -> None:
    """Have the next picture decoded in the memory of the last. Each would give its pages back, and asking for
    them anew takes half as long as decoding."""
    libc: Any = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # another C library than glibc
        libc.mallopt(-3, _KEPT_BYTES)  # M_MMAP_THRESHOLD: what is smaller comes from the heap
        libc.mallopt(-1, _KEPT_BYTES)  # M_TRIM_THRESHOLD: so much free heap stays


def _warm_up() -> None:
    """Pillow imports its plugins on first use, which the closed door would forbid."""
    for name in FORMATS:
        sample = io.BytesIO()
        Image.new("RGB", (2, 2)).save(sample, name)
        _dominant_color(_shrink(_viewable(_flat(_decode(canonical(sample.getvalue())))), 1))


def _lock_the_door() -> bool:
    """Landlock with no rule at all: nothing can be opened any more; what is open stays open.

    The numbers are those of linux/landlock.h, the same on every architecture; each version of the interface
    knows more rights, and a right it does not know is refused.
    """
    libc: Any = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, without which Landlock is refused
    version: int = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    file_rights = (1 << (13, 14, 15, 15, 16)[min(version, 5) - 1]) - 1
    network_rights, scopes = 3 * (version >= 4), 3 * (version >= 6)
    rules = struct.pack("=QQQ", file_rights, network_rights, scopes)[
        : 24 if version >= 6 else 16 if version >= 4 else 8
    ]
    ruleset: int = libc.syscall(444, rules, len(rules), 0)
    if ruleset < 0:
        return False
    closed = not libc.syscall(446, ruleset, 0)
    os.close(ruleset)
    return closed


def main() -> None:
    memory_bytes, max_pixels = map(int, sys.argv[1:])
    orders = socket.socket(fileno=0)
    confined = confine(memory_bytes, max_pixels)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the parent is gone
        orders.sendall(msgspec.json.encode({"confined": confined}) + b"\n")
        serve(orders, max_pixels)


if __name__ == "__main__":
    main()
