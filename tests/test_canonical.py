"""The same picture in, the same bytes out, and nothing in them that is not the picture."""

from __future__ import annotations

import contextlib
import io
import random
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from forge.canonical import canonical
from forge.errors import PictureRefused
from pictures import PROFILE, bomb, chunk, encoded, exif, hostile, noise, png, with_text

SECRET = b"a secret description"
HTML = b"<html><script>alert(1)</script></html>"


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@st.composite
def written_pictures(draw: st.DrawFn) -> bytes:
    """Any picture an encoder could write: format, mode, size, metadata and trailing bytes at random."""
    fmt = draw(st.sampled_from(["png", "jpeg", "webp"]))
    modes = {"png": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], "jpeg": ["L", "RGB", "CMYK"]}
    mode = draw(st.sampled_from(modes.get(fmt, ["RGB", "RGBA"])))
    image = noise(draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 99)))
    image = (
        noise(*image.size, mode="L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    )
    options = {"lossless": draw(st.booleans())} if fmt == "webp" else {}
    options |= {"progressive": draw(st.booleans())} if fmt == "jpeg" else {}
    options |= {"exif": exif()} if draw(st.booleans()) else {}
    options |= {"icc_profile": PROFILE} if draw(st.booleans()) else {}
    return encoded(image, fmt, **options) + draw(st.sampled_from([b"", HTML, b"\xff\xd9", bytes(100)]))


@given(written_pictures())
def test_pixels_stay_and_doing_it_twice_is_doing_it_once(data: bytes) -> None:
    once = canonical(data)
    assert canonical(once.data).data == once.data
    assert opened(once.data).tobytes() == opened(data).tobytes()
    assert opened(once.data).info.get("icc_profile") == opened(data).info.get("icc_profile")
    assert (once.width, once.height) == opened(data).size
    assert SECRET not in once.data
    assert HTML not in once.data


@settings(max_examples=300)
@given(written_pictures(), st.randoms(use_true_random=False))
@example(encoded(noise(mode="RGBA"), "webp", quality=50), random.Random(2))
def test_damage_is_refused_or_harmless(data: bytes, dice: random.Random) -> None:
    damaged = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(min(len(damaged), 120) if dice.random() < 0.7 else len(damaged))
        damaged[at : at + dice.randint(0, 3)] = dice.randbytes(dice.randint(0, 3))
    try:
        once = canonical(bytes(damaged))
    except PictureRefused:
        return
    assert canonical(once.data).data == once.data


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBP"]),
)
def test_any_bytes_end_in_a_refusal_at_worst(data: bytes, start: bytes) -> None:
    with contextlib.suppress(PictureRefused):
        canonical(start + data)


@pytest.mark.parametrize("data", hostile().values(), ids=hostile())
def test_hostile_bytes_end_in_a_refusal_at_worst(data: bytes) -> None:
    with contextlib.suppress(PictureRefused):
        canonical(data)


def test_comfyui_writing_another_graph_into_the_same_picture_changes_nothing() -> None:
    first, second = with_text(noise(), "a graph"), with_text(noise(), "another graph" * 500)
    assert first != second
    assert canonical(first).data == canonical(second).data == canonical(encoded(noise())).data


@pytest.mark.parametrize("fmt", ["png", "jpeg", "webp"])
def test_metadata_does_not_make_another_picture(fmt: str) -> None:
    options = {"lossless": True} if fmt == "webp" else {}
    noted = encoded(noise(), fmt, exif=exif(), **options)
    assert SECRET in noted
    assert canonical(noted).data == canonical(encoded(noise(), fmt, **options)).data
    assert canonical(noted).exif


def test_a_jpeg_loses_comment_and_embedded_thumbnail() -> None:
    plain = encoded(noise(), "jpeg")
    jfif = plain[2:20]
    assert jfif[:2] == b"\xff\xe0"
    with_thumbnail = b"\xff\xe0\x00\x13" + jfif[4:16] + b"\x01\x01abc"
    noted = plain[:2] + with_thumbnail + b"\xff\xfe\x00\x08secret" + b"\xff\xff" + plain[21:]
    assert opened(noted).size == (64, 64)
    assert canonical(noted).data == plain


def test_a_profile_is_kept_without_its_name_and_bytes_posing_as_one_are_not() -> None:
    def profiled(name: bytes, profile: bytes) -> bytes:
        return png(1, 1, 8, 2, bytes(4), chunk(b"iCCP", name + b"\0\0" + zlib.compress(profile)))

    kept = canonical(profiled(b"secret name", PROFILE)).data
    assert opened(kept).info["icc_profile"] == PROFILE
    assert b"secret" not in kept
    assert kept == canonical(profiled(b"other", PROFILE)).data
    for fake in (HTML * 10, PROFILE + HTML, PROFILE[:100], bytes(5 << 20)):
        assert canonical(profiled(b"x", fake)).data == png(1, 1, 8, 2, bytes(4))


def test_transparency_and_colour_space_stay_while_the_rest_goes() -> None:
    palette, clear = chunk(b"PLTE", bytes(range(6))), chunk(b"tRNS", b"\x10")
    gamma, physical = chunk(b"gAMA", b"\0\0\xb1\x8f"), chunk(b"pHYs", bytes(9))
    odd_gamma, private = chunk(b"gAMA", HTML), chunk(b"prVt", HTML)
    noted = png(
        2,
        1,
        8,
        3,
        b"\0\0\1",
        gamma,
        physical,
        odd_gamma,
        private,
        palette,
        clear,
        after=private + physical + chunk(b"sRGB", b"\0"),
    )
    assert canonical(noted).data == png(2, 1, 8, 3, b"\0\0\1", gamma, palette, clear)


def test_a_header_is_read_without_decoding() -> None:
    large = canonical(bomb(30_000, 100))
    assert (large.width, large.height) == (30_000, 100)
