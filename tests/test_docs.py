"""Docs that do not lie: links lead somewhere, and the commands they name are there."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from forge.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
TAUGHT = [page for page in PAGES if page.parent.name != "adr"]
"""Pages for those who use forge; a decision may name what was thought of at its time."""
GUIDE = ROOT / "docs" / "API.md"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_INLINE = re.compile(r"`((?:\./)?forge [^`]+)`")
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
OF_THE_SCRIPT = {"test", "chaos"}
"""What `./forge` does itself."""
SAID = {"may", "ready"}
"""First words of what forge says, quoted like commands."""


def anchors(page: Path) -> set[str]:
    """What a link may name within a page, as GitHub makes it from headings."""
    text = _FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def lost(page: Path) -> Iterator[str]:
    """The links of a page that lead nowhere."""
    for path, anchor in _LINK.findall(_FENCE.sub("", page.read_text())):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield f"{path}#{anchor}" if anchor else path


def commands(text: str) -> list[list[str]]:
    """The words after `forge` of every command on a page."""
    shell = "\n".join(body for language, body in _FENCE.findall(text) if language == "sh")
    lines = re.findall(r"(?:^|[\s(\"])((?:\./)?forge [^\n]+)", shell.replace("\\\n", " "))
    inline = _INLINE.findall(_FENCE.sub("", text))
    return [_words(line) for line in [*lines, *inline]]


def _words(line: str) -> list[str]:
    words = shlex.split(re.sub(r"[\[\]]", "", line), comments=True)
    end = next((nth for nth, word in enumerate(words) if re.match(r"[|&;>]", word)), len(words))
    return [word.rstrip(");") for word in words[1:end]]


def test_every_page_can_be_found_from_the_readme() -> None:
    seen, to_come = set[Path](), [ROOT / "README.md"]
    while to_come:
        page = to_come.pop()
        if page not in seen:
            seen.add(page)
            targets = [(page.parent / path).resolve() for path, _ in _LINK.findall(page.read_text()) if path]
            to_come += [target for target in targets if target.suffix == ".md"]
            to_come += [one for target in targets if target.is_dir() for one in target.glob("*.md")]
    assert set(PAGES) <= seen


def passes_on(command: click.Command) -> bool:
    """Whether it gives what it does not know to another program, as `forge bench` does."""
    return bool(command.context_settings.get("ignore_unknown_options"))


def misunderstood(words: list[str]) -> str | None:
    """What forge would not know of a command; words in capitals and values are not looked at."""
    command: click.Command = cli
    known = {"--help", "-h", "--version"}
    rest = iter(words)
    for word in rest:
        if word.startswith("-"):
            options = {name: option for option in command.params for name in option.opts}
            name = word.partition("=")[0]
            if name not in options.keys() | known and not passes_on(command):
                return word
            option = options.get(name)
            if isinstance(option, click.Option) and not option.is_flag and "=" not in word:
                next(rest, None)
        elif isinstance(command, click.Group):
            found = [command.commands.get(name) for name in word.split("|")]
            if None in found:
                return word
            command = found[0]  # type: ignore[assignment]
    return None


def regions(path: Path) -> dict[str, str]:
    """The pieces of an example between `[name]` and `[end]`."""
    found = re.finditer(r"^ *(?:#|//) \[(\w+)\]\n(.*?)^ *(?:#|//) \[end\]$", path.read_text(), re.M | re.S)
    return {piece[1]: textwrap.dedent(piece[2]).strip("\n") + "\n" for piece in found}


def test_what_the_guide_shows_is_what_the_examples_say() -> None:
    """Which are run by `acceptance/test_examples.py`. The other way round, every marked piece is shown."""
    shown = re.findall(r"^<!-- (\S+) \[(\w+)\] -->\n```\w+\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    files = [ROOT / "examples" / name for name in ("guide.sh", "client.py", "client.ts")]
    said = [(f"examples/{path.name}", *piece) for path in files for piece in regions(path).items()]
    assert sorted(shown) == sorted(said)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert not [*lost(page)]


@pytest.mark.parametrize("page", TAUGHT, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_of_forges(page: Path) -> None:
    named = [words for words in commands(page.read_text()) if words[0] not in OF_THE_SCRIPT | SAID]
    wrong = {" ".join(words): unknown for words in named if (unknown := misunderstood(words))}
    assert not wrong, wrong


def functions(path: Path) -> set[str]:
    """The tests of a file."""
    return set(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.M)) if path.exists() else set()


def test_what_shows_the_security_is_there() -> None:
    """Each defence of the page names a test, and each test it names exists."""
    table = (
        (ROOT / "docs" / "SECURITY.md")
        .read_text()
        .partition("## What forge defends")[2]
        .partition("\n## ")[0]
    )
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    named = [re.findall(r"`([\w/]+\.py)::(\w+)`", row.rpartition(" | ")[2]) for row in rows]
    assert len(rows) > 10
    assert all(named)
    tests = [test for row in named for test in row]
    missing = [(path, test) for path, test in tests if test not in functions(ROOT / "tests" / path)]
    assert not missing


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b\n[good](#a-b) [bad](#c) [gone](gone.md) [out](https://x.example)\n")
    assert [*lost(page)] == ["#c", "gone.md"]
    inline, shell = (
        "`forge keys create|revok` `forge at now queue`",
        "./forge dev --prt 1 &  # x\nforge doctor",
    )
    text = f"{inline}\n```sh\n{shell}\n```\n"
    assert [misunderstood(words) for words in commands(text)] == ["--prt", None, "create|revok", None]
