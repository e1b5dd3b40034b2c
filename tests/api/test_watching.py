"""The alert rules and the dashboard ask for numbers that forge gives, with labels that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser as promql
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from api.serving import Served
from forge import errors
from forge.api.happened import Happened
from forge.telemetry import numbers
from forge.topology import BACKENDS
from forge.workers import numbers as of_workers
from waiting import wait_until

ROOT = Path(__file__).parents[2]
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
DASHBOARD = json.loads((ROOT / "deploy/grafana/forge.json").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]

assert of_workers.deliveries  # what only workers count is shown by this process, too

TARGETS = {"instance", "job"}
"""Labels that Prometheus itself gives to what it asks."""


def queries() -> Iterator[Any]:
    for rule in RULES:
        yield pytest.param(rule["expr"], id=rule["alert"])
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")


def selectors(node: Any) -> Iterator[promql.VectorSelector]:
    """Every series that a query names."""
    match node:
        case promql.VectorSelector():
            yield node
        case promql.MatrixSelector():
            yield node.vector_selector
        case promql.Call():
            for argument in node.args:
                yield from selectors(argument)
        case promql.BinaryExpr():
            yield from selectors(node.lhs)
            yield from selectors(node.rhs)
        case promql.AggregateExpr() | promql.ParenExpr():
            yield from selectors(node.expr)
        case promql.NumberLiteral() | promql.StringLiteral():
            return
        case _:
            raise AssertionError(f"a kind of expression this test does not know: {node!r}")


def grouped(node: Any) -> Iterator[tuple[set[str], Any]]:
    """The labels that a query keeps, with the part of it that must have them."""
    match node:
        case promql.AggregateExpr():
            if node.modifier is not None:
                yield set(node.modifier.labels), node.expr
            yield from grouped(node.expr)
        case promql.Call():
            for argument in node.args:
                yield from grouped(argument)
        case promql.BinaryExpr():
            yield from grouped(node.lhs)
            yield from grouped(node.rhs)
        case promql.ParenExpr():
            yield from grouped(node.expr)
        case _:
            return


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of every counter and histogram, before anything has happened."""
    found: dict[str, set[str]] = {}
    makers = [*Happened().registry._collector_to_names, *numbers.registry._collector_to_names]
    for collector in makers:
        if not hasattr(collector, "_labelnames"):  # of the process
            continue
        names = set(collector._labelnames)
        name = collector._name
        for suffix in ("", "_total", "_bucket", "_sum", "_count"):
            found[name + suffix] = names | ({"le"} if suffix == "_bucket" else set())
    return found


async def exposed(served: Served) -> dict[str, set[str]]:
    """The series that an API shows, each with its labels."""
    async with httpx.AsyncClient(base_url=served.base_url) as plain:
        text = (await plain.get("/metrics")).text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
        found.setdefault(family.name, set())
    return found


@pytest.fixture
async def shown(served: Served, labels: dict[str, set[str]]) -> dict[str, set[str]]:
    backend = {"url": "http://comfy", "healthy": True, "preferred": True, "reason": ""}
    said = {"worker": "w", "backends": [{**backend, "since": "2026-05-01T12:00:00Z", "queue_remaining": 1}]}

    async def complete() -> bool:
        await served.parts.nc.publish(BACKENDS, json.dumps(said).encode())
        return "rank" in (await exposed(served)).get("forge_backend_queue", set())

    async with served.client("mei") as mei:
        await mei.get("/jobs/nothing")
    await wait_until(complete, what="a worker is heard")
    series = await exposed(served)
    series["forge_disk_bytes"] = {"type"}  # of a sample that a scheduler takes
    return {**labels, **{name: series[name] | labels.get(name, set()) for name in series}, "up": set()}


async def test_every_query_asks_for_what_forge_shows(shown: dict[str, set[str]]) -> None:
    for case in queries():
        (expression,) = case.values
        tree = promql.parse(expression)
        named = list(selectors(tree))
        assert named or expression.startswith("vector"), f"{case.id} asks for nothing"
        for selector in named:
            assert selector.name in shown, f"{case.id}: forge shows no {selector.name}"
            asked = {matcher.name for matcher in selector.matchers.matchers}
            assert asked <= shown[selector.name] | TARGETS, f"{case.id}: {selector.name} has no {asked}"
        for kept, inner in grouped(tree):
            for selector in selectors(inner):
                assert kept <= shown[selector.name] | TARGETS, f"{case.id}: {selector.name} has no {kept}"


async def test_the_telemetry_page_names_what_there_is(shown: dict[str, set[str]]) -> None:
    page = (ROOT / "docs/TELEMETRY.md").read_text()
    numbers_told = set(re.findall(r"`(forge_[a-z_]+)`", page)) - {"forge_archive_lag"}  # of a table's row
    assert len(numbers_told) > 20
    assert numbers_told <= set(shown), numbers_told - set(shown)
    alerts_told = set(re.findall(r"\bForge[A-Z]\w+", page))
    assert alerts_told <= {rule["alert"] for rule in RULES}
    code = "".join(path.read_text() for path in (ROOT / "src/forge").rglob("*.py"))
    spans = set(re.findall(r"(?:part|span|afterwards)\(\s*\"(forge\.[a-z.]+)\"", code))
    tree = page.partition("```\nPOST")[2].partition("```")[0]
    assert spans == set(re.findall(r"forge\.[a-z]+(?:\.[a-z]+)*", tree))


def test_alerts_name_codes_that_forge_answers_with() -> None:
    known = {
        error.code for error in vars(errors).values() if isinstance(error, type) and hasattr(error, "code")
    }
    (turned_away,) = [rule["expr"] for rule in RULES if rule["alert"] == "ForgeTurnsWorkAway"]
    (selector,) = selectors(promql.parse(turned_away))
    (matcher,) = selector.matchers.matchers
    assert set(matcher.value.split("|")) <= known


def test_every_alert_says_how_bad_it_is_and_stands_in_the_runbook() -> None:
    runbook = (ROOT / "docs/RUNBOOK.md").read_text()
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]
        assert f"### {rule['alert']}\n" in runbook, f"the runbook does not say what to do at {rule['alert']}"


def test_the_dashboard_has_no_two_panels_in_one_place() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells
