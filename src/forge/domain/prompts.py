"""What a client's free text must be before it may stand in a graph.

ComfyUI reads syntax out of plain prompt text: `(a:1.3)` weighs, `embedding:x` opens a model file, and the
nodes and front ends around it know `<lora:x:1>`, `__wildcard__` and `{a|b}`. Text in, safe text out: NFC,
1 to 2 000 characters, fit for a Postgres `text` column, and unchanged by a second cleaning.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from forge.errors import FieldError, Invalid

MAX_LENGTH = 2000
MAX_COMBINING = 4
MAX_DEPTH = 8
MAX_WEIGHT = 2.0

# Normalising is quadratic in the length of a run of combining marks, so hopeless input stops before it: what
# composes with its letter are a few of them.
_RAW_FACTOR = 4
_RAW_COMBINING = 16

_STACKED = f"must not stack more than {MAX_COMBINING} combining marks"

_DROPPED = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_REFUSED_CATEGORIES = {
    "Cc": "a control character",
    "Co": "a private-use character",
    "Cn": "an unassigned character",
}
_PLAIN = re.compile(r"[\t\n -~]*")  # most text is, and a look at each character costs a request its time
_BARE_PARENTHESIS = re.compile(r"(?<!\\)([()])")

# Matched on a folded copy, so that full-width and invisible variants count as what they look like.
_SYNTAX = (
    (re.compile(r"embedding:"), "embedding: is only allowed with a name the operator lists"),
    (re.compile(r"<\s*[^\s<>:]+\s*:"), "<name:…> is not allowed"),
    (re.compile(r"__[^\n]+?__"), "__name__ is not allowed"),
    (re.compile(r"\A[^{]*+\{[^|]*+\|[^}]*+\}"), "{a|b} is not allowed"),
    (re.compile(r"\{\{|\{%|\$\{"), "{{, {% and ${ are not allowed"),
)


def clean(
    text: str,
    *,
    embeddings: frozenset[str] = frozenset(),
    allow_weights: bool = False,
    max_length: int = MAX_LENGTH,
    field: str = "prompt",
) -> str:
    """Make a client's text safe to stand in a prompt.

    Args:
        text: what the client sent.
        embeddings: names that may follow `embedding:`.
        allow_weights: keep `(words:1.2)` as syntax instead of escaping every parenthesis.
        max_length: characters the result may have.
        field: what the errors call the text.

    Raises:
        Invalid: with one entry for each thing that is wrong.
    """
    text = plain(text, max_length=max_length, field=field)
    # A backslash at the end would escape whatever a pattern puts after the text.
    while text.endswith("\\"):
        text = text[:-1].rstrip()
    problems = list(_suspicious(text, embeddings, allow_weights))
    if not allow_weights:
        text = _BARE_PARENTHESIS.sub(r"\\\1", text)
    _raise(field, problems or list(_wrong_length(text, max_length)))
    return text


def plain(text: str, *, max_length: int, field: str) -> str:
    """Text in NFC without surrounding or zero-width space, for which no syntax is refused; may be empty.

    Raises:
        Invalid: for a character no text may hold, or for more than `max_length` of them.
    """
    _raise(field, list(_unreadable(text, max_length)))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_DROPPED))
    text = text.strip()
    _raise(field, [f"must have at most {max_length} characters"] if len(text) > max_length else [])
    return text


def _raise(field: str, problems: list[str]) -> None:
    if problems:
        raise Invalid([FieldError(field, problem) for problem in problems])


def _unreadable(text: str, max_length: int) -> Iterator[str]:
    if len(text) > max_length * _RAW_FACTOR:
        yield f"must have at most {max_length} characters"
        return
    if _PLAIN.fullmatch(text):
        return
    refused = [(text.index(char), char, reason) for char in set(text) if (reason := _refusal(char))]
    if refused:
        at, char, reason = min(refused)
        yield f"character {at + 1} (U+{ord(char):04X}) is {reason}"
    elif _longest_combining_run(text) > _RAW_COMBINING:
        yield _STACKED


def _refusal(char: str) -> str | None:
    """Why this character may not stand in a prompt, if so."""
    if char in "\t\n" or " " <= char <= "~":
        return None
    if "\ud800" <= char <= "\udfff":
        return "half of a surrogate pair"
    if char in _BIDI:
        return "a text direction control"
    if "\U000e0000" <= char <= "\U000e007f":
        return "a tag character"
    return _REFUSED_CATEGORIES.get(unicodedata.category(char))


def _suspicious(text: str, embeddings: frozenset[str], allow_weights: bool) -> Iterator[str]:
    folded = _folded(_without_listed(text, embeddings, allow_weights))
    for pattern, message in _SYNTAX:
        if pattern.search(folded):
            yield message
    if _longest_combining_run(text) > MAX_COMBINING:
        yield _STACKED
    if allow_weights:
        yield from _weight_problems(text)


def _without_listed(text: str, embeddings: frozenset[str], allow_weights: bool) -> str:
    """The text without the `embedding:` words that are allowed, cut exactly where ComfyUI cuts them."""
    if not embeddings or "embedding:" not in text:
        return text
    end = r",*(?:[ \n]|\Z)" + (r"|(?::[0-9.]+)?\)" if allow_weights else "")
    word = re.compile(rf"embedding:([^\s,():\\]+)(?={end})")
    return word.sub(lambda found: "\n" if found[1] in embeddings else found[0], text)


def _folded(text: str) -> str:
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", text)
    invisible = {ord(char) for char in set(text) if unicodedata.category(char) == "Cf"}
    return (text.translate(dict.fromkeys(invisible)) if invisible else text).casefold()


def _longest_combining_run(text: str) -> int:
    if text.isascii() or not any(unicodedata.category(char).startswith("M") for char in set(text)):
        return 0
    longest = run = 0
    for char in text:
        category = unicodedata.category(char)
        if category.startswith("M"):
            run += 1
            longest = max(longest, run)
        elif category != "Cf":  # an invisible joiner between two marks does not part them
            run = 0
    return longest


def _weight_problems(text: str) -> Iterator[str]:
    opened: list[int] = []
    for found in _BARE_PARENTHESIS.finditer(text):
        if found[0] == "(":
            opened.append(found.end())
            if len(opened) > MAX_DEPTH:
                yield f"parentheses must not nest deeper than {MAX_DEPTH}"
                return
        elif not opened:
            yield "a parenthesis is closed that was never opened"
            return
        elif not 0 <= _weight(text[opened.pop() : found.start()]) <= MAX_WEIGHT:
            yield f"a weight must be from 0 to {MAX_WEIGHT:g}"
            return
    if opened:
        yield "a parenthesis is never closed"


def _weight(group: str) -> float:
    """The weight ComfyUI reads from the inside of a parenthesis; it takes `nan` and `inf` for one too."""
    words, colon, number = group.rpartition(":")
    if not (words and colon):
        return 1.0
    try:
        return float(number)
    except ValueError:
        return 1.0


def _wrong_length(text: str, max_length: int) -> Iterator[str]:
    if not text:
        yield "must not be empty"
    if len(text) > max_length:
        yield f"must have at most {max_length} characters"
