"""Reads a job type's two files, checks them together and puts the operator's model files into the graph."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from forge.comfyui import workflow_file as files
from forge.comfyui import workflow_graph as graphs
from forge.comfyui import workflow_rules as rules
from forge.comfyui.protocol import prune
from forge.comfyui.workflow_file import Definition, FileProblem, Model
from forge.comfyui.workflow_graph import Graph, NameTwice
from forge.errors import WorkflowInvalid


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A definition that fits its graph; `version` covers both files and the chosen model files."""

    definition: Definition
    graph: Graph
    version: str


def pairs(folder: Path, taken: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """The job types a folder holds, and what is wrong with their names; other files are left alone."""
    if not folder.is_dir():
        return [], [f"{folder}:1: is not a directory"]
    found: dict[str, set[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".toml") and not path.name.startswith("."):
            found.setdefault(path.stem, set()).add(path.suffix)
    names, problems = [], []
    for name, suffixes in found.items():
        reason = _name_problem(name, suffixes, taken)
        if reason:
            problems.append(f"{folder / name}{min(suffixes)}:1: {reason}")
        else:
            names.append(name)
    return names, problems


def read(folder: Path, name: str, models: Mapping[str, str]) -> Loaded:
    """Load one job type.

    Raises:
        WorkflowInvalid: one line `FILE:LINE: REASON` for each problem of the two files.
    """
    toml_path, json_path = folder / f"{name}.toml", folder / f"{name}.json"
    problems: list[str] = []
    toml_text, json_text = _text(toml_path, problems), _text(json_path, problems)
    raw = _parsed_toml(toml_path, toml_text, problems)
    graph = _parsed_graph(json_path, json_text, problems)
    definition, wrong = files.decode(raw or {})
    if raw is not None and graph is not None:
        wrong += [problem for problem in rules.problems(definition, graph) if not _known(problem, wrong)]
    if raw is not None and graph is not None and not wrong:
        graph = prune(graph, definition.outputs)
        graph, wrong = _with_models(name, definition, graph, models)
    if raw is not None:
        where = files.lines(toml_text)
        problems += [f"{toml_path}:{files.line(where, p.path)}: {p.message}" for p in wrong]
    if problems or graph is None:
        raise WorkflowInvalid("\n".join(problems))
    content = msgspec.json.encode([raw, graph], order="deterministic")
    return Loaded(definition=definition, graph=graph, version=hashlib.sha256(content).hexdigest()[:16])


def _name_problem(name: str, suffixes: set[str], taken: Mapping[str, object]) -> str | None:
    if not rules.NAME.fullmatch(name):
        return "a job type's name is lower-case letters, digits and _, letter first"
    if name in taken:
        return f"{name} is built in; a type of your own needs a name of its own"
    missing = {".json", ".toml"} - suffixes
    return f"{name}{min(missing)} is missing beside it" if missing else None


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}:1: cannot be read: {error}")
        return ""


def _parsed_toml(path: Path, text: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason = str(error)
        # Python 3.11 tells the line only inside the message.
        line = reason.rpartition("at line ")[2].partition(",")[0]
        at = int(line) if line.isdecimal() else text.count("\n") + 1
        problems.append(f"{path}:{at}: {reason}")
        return None


def _parsed_graph(path: Path, text: str, problems: list[str]) -> Graph | None:
    try:
        graph = graphs.parse(text)
    except (ValueError, RecursionError) as error:
        line = 1
        if isinstance(error, json.JSONDecodeError):
            line = error.lineno
        elif isinstance(error, NameTwice):
            line = graphs.node_line(text, error.name, last=True)
        problems.append(f"{path}:{line}: {error}")
        return None
    wrong = list(graphs.problems(graph))
    for problem in wrong:
        line = graphs.node_line(text, problem.node) if problem.node else 1
        node = f"node {problem.node} " if problem.node else ""
        problems.append(f"{path}:{line}: {node}{problem.message}")
    return None if wrong else graph


def _known(problem: FileProblem, wrong: list[FileProblem]) -> bool:
    """Whether a problem only follows from a key that could not be read."""
    return any(problem.path[:2] == other.path[:2] for other in wrong)


def _with_models(
    name: str, definition: Definition, graph: Graph, models: Mapping[str, str]
) -> tuple[Graph, list[FileProblem]]:
    wrong = []
    for slot, model in definition.models.items():
        chosen = models.get(f"{name}.{slot}", models.get(slot, model.default)).strip()
        if chosen:
            for target, value in _model_values(model, chosen):
                node_id, _, key = target.partition(".")
                graph[node_id]["inputs"][key] = value
        elif model.bypass_node:
            graph = graphs.bypass(graph, model.bypass_node, model.bypass_inputs)
        else:
            wrong.append(FileProblem(("models", slot), f"no file is chosen for the model {slot}"))
    return prune(graph, definition.outputs), wrong


def _model_values(model: Model, chosen: str) -> Iterator[tuple[str, object]]:
    """The slots of a chosen `FILE` or `FILE@STRENGTH`."""
    file, _, strength = chosen.rpartition("@")
    try:
        number = float(strength) if file and model.strength_targets else math.nan
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        yield from ((target, number) for target in model.strength_targets)
    yield from ((target, file if math.isfinite(number) else chosen) for target in model.targets)
