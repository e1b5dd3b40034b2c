"""The rules a job type keeps beyond the shape of its files: where its params go and what they may reach.

Pure: a definition and its graph in, problems out. The strict ones guard one promise: nothing that a client
sends picks a node, a model file, a path or an address.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from forge.comfyui import workflow_graph as graphs
from forge.comfyui import workflow_patterns as patterns
from forge.comfyui.protocol import prune
from forge.comfyui.workflow_file import Definition, FileProblem, Model, suggestion
from forge.comfyui.workflow_graph import Graph
from forge.domain import params as domain
from forge.domain.params import Param
from forge.errors import Invalid

NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
LABELS = ("category", "archetype_id", "variant_key")
MAX_PICTURES = 64
MAX_TIMEOUT_SECONDS = 86_400.0

_PARAM_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_COMPOSED = ("prompt", "choice", "boolean", "integer", "number")
_LABELLED = ("choice", "string", "integer")
_LONGEST = {"string": domain.STRING_LENGTH, "prompt": 2000}
_FREE_TEXT = ("string", "prompt", "image")
# Inputs whose text ComfyUI or its nodes take for a file or an address.
_OPENS = re.compile(
    r"(?:^|_)(?:name|path|file|filename|url|uri|dir|directory|folder|prefix)\d*$", re.IGNORECASE
)
_KEYS_OF = {
    "minimum": ("integer", "number", "seed"),
    "maximum": ("integer", "number", "seed"),
    "step": ("integer",),
    "choices": ("choice",),
    "phrases": ("choice", "boolean"),
    "max_length": ("string", "prompt"),
    "weights": ("prompt",),
    "embeddings": ("prompt",),
    "default": ("integer", "number", "string", "prompt", "boolean", "choice"),
}


def problems(definition: Definition, graph: Graph) -> Iterator[FileProblem]:
    """Everything in the TOML file that does not fit itself or its (sound) graph."""
    yield from _top(definition, graph)
    for name, param in definition.params.items():
        if not _PARAM_NAME.fullmatch(name):
            yield FileProblem(("params", name), "a param's name is letters, digits and _")
        for key, message in _param_problems(name, param):
            yield FileProblem(("params", name, key), message)
    yield from _targets(definition, graph)
    yield from _patterns(definition)
    yield from _pictures(definition)
    yield from _goes_nowhere(definition)


def _top(definition: Definition, graph: Graph) -> Iterator[FileProblem]:
    if not NAME.fullmatch(definition.asset_type):
        yield FileProblem(
            ("asset_type",), "asset_type must be lower-case letters, digits and _, letter first"
        )
    if not 0 < definition.timeout_seconds <= MAX_TIMEOUT_SECONDS:
        yield FileProblem(
            ("timeout_seconds",), f"timeout_seconds must be above 0, at most {MAX_TIMEOUT_SECONDS:g}"
        )
    if definition.estimated_bytes <= 0:
        yield FileProblem(("estimated_bytes",), "estimated_bytes must be above 0")
    if not definition.outputs or len(set(definition.outputs)) != len(definition.outputs):
        yield FileProblem(("outputs",), "outputs must name at least one node, each once")
    for node_id in definition.outputs:
        if node_id not in graph:
            yield FileProblem(("outputs",), f"the graph has no node {node_id}")


def _param_problems(name: str, param: Param) -> Iterator[tuple[str, str]]:
    for key, kinds in _KEYS_OF.items():
        if param.type not in kinds and getattr(param, key) not in (None, (), {}, False):
            yield key, f"{key} has no meaning for type {param.type}"
            return
    yield from _range_problems(param)
    if param.type == "choice":
        yield from _choice_problems(param)
    if param.type == "boolean" and param.phrases and set(param.phrases) != {"true", "false"}:
        yield "phrases", "phrases of a boolean are true and false"
    if param.max_length is not None and not 1 <= param.max_length <= _LONGEST[param.type]:
        yield "max_length", f"max_length must be from 1 to {_LONGEST[param.type]}"
    if param.required and param.default is not None:
        yield "required", "a required param has no use for a default"
    for key in ("default", "example"):
        value = getattr(param, key)
        if value is not None:
            yield from ((key, message) for message in _refusals(name, param, value))


def _range_problems(param: Param) -> Iterator[tuple[str, str]]:
    if param.type not in ("integer", "number", "seed"):
        return
    lowest, highest = domain.bounds(param)
    floor = 0 if param.type == "seed" else -domain.SAFE
    for key, bound in (("minimum", lowest), ("maximum", highest)):
        if not math.isfinite(bound) or not floor <= bound <= domain.SAFE:
            yield key, f"{key} must be from {floor} to {domain.SAFE}, which every client can read"
        elif param.type != "number" and not isinstance(bound, int):
            yield key, f"{key} must be a whole number"
    if lowest > highest:
        yield "minimum", "minimum is above maximum"
    if param.step is not None and param.step <= 0:
        yield "step", "step must be above 0"


def _choice_problems(param: Param) -> Iterator[tuple[str, str]]:
    if not param.choices or len(set(param.choices)) != len(param.choices):
        yield "choices", "choices must be at least one, each once"
    for choice in param.choices:
        if not choice.isprintable() or not 0 < len(choice) <= domain.STRING_LENGTH:
            yield "choices", f"choice {choice!r} must be 1 to {domain.STRING_LENGTH} printable characters"
    for phrase in param.phrases:
        if phrase not in param.choices:
            yield "phrases", f"phrases has {phrase}, which is no choice{suggestion(phrase, param.choices)}"


def _refusals(name: str, param: Param, value: object) -> list[str]:
    try:
        domain.check(name, param, value)
    except Invalid as refusal:
        return [error.message for error in refusal.errors]
    return []


def _targets(definition: Definition, graph: Graph) -> Iterator[FileProblem]:
    outputs = [node for node in definition.outputs if node in graph]
    reached = prune(graph, outputs) if outputs else {}
    owners = {model.bypass_node: ("models", name) for name, model in definition.models.items()}
    used: Counter[str] = Counter()
    for path, target, kind in _all_targets(definition):
        node_id, _, slot = target.partition(".")
        used[target] += 1
        message = _target_problem(graph, node_id, slot, kind)
        if message is None and node_id not in reached:
            message = f"no output depends on node {node_id}"
        if message is None and owners.get(node_id, path[:2]) != path[:2]:
            message = f"node {node_id} is not always there: a model's bypass takes it out"
        if message is None and used[target] > 1:
            message = f"{target} is set twice"
        if message is not None:
            yield FileProblem(path, message)
    for name, model in definition.models.items():
        yield from _bypass_problems(name, model, definition, graph)


def _all_targets(definition: Definition) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Every slot that is ever set, with the key that says so and the kind of value."""
    for name, param in definition.params.items():
        for target in param.targets:
            yield ("params", name, "targets"), target, param.type
    for target in definition.compose:
        yield ("compose", target), target, "prompt"
    for name, model in definition.models.items():
        for target in model.targets:
            yield ("models", name, "targets"), target, "model"
        for target in model.strength_targets:
            yield ("models", name, "strength_targets"), target, "strength"


def _target_problem(graph: Graph, node_id: str, slot: str, kind: str) -> str | None:
    if not slot:
        return f"{node_id} is not node.input"
    if node_id not in graph:
        return f"the graph has no node {node_id}"
    node = graph[node_id]
    what = f"node {node_id} ({node['class_type']})"
    if slot not in node["inputs"]:
        return f"{what} has no input {slot}{suggestion(slot, node['inputs'])}"
    if slot == "filename_prefix":
        return "forge sets filename_prefix itself"
    value = node["inputs"][slot]
    if graphs.is_link(value):
        return f"{what} takes {slot} from node {value[0]}; only plain values can be set"
    if kind in _FREE_TEXT and _opens_file(node["class_type"], slot, kind):
        return f"text of a client must not reach {slot} of {what}, which may open a file; use a choice"
    return _kind_problem(what, slot, value, kind)


def _opens_file(class_type: str, slot: str, kind: str) -> bool:
    if kind == "image":
        return not (class_type.startswith("LoadImage") and slot == "image")
    return "load" in class_type.lower() or _OPENS.search(slot) is not None


def _kind_problem(what: str, slot: str, value: object, kind: str) -> str | None:
    """A value of another kind would pass ComfyUI's loose checks and mean something else there."""
    wanted: type | tuple[type, ...] = str
    if kind in ("integer", "number", "seed", "strength"):
        wanted = (int, float)
    elif kind == "boolean":
        wanted = bool
    fits = isinstance(value, wanted) and (kind == "boolean" or not isinstance(value, bool))
    return None if fits else f"{what} has {value!r} for {slot}, which no {kind} replaces"


def _bypass_problems(name: str, model: Model, definition: Definition, graph: Graph) -> Iterator[FileProblem]:
    path = ("models", name, "bypass_node")
    if not model.bypass_node:
        return
    if model.bypass_node not in graph:
        yield FileProblem(path, f"the graph has no node {model.bypass_node}")
        return
    if model.bypass_node in definition.outputs:
        yield FileProblem(path, "an output cannot be bypassed")
    if sum(other.bypass_node == model.bypass_node for other in definition.models.values()) > 1:
        yield FileProblem(path, f"two models bypass node {model.bypass_node}")
    inputs = graph[model.bypass_node]["inputs"]
    for slot in model.bypass_inputs:
        if not graphs.is_link(inputs.get(slot)):
            yield FileProblem(path, f"input {slot} of node {model.bypass_node} comes from no other node")
    missing = [i for i in graphs.outputs_used(graph, model.bypass_node) if i >= len(model.bypass_inputs)]
    if missing:
        yield FileProblem(path, f"bypass_inputs says nothing about output {min(missing)} of that node")


def _patterns(definition: Definition) -> Iterator[FileProblem]:
    for target, parts in definition.compose.items():
        for part in parts:
            for message in _pattern_problems(definition, part, _COMPOSED):
                yield FileProblem(("compose", target), message)
            for name in patterns.glued(part):
                if name in definition.params and definition.params[name].type == "prompt":
                    yield FileProblem(
                        ("compose", target), f"{{{name}}} is free text: keep spaces or commas around it"
                    )
    for label, pattern in definition.labels.items():
        if label not in LABELS:
            yield FileProblem(("labels", label), f"a label is one of {', '.join(LABELS)}")
        for message in _pattern_problems(definition, pattern, _LABELLED):
            yield FileProblem(("labels", label), message)


def _pattern_problems(definition: Definition, pattern: str, kinds: tuple[str, ...]) -> Iterator[str]:
    if patterns.stray_brace(pattern):
        yield "a brace that is not around a param's name must be doubled"
    for name in patterns.names(pattern):
        param = definition.params.get(name)
        if param is None:
            yield f"there is no param {name}{suggestion(name, definition.params)}"
        elif param.type not in kinds:
            yield f"{name} is of type {param.type}; here stand only {', '.join(kinds)}"


def _pictures(definition: Definition) -> Iterator[FileProblem]:
    pictures = definition.pictures
    if isinstance(pictures, int):
        if not 1 <= pictures <= MAX_PICTURES:
            yield FileProblem(("pictures",), f"pictures must be from 1 to {MAX_PICTURES}")
    elif pictures is not None:
        param = definition.params.get(pictures)
        if param is None or param.type != "integer":
            yield FileProblem(("pictures",), f"there is no param {pictures} of type integer")
        elif domain.bounds(param)[0] < 1 or domain.bounds(param)[1] > MAX_PICTURES:
            yield FileProblem(("pictures",), f"{pictures} must be bounded from 1 to {MAX_PICTURES}")
        elif param.default is None and not param.required:
            yield FileProblem(("pictures",), f"{pictures} needs a default, or to be required")


def _goes_nowhere(definition: Definition) -> Iterator[FileProblem]:
    texts = [*definition.labels.values(), *(part for parts in definition.compose.values() for part in parts)]
    used = {name for text in texts for name in patterns.names(text)} | {definition.pictures}
    for name, param in definition.params.items():
        if not param.targets and name not in used:
            yield FileProblem(
                ("params", name), f"{name} goes nowhere: give it targets, or a place in a pattern"
            )
