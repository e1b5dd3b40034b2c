"""`forge bench` runs every benchmark there is, and says so where there are none."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from benchmarks.__main__ import NAMES, there
from click.testing import CliRunner

from benchmarks import harness
from forge.cli import cli

WANTED = {
    "accept": r"^WANTED = 0\.7$",
    "pipeline": r"at_most=10,|at_least=0\.9",
    "gap": r"^WANTED = \{200: 1\.0\}$",
    "finish": r"^WANTED = 1\.5$",
    "replay": r"^AT_LEAST = 0\.5$",
    "assets": r"^FLAT, OF_THE_QUERY = 1\.5, 2\.0$",
    "memory": r"^FLAT = ",
    "start": r"^WANTED_SECONDS = 3\.0$",
}
"""What forge was asked to measure, and the limit that its module holds the figure to."""

FOLDER = Path(harness.__file__).parent
BY_HAND = {"peers"}
"""What needs something that is not installed here."""


def test_every_benchmark_is_in_the_list() -> None:
    """One that shows and writes a report is one."""
    found = {
        path.stem
        for path in FOLDER.glob("*.py")
        if re.search(r"^    harness\.(report|write)\(", path.read_text(), re.MULTILINE)
    }
    assert found - BY_HAND == set(there())
    assert set(there()) <= set(NAMES)


@pytest.mark.parametrize("name", WANTED)
def test_what_was_asked_for_is_measured_and_held_to_its_limit(name: str) -> None:
    assert name in there()
    source = (FOLDER / f"{name}.py").read_text()
    assert re.search(WANTED[name], source, re.MULTILINE)
    assert "figures" in source


@pytest.mark.parametrize(("median", "met"), [(0.7, True), (0.69, False)])
def test_a_figure_says_whether_it_was_reached(median: float, met: bool) -> None:
    spread = harness.Spread(median, 0.1, 1.0)
    assert harness.figure("", spread, runs=3, at_least=0.7).met is met
    assert harness.figure("", spread, runs=3, at_most=0.69).met is not met
    assert harness.figure("", spread, runs=3).met is None


def test_an_installed_package_says_where_the_benchmarks_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.modules["forge.cli.bench"], "_ROOT", tmp_path)
    said = CliRunner().invoke(cli, ["bench", "--short"])
    assert said.exit_code == 1
    assert "./forge bench" in said.output
