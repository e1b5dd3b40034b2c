"""A10: what free text may bring into a graph, and what it may not."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.domain import prompts
from forge.errors import Invalid

any_text = st.text(st.integers(0, 0x10FFFF).map(chr), max_size=80)
# Dense in what the rules are about, so that the properties are not tried on plain letters only.
NASTY = [*r"()\:<>_{}|$%,a（仙", "embedding:", "ＥＭＢＥＤＤＩＮＧ：", "good", "lora", "__", "1.2", "nan"]
INVISIBLE = ["e\u0301", "\u0301", "\u200b", "\u200d", "\ufeff", " ", "\n"]
nasty_text = st.lists(st.sampled_from(NASTY + INVISIBLE), max_size=14).map("".join)


def refused(text: str, **options: object) -> str:
    with pytest.raises(Invalid) as caught:
        prompts.clean(text, **options)  # type: ignore[arg-type]
    assert caught.value.errors
    assert {error.field for error in caught.value.errors} == {"prompt"}
    return caught.value.detail


def accepted(text: str, **options: object) -> str | None:
    try:
        return prompts.clean(text, **options)  # type: ignore[arg-type]
    except Invalid:
        return None


@pytest.mark.parametrize("weights", [False, True])
@settings(deadline=None)
@given(text=any_text | nasty_text)
def test_cleaning_twice_is_cleaning_once(text: str, weights: bool) -> None:
    once = accepted(text, allow_weights=weights, embeddings=frozenset({"good"}))
    if once is not None:
        assert prompts.clean(once, allow_weights=weights, embeddings=frozenset({"good"})) == once


@settings(deadline=None)
@given(text=any_text | nasty_text)
def test_clean_text_fits_postgres_and_is_normal(text: str) -> None:
    result = accepted(text)
    if result is not None:
        assert result.encode("utf-8").decode("utf-8") == result
        assert "\0" not in result
        assert unicodedata.is_normalized("NFC", result)
        assert 1 <= len(result) <= 2000


def comfyui_reads(text: str) -> list[tuple[str, float]]:
    """Words and weights as ComfyUI takes them out of a text, written from its documented rules."""
    hidden = text.replace("\\)", "\0\1").replace("\\(", "\0\2")

    def split(part: str) -> list[str]:
        pieces, depth, piece = [], 0, ""
        for char in part:
            if char == "(":
                if depth == 0 and piece:
                    pieces.append(piece)
                    piece = ""
                depth += 1
            depth -= char == ")"
            piece += char
            if char == ")" and depth == 0:
                pieces.append(piece)
                piece = ""
        return [*pieces, piece] if piece else pieces

    def read(part: str, weight: float) -> list[tuple[str, float]]:
        found = []
        for piece in split(part):
            if len(piece) >= 2 and piece[0] == "(" and piece[-1] == ")":
                inner, weight_in = piece[1:-1], weight * 1.1
                colon = inner.rfind(":")
                if colon > 0:
                    try:
                        weight_in = float(inner[colon + 1 :])
                        inner = inner[:colon]
                    except ValueError:
                        pass
                found += read(inner, weight_in)
            else:
                found.append((piece, weight))
        return found

    return [(piece.replace("\0\1", ")").replace("\0\2", "("), weight) for piece, weight in read(hidden, 1.0)]


@settings(deadline=None)
@given(text=nasty_text)
def test_without_weights_comfyui_reads_one_plain_text(text: str) -> None:
    result = accepted(text)
    if result is not None:
        assert [weight for _, weight in comfyui_reads(result)] == [1.0]


@settings(deadline=None)
@given(text=nasty_text)
def test_with_weights_comfyui_reads_only_bounded_ones(text: str) -> None:
    result = accepted(text, allow_weights=True)
    if result is not None:
        assert all(0 <= weight <= 2 * 1.1**8 for _, weight in comfyui_reads(result))


@settings(deadline=None)
@given(text=nasty_text)
def test_only_a_listed_embedding_is_ever_read(text: str) -> None:
    result = accepted(text, embeddings=frozenset({"good"}), allow_weights=True)
    if result is not None:
        words = [word for part, _ in comfyui_reads(result) for word in part.replace("\n", " ").split(" ")]
        named = [
            word.removeprefix("embedding:").strip(",") for word in words if word.startswith("embedding:")
        ]
        assert set(named) <= {"good"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a\0b", "U+0000"),
        ("a\rb", "U+000D"),
        ("a\x1bb", "U+001B"),
        ("a\x7fb", "U+007F"),
        ("a\x85b", "U+0085"),
        ("a\ue000b", "private-use"),
        ("a\uffffb", "unassigned"),
        ("a\U000e0041b", "tag"),
        ("a\u202eb", "direction"),
        ("a\u2066b", "direction"),
        ("a\ud800b", "surrogate"),
        ("", "empty"),
        (" \n\t ", "empty"),
        ("\u200b\ufeff", "empty"),
        ("\\", "empty"),
        ("x" * 2001, "2000"),
        ("(" * 1001, "2000"),
        ("\u0301" * 60_000, "2000"),
        ("a" + "\u0316" * 5, "combining"),
        ("a" + "\u0316\u0316\u200d\u0316\u0316\u0316", "combining"),
        ("a" + "\u0301\u0316" * 3999, "combining"),
        ("embedding:evil", "embedding"),
        ("a, EMBEDDING:evil", "embedding"),
        ("ｅｍｂｅｄｄｉｎｇ：evil", "embedding"),
        ("embed\u200bding:evil", "embedding"),
        ("embed\u200dding:evil", "embedding"),
        ("<lora:x:1>", "<name"),
        ("＜lora：x：1＞", "<name"),
        ("<lora:<x>:1>", "<name"),
        ("< hypernet :x>", "<name"),
        ("__colour__", "__name__"),
        ("＿＿colour＿＿", "__name__"),
        ("{a|b}", "{a|b}"),
        ("{ {a} | b }", "{a|b}"),
        ("{a\n|b}", "{a|b}"),
        ("} { | } |", "{a|b}"),
        ("{|" * 999 + "}", "{a|b}"),
        ("{{x}}", "{{"),
        ("{% if %}", "{%"),
        ("${HOME}", "${"),
    ],
)
def test_refused(text: str, why: str) -> None:
    assert why in refused(text)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("  a wise elder \n", "a wise elder"),
        ("line\n\tline", "line\n\tline"),
        ("e\u0301", "\u00e9"),
        ("jade\u200b\u2060\ufeff sword", "jade sword"),
        ("sword (broken)", r"sword \(broken\)"),
        (r"sword \(broken\)", r"sword \(broken\)"),
        ("（full width）", "（full width）"),
        ("九霄 剑修", "九霄 剑修"),
        ("👩‍❤️‍👩", "👩‍❤️‍👩"),
        ("a\u0316\u0316\u0316\u0316", "a\u0316\u0316\u0316\u0316"),
        ("3 < 5 and 5 > 3", "3 < 5 and 5 > 3"),
        ("snake_case and {braces}", "snake_case and {braces}"),
        ("} | {", "} | {"),
        ("| { }", "| { }"),
        ("{|" * 999, "{|" * 999),
        ("ends with \\ \\", "ends with"),
        ("x" * 2000, "x" * 2000),
    ],
)
def test_accepted(text: str, result: str) -> None:
    assert prompts.clean(text) == result


@pytest.mark.parametrize(
    "text",
    ["embedding:good", "a, embedding:good, b", "embedding:good,", "embedding:good\nb", "embedding:good b"],
)
def test_a_listed_embedding_stays(text: str) -> None:
    assert prompts.clean(text, embeddings=frozenset({"good"})) == text


@pytest.mark.parametrize(
    "text",
    [
        "embedding:good/../evil",
        "embedding:good:evil",
        "embedding:good,evil",
        "embedding:good(evil)",
        "embedding:good\tevil",
        "embedding:evil embedding:good",
        "ｅmbedding:good",
    ],
)
def test_a_listed_embedding_opens_no_other(text: str) -> None:
    refused(text, embeddings=frozenset({"good"}))


@pytest.mark.parametrize(
    "text",
    [
        "(a:1.2)",
        "((a))",
        "(a:0)",
        "(a:2)",
        "(" * 8 + "a" + ")" * 8,
        r"(a\)b:1.5)",
        "(a:b)",
        "(:9)",
        "(embedding:good:0.5)",
    ],
)
def test_weights_stay_where_they_are_allowed(text: str) -> None:
    assert prompts.clean(text, allow_weights=True, embeddings=frozenset({"good"})) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(a:nan)", "weight"),
        ("(a:inf)", "weight"),
        ("(a:1e999)", "weight"),
        ("(a:2.01)", "weight"),
        ("(a:-1)", "weight"),
        ("(a: 9 )", "weight"),
        ("((a:9) b)", "weight"),
        ("(a", "never closed"),
        ("a)", "never opened"),
        ("(" * 9 + "a" + ")" * 9, "deeper"),
    ],
)
def test_bad_weights_are_refused(text: str, why: str) -> None:
    assert why in refused(text, allow_weights=True)


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(Invalid) as caught:
        prompts.clean("<lora:x:1> __y__ {a|b}", field="params.prompt")
    assert [error.field for error in caught.value.errors] == ["params.prompt"] * 3
