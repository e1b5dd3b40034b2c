"""Foreign bytes become pictures in a bounded child, or are refused, and the next one works."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import resource
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from forge import images
from forge.errors import DiskFull, PictureRefused, StoreFailed
from forge.images import Picture, Workshop
from forge.telemetry import numbers
from pictures import PROFILE, bomb, chunk, encoded, exif, hostile, noise, png, profile, with_text
from processes import alive, freeze
from volumes import small_volume
from waiting import wait_until

HOSTILE = hostile()


@pytest.fixture(scope="module")
async def workshop() -> AsyncIterator[Workshop]:
    async with Workshop() as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    return made


async def developed(workshop: Workshop, data: bytes, folder: Path) -> Picture:
    source = folder.parent / "source"
    source.write_bytes(data)
    return await workshop.develop(source, folder)


async def shrunk(workshop: Workshop, data: bytes, folder: Path) -> dict[int, Path]:
    """The thumbnails of a picture."""
    source = folder.parent / "source"
    source.write_bytes(data)
    return await workshop.thumbnails(source, folder)


def content(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


async def test_a_picture_is_developed_with_all_that_is_to_be_known(workshop: Workshop, folder: Path) -> None:
    image = Image.new("RGB", (1024, 1536), (200, 30, 30))
    image.paste((10, 10, 250), (0, 0, 200, 200))
    picture = await developed(workshop, with_text(image, "graph"), folder)
    data = picture.path.read_bytes()
    assert (picture.format, picture.width, picture.height) == ("png", 1024, 1536)
    assert picture.size_bytes == len(data)
    assert picture.content_hash == hashlib.sha256(data).hexdigest()
    painted, found = (200, 30, 30), bytes.fromhex(picture.dominant_color[1:])
    assert max(abs(a - b) for a, b in zip(painted, found, strict=True)) < 3
    assert b"graph" not in data
    assert content(folder) == [picture.path]


async def test_thumbnails_are_webp_in_two_widths(workshop: Workshop, folder: Path) -> None:
    made = await shrunk(workshop, encoded(Image.new("RGB", (1024, 1536))), folder)
    assert {width: size_of(path) for width, path in made.items()} == {256: (256, 384), 512: (512, 768)}
    assert all(path.read_bytes()[8:12] == b"WEBP" for path in made.values())
    assert set(content(folder)) == set(made.values())


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.fault("X1")
async def test_what_is_not_a_sound_picture_is_refused_and_leaves_nothing(
    workshop: Workshop, folder: Path, what: str
) -> None:
    before = workshop.pids
    with pytest.raises(PictureRefused):
        await developed(workshop, HOSTILE[what], folder)
    assert content(folder) == []
    assert workshop.pids == before, "refusing must not cost the child"


UPLOAD_PIXELS = 4096 * 4096


async def redrawn(workshop: Workshop, data: bytes, folder: Path, most: int = UPLOAD_PIXELS) -> Picture:
    source = folder.parent / "source"
    source.write_bytes(data)
    return await workshop.redraw(source, folder, most)


@pytest.mark.parametrize("what", [what for what in HOSTILE if what != "jpeg stored turned"])
async def test_what_is_not_a_sound_picture_is_not_drawn_anew(
    workshop: Workshop, folder: Path, what: str
) -> None:
    before = workshop.pids
    with pytest.raises(PictureRefused):
        await redrawn(workshop, HOSTILE[what], folder)
    assert content(folder) == []
    assert workshop.pids == before, "refusing must not cost the child"


async def test_drawing_anew_keeps_the_pixels_and_nothing_else(workshop: Workshop, folder: Path) -> None:
    image = noise(80, 60)
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "a secret")
    dressed = encoded(image, pnginfo=info, icc_profile=PROFILE, exif=exif(), dpi=(300, 300))
    picture = await redrawn(workshop, dressed + b"PK\x03\x04<script>", folder)
    data = picture.path.read_bytes()
    assert [data[at + 4 : at + 8] for at in chunk_starts(data)] == [b"IHDR", b"IDAT", b"IEND"]
    with Image.open(picture.path) as found:
        assert (found.format, found.mode, found.tobytes()) == ("PNG", "RGB", image.tobytes())
    assert picture.content_hash == hashlib.sha256(data).hexdigest()
    assert (picture.width, picture.height, picture.size_bytes) == (80, 60, len(data))
    assert content(folder) == [picture.path]


def chunk_starts(data: bytes) -> Iterator[int]:
    at = 8
    while at < len(data):
        yield at
        at += 12 + int.from_bytes(data[at : at + 4])


async def test_bytes_that_hide_in_the_compressed_pixels_are_gone(workshop: Workshop, folder: Path) -> None:
    """`develop` copies the compressed stream; drawn anew, nothing of it is left."""
    hidden = png(1, 1, 8, 0, b"\0\x80").replace(
        chunk(b"IDAT", zlib.compress(b"\0\x80")), chunk(b"IDAT", zlib.compress(b"\0\x80") + b"<?php evil")
    )
    assert b"<?php" in (await developed(workshop, hidden, folder)).path.read_bytes()
    assert b"<?php" not in (await redrawn(workshop, hidden, folder)).path.read_bytes()


async def test_one_picture_in_three_formats_is_one_upload(workshop: Workshop, folder: Path) -> None:
    image = noise()
    drawn = [
        await redrawn(workshop, encoded(image, "webp", lossless=True), folder),
        await redrawn(workshop, encoded(image, "png", compress_level=1), folder),
        await redrawn(workshop, with_text(image, "x"), folder),
    ]
    assert len({picture.content_hash for picture in drawn}) == 1
    jpeg = await redrawn(workshop, encoded(image, "jpeg"), folder)
    assert (jpeg.format, jpeg.content_hash == drawn[0].content_hash) == ("png", False)


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_a_turned_picture_is_turned_upright(workshop: Workshop, folder: Path, orientation: int) -> None:
    image = noise(40, 30)
    picture = await redrawn(workshop, encoded(image, exif=exif(orientation)), folder)
    with Image.open(io.BytesIO(encoded(image, exif=exif(orientation)))) as stored:
        upright = ImageOps.exif_transpose(stored)
    with Image.open(picture.path) as found:
        assert (found.size, found.tobytes()) == (upright.size, upright.tobytes())
    assert (picture.width, picture.height) == upright.size


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK", "I;16"])
async def test_every_kind_of_picture_becomes_one_that_a_node_can_load(
    workshop: Workshop, folder: Path, mode: str
) -> None:
    image = Image.new(mode, (20, 10))
    picture = await redrawn(workshop, encoded(image, "jpeg" if mode == "CMYK" else "png"), folder)
    with Image.open(picture.path) as found:
        assert found.mode == ("RGBA" if "A" in mode else "RGB")


async def test_pixels_are_counted_on_the_header(workshop: Workshop, folder: Path) -> None:
    assert (await redrawn(workshop, bomb(4096, 4096), folder)).width == 4096
    with pytest.raises(PictureRefused, match="4097 x 4096 is not a size"):
        await redrawn(workshop, bomb(4097, 4096), folder)
    with pytest.raises(PictureRefused, match="is not a size"):
        await redrawn(workshop, encoded(noise(10, 10)), folder, 99)


async def test_an_animation_is_refused_as_such(workshop: Workshop, folder: Path) -> None:
    for what in ("animated png", "animated webp"):
        with pytest.raises(PictureRefused, match="animated"):
            await developed(workshop, HOSTILE[what], folder)


async def test_a_polyglot_is_kept_without_its_other_half(workshop: Workshop, folder: Path) -> None:
    for fmt in ("png", "jpeg", "webp"):
        plain = encoded(noise(), fmt)
        picture = await developed(workshop, plain + b"<html><script>alert(1)</script>", folder)
        assert picture.path.read_bytes() == plain


async def test_equal_pixels_have_equal_pixel_hashes_whatever_their_coding(
    workshop: Workshop, folder: Path
) -> None:
    image = noise()
    codings = [
        encoded(image, "png", compress_level=1),
        encoded(image, "png", compress_level=9),
        encoded(image, "webp", lossless=True),
    ]
    pictures = [await developed(workshop, data, folder) for data in codings]
    assert len({p.pixel_hash for p in pictures}) == 1
    assert len({p.content_hash for p in pictures}) == 3
    other = await developed(workshop, encoded(noise(seed=2)), folder)
    assert other.pixel_hash != pictures[0].pixel_hash
    turned = [await developed(workshop, encoded(Image.new("L", size)), folder) for size in ((2, 8), (8, 2))]
    assert turned[0].pixel_hash != turned[1].pixel_hash


async def test_a_small_picture_is_never_enlarged(workshop: Workshop, folder: Path) -> None:
    for size in ((1, 1), (300, 20)):
        made = await shrunk(workshop, encoded(noise(*size)), folder)
        assert size_of(made[512]) == size
        assert size_of(made[256])[0] == min(256, size[0])


async def test_a_needle_has_thumbnails_too(workshop: Workshop, folder: Path) -> None:
    made = await shrunk(workshop, encoded(Image.new("RGB", (4, 40_000))), folder)
    assert size_of(made[256]) == (1, 1024)


async def test_sixteen_bits_are_scaled_not_clipped(workshop: Workshop, folder: Path) -> None:
    row = b"\0" + b"\x40\x00" * 8
    data = png(8, 8, 16, 0, row * 8)
    with Image.open((await shrunk(workshop, data, folder))[256]) as thumbnail:
        assert abs(thumbnail.convert("L").getpixel((4, 4)) - 0x40) < 4
    assert (await developed(workshop, data, folder)).dominant_color == "#404040"


async def test_a_transparent_palette_stays_transparent(workshop: Workshop, folder: Path) -> None:
    palette = chunk(b"PLTE", bytes((250, 0, 0, 0, 0, 250))), chunk(b"tRNS", b"\0")
    data = png(8, 1, 8, 3, b"\0" + b"\0" * 6 + b"\1\1", *palette)
    colour = (await developed(workshop, data, folder)).dominant_color
    assert colour == "#0000fa", "what is not seen has no colour"
    with Image.open((await shrunk(workshop, data, folder))[256]) as thumbnail:
        assert thumbnail.convert("RGBA").getpixel((0, 0))[3] == 0
        assert thumbnail.convert("RGBA").getpixel((7, 0))[3] == 255


async def test_a_thumbnail_has_the_colour_space_of_its_picture(workshop: Workshop, folder: Path) -> None:
    made = await shrunk(workshop, encoded(noise(600, 20), icc_profile=PROFILE), folder)
    with Image.open(made[256]) as thumbnail:
        assert thumbnail.info["icc_profile"] == PROFILE
    grey = await shrunk(workshop, encoded(noise(600, 20, mode="L"), icc_profile=profile(b"GRAY")), folder)
    with Image.open(grey[256]) as thumbnail:
        assert "icc_profile" not in thumbnail.info


async def test_a_large_picture_fits(workshop: Workshop, folder: Path) -> None:
    image = Image.radial_gradient("L").resize((4096, 4096))
    data = encoded(image)
    picture = await developed(workshop, data, folder)
    assert picture.width == 4096
    whole = hashlib.sha256(b"L 4096 4096\n" + image.tobytes()).hexdigest()
    assert picture.pixel_hash == whole, "hashed in pieces, it is the same"
    assert size_of((await shrunk(workshop, data, folder))[512]) == (512, 512)


async def test_a_picture_that_needs_too_much_memory_is_refused_and_the_next_one_works(folder: Path) -> None:
    async with Workshop(memory_bytes=160 << 20) as small:
        with pytest.raises(PictureRefused, match="memory"):
            await developed(small, bomb(7_900, 8_000) + bytes(100), folder)
        assert psutil.Process(small.pids[0]).memory_info().vms < 160 << 20
        assert (await developed(small, encoded(noise()), folder)).width == 64


async def test_a_workshop_refuses_more_pixels_than_it_was_told(folder: Path) -> None:
    async with Workshop(max_pixels=64 * 64) as small:
        assert await developed(small, encoded(noise(64, 64)), folder)
        with pytest.raises(PictureRefused, match="64 x 65"):
            await developed(small, encoded(noise(64, 65)), folder)


async def test_a_thumbnail_has_any_width_that_is_asked_for(workshop: Workshop, folder: Path) -> None:
    (folder / "source").write_bytes(encoded(noise(300, 300)))
    made = await workshop.thumbnails(folder / "source", folder, (100,))
    assert {width: size_of(path) for width, path in made.items()} == {100: (100, 100)}
    made[100].unlink()
    (folder / "source").write_bytes(b"nonsense")
    with pytest.raises(PictureRefused):
        await workshop.thumbnails(folder / "source", folder, (100,))
    assert {path.name for path in content(folder)} == {"source"}


async def test_several_children_work_side_by_side(folder: Path) -> None:
    async with Workshop(processes=2) as two:
        assert len(set(two.pids)) == 2
        for n in range(8):
            (folder / f"source{n}").write_bytes(encoded(noise(seed=n)))
        pictures = await asyncio.gather(*(two.develop(folder / f"source{n}", folder) for n in range(8)))
        own = [encoded(noise(seed=n)) for n in range(8)]
        assert [p.path.read_bytes() for p in pictures] == own


async def test_a_child_killed_while_idle_is_replaced(workshop: Workshop, folder: Path) -> None:
    (victim,) = workshop.pids
    os.kill(victim, signal.SIGKILL)
    assert await developed(workshop, encoded(noise()), folder)
    assert workshop.pids != [victim]


async def test_a_child_killed_at_work_is_replaced_and_the_picture_tried_again(
    workshop: Workshop, folder: Path
) -> None:
    (victim,) = workshop.pids
    await freeze(victim)
    work = asyncio.ensure_future(developed(workshop, encoded(noise()), folder))
    await wait_until(lambda: content(folder), what="the order is given")
    os.kill(victim, signal.SIGKILL)
    assert (await work).width == 64
    assert workshop.pids != [victim]


def died() -> float:
    return numbers.registry.get_sample_value("forge_decoder_deaths_total") or 0.0


async def test_a_picture_that_ends_two_children_is_refused(workshop: Workshop, folder: Path) -> None:
    def holder() -> int:
        """The child that holds the picture, once it does."""
        for pid in workshop.pids:
            with contextlib.suppress(OSError):
                links = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
                if str(folder.parent / "endless") in links:
                    return pid
        return 0

    died_before = died()
    endless = folder.parent / "endless"
    os.mkfifo(endless)
    with endless.open("r+b", 0):  # so a read waits for more, for ever
        work = asyncio.ensure_future(workshop.develop(endless, folder))
        first = await wait_until(holder)
        os.kill(first, signal.SIGKILL)
        second = await wait_until(lambda: {holder()} - {0, first})
        os.kill(second.pop(), signal.SIGKILL)
        with pytest.raises(PictureRefused, match="twice"):
            await work
    assert died() == died_before + 2
    assert content(folder) == []
    assert await developed(workshop, encoded(noise()), folder)


async def test_a_child_that_hangs_is_ended(
    workshop: Workshop, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await developed(workshop, encoded(noise()), folder)
    (victim,) = workshop.pids
    monkeypatch.setattr(images, "_SECONDS_PER_PICTURE", 0.5)
    await freeze(victim)
    work = asyncio.ensure_future(developed(workshop, encoded(noise(seed=2)), folder))
    await wait_until(lambda: len(content(folder)) == 2, what="the order is given")
    monkeypatch.undo()  # the child that comes after may take its time
    await wait_until(lambda: not psutil.pid_exists(victim), what="the hanging child is ended")
    assert (await work).width == 64


async def test_a_cancelled_order_leaves_nothing_and_answers_nobody_else(
    workshop: Workshop, folder: Path
) -> None:
    await freeze(workshop.pids[0])
    work = asyncio.ensure_future(developed(workshop, encoded(noise(seed=1)), folder))
    await wait_until(lambda: content(folder), what="the order is given")
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert content(folder) == []
    picture = await developed(workshop, encoded(noise(30, 20)), folder)
    assert (picture.width, picture.height) == (30, 20)


async def test_a_volume_that_refuses_is_not_the_pictures_fault(folder: Path) -> None:
    async with Workshop() as workshop:
        resource.prlimit(workshop.pids[0], resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(StoreFailed):
            await developed(workshop, encoded(noise()), folder)
        assert content(folder) == []
    async with Workshop() as workshop:
        with pytest.raises(StoreFailed):
            await workshop.develop(folder / "missing", folder)


async def test_a_full_volume_is_said_to_be_full(folder: Path) -> None:
    with small_volume(folder, "64k"):
        async with Workshop() as workshop:
            with pytest.raises(DiskFull, match="No space"):
                await developed(workshop, encoded(noise(200, 200)), folder)
            assert content(folder) == []


async def test_no_child_and_no_descriptor_is_left(folder: Path) -> None:
    me = psutil.Process()
    before = me.num_fds()
    for _ in range(3):
        async with Workshop() as workshop:
            (pid,) = workshop.pids
            await developed(workshop, encoded(noise()), folder)
            with pytest.raises(PictureRefused):
                await developed(workshop, b"nonsense", folder)
        assert not psutil.pid_exists(pid)
    assert me.num_fds() == before


async def test_the_child_has_nothing_but_its_socket(workshop: Workshop, folder: Path) -> None:
    await developed(workshop, encoded(noise()), folder)
    (pid,) = workshop.pids
    child = psutil.Process(pid)
    assert child.environ() == {}
    assert child.num_fds() == 3
    assert os.readlink(f"/proc/{pid}/fd/0").startswith("socket:")
    assert child.nice() == min(19, os.nice(0) + 5)


async def test_a_picture_is_decoded_in_the_memory_of_the_last(workshop: Workshop, folder: Path) -> None:
    (pid,) = workshop.pids

    def pages_asked_for() -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])

    data = encoded(Image.new("RGB", (1024, 1024), "red"))
    await developed(workshop, data, folder)
    before = pages_asked_for()
    await developed(workshop, data, folder)
    assert pages_asked_for() - before < 500, "its pixels alone fill a thousand"


PROBE = """
import os, socket, sys
from forge import darkroom
kept = open(sys.argv[1], "rb")
if not darkroom.confine(1 << 30, 100):
    print("no landlock"); sys.exit()
for attempt in (
    lambda: open("/etc/passwd"),
    lambda: open(sys.argv[1] + ".new", "w"),
    lambda: os.listdir("/"),
    lambda: os.execv("/bin/true", ["true"]),
    lambda: bytearray(2 << 30),
):
    try:
        attempt(); print("open door"); sys.exit(1)
    except (PermissionError, MemoryError):
        pass
print(kept.read().decode())
"""


def test_the_child_can_open_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("what was open stays open")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "kept")], capture_output=True, text=True, timeout=100
    )
    if "no landlock" in done.stdout:
        pytest.skip("this kernel has no Landlock")
    assert done.stdout == "what was open stays open\n", done.stderr


PARENT = """
import asyncio, signal, sys
from pathlib import Path
import uvloop
from forge.images import Workshop
async def main():
    async with Workshop(processes=2) as workshop:
        picture = await workshop.develop(Path(sys.argv[1]), Path(sys.argv[2]))
        print(picture.width, *workshop.pids, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
uvloop.run(main())
"""


async def test_children_die_with_a_killed_parent_even_when_they_do_not_listen(
    tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "source").write_bytes(encoded(noise()))
    # A script in a folder, as the installed `forge` is one; uvloop, as forge runs on it.
    (tmp_path / "forge").write_text(PARENT)
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", tmp_path / "forge", tmp_path / "source", folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert parent.stdout
    assert parent.stderr
    width, *pids = map(int, (await parent.stdout.readline()).split())
    assert width == 64
    assert len(pids) == 2
    await freeze(pids[0])
    parent.kill()
    await parent.wait()
    await wait_until(lambda: not any(alive(pid) for pid in pids), what="both children ended")
    assert await parent.stderr.read() == b""


async def test_a_child_whose_door_stays_open_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    line = images._Child._line

    async def without(child: images._Child, channel: socket.socket) -> bytes:
        await line(child, channel)
        return b'{"confined": false}\n'

    monkeypatch.setattr(images._Child, "_line", without)
    async with Workshop():
        assert "Landlock" in caplog.text
