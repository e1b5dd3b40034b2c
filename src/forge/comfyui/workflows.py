"""Job types: each one a ComfyUI graph with typed params, made of NAME.json and NAME.toml.

The built-in ones lie in `templates/`, an operator's own in a directory of theirs; both are read once, at
start, by the same rules. What leaves :func:`render` is the loaded graph with only its declared slots changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from forge.comfyui import workflow_loader as loader
from forge.comfyui import workflow_patterns as patterns
from forge.comfyui.workflow_file import suggestion
from forge.comfyui.workflow_graph import Graph
from forge.comfyui.workflow_rules import LABELS
from forge.domain import params as domain
from forge.domain.params import Param
from forge.errors import WorkflowInvalid

BUILT_IN = Path(__file__).with_name("templates")


class Workflow(msgspec.Struct, frozen=True, kw_only=True):
    """One job type, checked and ready to render.

    `version` changes with all that can change a picture: either file, or the operator's model files.
    `pictures` is how many a run makes, or the param that says so; `estimated_bytes` is for each of them.
    """

    name: str
    version: str
    asset_type: str
    description: str
    timeout_seconds: float
    outputs: tuple[str, ...]
    params: dict[str, Param]
    graph: Graph
    compose: dict[str, tuple[str, ...]]
    labels: dict[str, str]
    models: tuple[str, ...]
    pictures: int | str
    estimated_bytes: int


class CatalogueEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What a client learns about one job type; `params` is a JSON Schema."""

    job_type: str
    version: str
    description: str
    asset_type: str
    timeout_seconds: float
    pictures: int | str
    params: dict[str, Any]


def load(directory: Path | None = None, *, models: Mapping[str, str] | None = None) -> dict[str, Workflow]:
    """Read the built-in job types and those of a directory, by name.

    Args:
        directory: the operator's own job types.
        models: model files by slot, `{"checkpoint": "a.safetensors", "ui_icon.lora": "b.safetensors@0.7"}`:
            for all job types or one, with a strength behind `@`. An empty value takes a default away.

    Raises:
        WorkflowInvalid: one line `FILE:LINE: REASON` for each problem of each file.
    """
    models = models or {}
    problems: list[str] = []
    workflows: dict[str, Workflow] = {}
    for folder in [BUILT_IN] if directory is None else [BUILT_IN, directory]:
        names, wrong = loader.pairs(folder, workflows)
        problems += wrong
        for name in names:
            try:
                workflows[name] = _workflow(name, loader.read(folder, name, models))
            except WorkflowInvalid as error:
                problems.append(error.detail)
    if not problems:
        problems += _unknown_models(workflows, models)
    if problems:
        raise WorkflowInvalid("\n".join(problems))
    return workflows


def render(
    workflow: Workflow,
    resolved: Mapping[str, object],
    *,
    filename_prefix: str,
    images: Mapping[str, str] | None = None,
) -> Graph:
    """The graph to post: a copy of the workflow's own with only its declared slots set.

    Args:
        workflow: the job type.
        resolved: what :func:`forge.domain.params.resolve` gave.
        filename_prefix: the folder and name under which ComfyUI saves, one of its own for each attempt.
        images: the name at ComfyUI of the picture of each param that :func:`uploads` lists.
    """
    graph = copy.deepcopy(workflow.graph)
    for name, param in workflow.params.items():
        if name in resolved:
            _set(graph, param.targets, (images or {})[name] if param.type == "image" else resolved[name])
    for target, parts in workflow.compose.items():
        _set(graph, (target,), _composed(workflow, parts, resolved))
    for node in graph.values():
        if node["class_type"] == "SaveImage" or "filename_prefix" in node["inputs"]:
            node["inputs"]["filename_prefix"] = filename_prefix
    return graph


def labels(workflow: Workflow, resolved: Mapping[str, object]) -> dict[str, str | None]:
    """The `category`, `archetype_id` and `variant_key` of the assets a job makes; None where unknown."""

    def value(name: str) -> str:
        return str(resolved.get(name, ""))

    return {
        label: patterns.fill(workflow.labels[label], value) if label in workflow.labels else None
        for label in LABELS
    }


def pictures(workflow: Workflow, resolved: Mapping[str, object]) -> int:
    """How many pictures a job makes."""
    count = workflow.pictures if isinstance(workflow.pictures, int) else resolved[workflow.pictures]
    assert isinstance(count, int)
    return count


def uploads(workflow: Workflow, resolved: Mapping[str, object]) -> dict[str, str]:
    """The uploaded pictures a job uses, param → id; ComfyUI must have them before it gets the graph."""
    images = (name for name, param in workflow.params.items() if param.type == "image")
    return {name: str(resolved[name]) for name in images if name in resolved}


def catalogue(workflows: Mapping[str, Workflow]) -> list[CatalogueEntry]:
    """What clients may ask for, by name of the job type."""
    return [
        CatalogueEntry(
            job_type=workflow.name,
            version=workflow.version,
            description=workflow.description,
            asset_type=workflow.asset_type,
            timeout_seconds=workflow.timeout_seconds,
            pictures=workflow.pictures,
            params=domain.schema(workflow.params),
        )
        for workflow in sorted(workflows.values(), key=lambda workflow: workflow.name)
    ]


def _workflow(name: str, loaded: loader.Loaded) -> Workflow:
    definition = loaded.definition
    return Workflow(
        name=name,
        version=loaded.version,
        asset_type=definition.asset_type,
        description=definition.description,
        timeout_seconds=definition.timeout_seconds,
        outputs=definition.outputs,
        params={param: domain.settled(param, each) for param, each in definition.params.items()},
        graph=loaded.graph,
        compose=definition.compose,
        labels=definition.labels,
        models=tuple(definition.models),
        pictures=len(definition.outputs) if definition.pictures is None else definition.pictures,
        estimated_bytes=definition.estimated_bytes,
    )


def _unknown_models(workflows: Mapping[str, Workflow], models: Mapping[str, str]) -> Iterator[str]:
    slots = {slot for workflow in workflows.values() for slot in workflow.models}
    slots |= {f"{workflow.name}.{slot}" for workflow in workflows.values() for slot in workflow.models}
    for slot in models:
        if slot not in slots:
            yield f"models: no job type has a model {slot}{suggestion(slot, slots)}"


def _set(graph: Graph, targets: Iterable[str], value: object) -> None:
    for target in targets:
        node_id, _, slot = target.partition(".")
        graph[node_id]["inputs"][slot] = value


def _composed(workflow: Workflow, parts: Iterable[str], resolved: Mapping[str, object]) -> str:
    """The parts joined by commas, without those that name a param of which nothing is said."""

    def words(name: str) -> str:
        return _words(workflow.params[name], resolved.get(name))

    return ", ".join(filled for part in parts if (filled := patterns.fill(part, words)))


def _words(param: Param, value: object) -> str:
    """How a value is said in a prompt."""
    match value:
        case None:
            return ""
        case bool():
            return param.phrases.get(str(value).lower(), "")
        case float():
            return f"{value:g}"
        case str() if param.type == "choice":
            return param.phrases.get(value, value.replace("_", " "))
        case _:
            return str(value)
