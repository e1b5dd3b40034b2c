"""`docs/FAULTS.md` and the tests agree about what is shown where."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
CATALOGUE = """
K1 K2 K3 K4 K5 K6 K7 K9 H1 H2 H3 H4 H5 H6 N1 N2 D1 D2 D3 D4 D6 D7 D8 D9 B1 B2 B3 B5 B7 T1 M1 Q1 G1 C1 C2 C3 X1
"""
TABLE = TESTS.parent / "docs" / "FAULTS.md"


def promised() -> dict[str, set[str]]:
    """Fault → the files that the table names for it."""
    rows = re.findall(r"^\| ([A-Z]\d) \|.*\| ([^|]+) \|$", TABLE.read_text(), re.MULTILINE)
    return {fault: set(re.findall(r"`([\w/]+\.py)`", shown)) for fault, shown in rows}


def marked() -> dict[str, set[str]]:
    """Fault → the files with a test that is marked with it."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in TESTS.rglob("test_*.py"):
        for fault in _faults(ast.parse(path.read_text())):
            found[fault].add(str(path.relative_to(TESTS)))
    return found


def _faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.fault":
                    yield from (ast.literal_eval(argument) for argument in call.args)


def test_every_row_names_the_files_that_show_it() -> None:
    assert promised() == marked()


def test_no_row_is_without_a_test() -> None:
    assert sorted(promised()) == sorted(CATALOGUE.split())
    assert [fault for fault, files in promised().items() if not files] == []
