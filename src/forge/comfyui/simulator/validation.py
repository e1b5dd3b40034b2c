"""Whether a graph may be queued, and in which words it is refused.

Comes in: the decoded graph, the node classes, and a question whether an input file exists. Leaves: a
`Verdict`. Where the server lets an exception escape (a graph that is no object, a node that is null), so
does this: the web framework turns it into the same 500.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from forge.comfyui.simulator.catalogue import NodeClass
from forge.comfyui.simulator.options import Version

Graph = dict[str, Any]
Problem = dict[str, Any]

LONG_LIST = 20


class Verdict(msgspec.Struct):
    """`error` is None when at least one output survived; `outputs` are the ones that will run."""

    error: Problem | None
    outputs: list[str]
    node_errors: dict[str, Any]


class _Checked(msgspec.Struct):
    valid: bool
    problems: list[Problem]


def problem(kind: str, message: str, details: str, extra_info: dict[str, Any] | None = None) -> Problem:
    """One entry of `error` or of `node_errors[].errors[]`."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info or {}}


def validate(
    graph: Graph,
    targets: Sequence[str] | None,
    classes: Mapping[str, NodeClass],
    file_exists: Callable[[str], bool],
    version: Version,
) -> Verdict:
    """Check a whole graph. INT, FLOAT, STRING and BOOLEAN inputs are converted in place, as on the server."""
    outputs = []
    for node_id in graph:
        node = graph[node_id]
        unknown = _unknown_class(node_id, node, classes, version)
        if unknown is not None:
            return Verdict(unknown, [], {})
        if classes[node["class_type"]].is_output and (targets is None or node_id in targets):
            outputs.append(node_id)
    if not outputs:
        return Verdict(problem("prompt_no_outputs", "Prompt has no outputs", ""), [], {})
    return _Validation(graph, classes, file_exists, version).run(outputs)


def _unknown_class(
    node_id: str, node: Any, classes: Mapping[str, NodeClass], version: Version
) -> Problem | None:
    if "class_type" in node and node["class_type"] in classes:
        return None
    where = f"Node ID '#{node_id}'"
    name = node.get("class_type")
    if version == "0.3.64":
        missing = (
            "a node is missing the class_type property." if name is None else f"node {name} does not exist."
        )
        return problem("invalid_prompt", f"Cannot execute because {missing}", where)
    title = node.get("_meta", {}).get("title", name)
    if name is None:
        said = f"Node 'ID #{node_id}' has no class_type."
        said += " The workflow may be corrupted or a custom node is missing."
    else:
        said = f"Node '{title}' not found. The custom node may not be installed."
    facts = {"node_id": node_id, "class_type": name, "node_title": title}
    return problem("missing_node_type", said, where, facts)


class _Validation:
    """One pass over one graph; every node is checked once, whoever links to it."""

    def __init__(
        self,
        graph: Graph,
        classes: Mapping[str, NodeClass],
        file_exists: Callable[[str], bool],
        version: Version,
    ) -> None:
        self._graph = graph
        self._classes = classes
        self._file_exists = file_exists
        self._version = version
        self._checked: dict[str, _Checked] = {}
        self._path: list[str] = []

    def run(self, outputs: list[str]) -> Verdict:
        good: list[str] = []
        node_errors: dict[str, Any] = {}
        details: list[str] = []
        for output in outputs:
            checked = self._check_output(output)
            if checked.valid:
                good.append(output)
                continue
            details += [f"{p['message']}: {p['details']}" for p in checked.problems]
            self._collect(output, node_errors)
        if good:
            return Verdict(None, good, node_errors)
        said = "Prompt outputs failed validation"
        error = problem("prompt_outputs_failed_validation", said, "\n".join(details))
        return Verdict(error, [], node_errors)

    def _check_output(self, output: str) -> _Checked:
        try:
            return self._check(output)
        except Exception as error:  # the server, too, turns whatever happens here into an answer
            self._path.clear()
            facts = {
                "exception_type": type(error).__name__,
                "traceback": traceback.format_tb(error.__traceback__),
            }
            failure = problem(
                "exception_during_validation", "Exception when validating node", str(error), facts
            )
            self._checked[output] = _Checked(False, [failure])
            return self._checked[output]

    def _collect(self, output: str, node_errors: dict[str, Any]) -> None:
        for node_id, checked in self._checked.items():
            if not checked.valid and checked.problems:
                entry = node_errors.setdefault(
                    node_id,
                    {
                        "errors": checked.problems,
                        "dependent_outputs": [],
                        "class_type": self._graph[node_id]["class_type"],
                    },
                )
                entry["dependent_outputs"].append(output)

    def _check(self, node_id: str) -> _Checked:
        if node_id in self._checked:
            return self._checked[node_id]
        if node_id in self._path:
            return self._cycle(node_id)
        self._path.append(node_id)
        node = self._graph[node_id]
        inputs, node_class = node["inputs"], self._classes[node["class_type"]]
        problems: list[Problem] = []
        valid = True
        for name, config, required in node_class.inputs:
            if name not in inputs:
                if required:
                    problems.append(
                        problem(
                            "required_input_missing", "Required input is missing", name, {"input_name": name}
                        )
                    )
                continue
            value = inputs[name]
            found = (
                self._link(name, config, value)
                if isinstance(value, list)
                else self._literal(name, config, inputs)
            )
            if found is not None:
                problems += found
                valid = False
        self._path.pop()
        if valid and not problems:
            problems += self._image_file(node_class, inputs)
        if node_id in self._checked:  # a cycle below already judged this node
            return self._checked[node_id]
        self._checked[node_id] = _Checked(valid and not problems, problems)
        return self._checked[node_id]

    def _cycle(self, node_id: str) -> _Checked:
        loop = self._path[self._path.index(node_id) :]
        named = [f"{n} ({self._graph[n]['class_type']})" for n in [*loop, node_id]]
        for member in loop:
            facts = {"node_id": member, "cycle_nodes": loop}
            said = problem("dependency_cycle", "Dependency cycle detected", " -> ".join(named), facts)
            problems = [said] if self._version != "0.3.64" else []
            self._checked[member] = _Checked(False, problems)
        return self._checked[node_id]

    def _link(self, name: str, config: Any, value: list[Any]) -> list[Problem] | None:
        """What is wrong with a link: None nothing, an empty list when the fault lies further up."""
        facts: dict[str, Any] = {"input_name": name, "input_config": config}
        if len(value) != 2:
            said = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return [problem("bad_linked_input", said, name, facts | {"received_value": value})]
        source, slot = value
        received = self._classes[self._graph[source]["class_type"]].outputs[slot]
        expected = config[0] if isinstance(config[0], str) else "COMBO"
        if "*" not in (received, expected) and received != expected:
            details = f"{name}, received_type({received}) mismatch input_type({expected})"
            facts |= {"received_type": received, "linked_node": value}
            return [
                problem("return_type_mismatch", "Return type mismatch between linked nodes", details, facts)
            ]
        depth = len(self._path)
        try:
            return None if self._check(source).valid else []
        except Exception as error:
            facts |= {
                "exception_message": str(error),
                "exception_type": type(error).__name__,
                "traceback": traceback.format_tb(error.__traceback__),
                "linked_node": value,
            }
            del self._path[depth:]
            said = "Exception when validating inner node"
            failure = problem("exception_during_inner_validation", said, str(error), facts)
            self._checked[source] = _Checked(False, [failure])
            return []

    def _literal(self, name: str, config: Any, inputs: dict[str, Any]) -> list[Problem] | None:
        kind, limits = config[0], config[1] if len(config) > 1 else {}
        value = inputs[name]
        if isinstance(value, dict) and "__value__" in value:
            value = inputs[name] = value["__value__"]
        facts = {"input_name": name, "input_config": config, "received_value": value}
        if isinstance(kind, str) and kind in _CONVERSIONS:
            try:
                value = inputs[name] = _CONVERSIONS[kind](value)
            except (TypeError, ValueError) as error:
                said = f"Failed to convert an input value to a {kind} value"
                facts["exception_message"] = str(error)
                return [problem("invalid_input_type", said, f"{name}, {value}, {error}", facts)]
        facts["received_value"] = value
        if "min" in limits and value < limits["min"]:
            said = f"Value {value} smaller than min of {limits['min']}"
            return [problem("value_smaller_than_min", said, name, facts)]
        if "max" in limits and value > limits["max"]:
            said = f"Value {value} bigger than max of {limits['max']}"
            return [problem("value_bigger_than_max", said, name, facts)]
        options = kind if isinstance(kind, list) else limits.get("options")
        if options is None or limits.get("image_upload") or value in options:
            return None
        long = len(options) > LONG_LIST
        listed = f"(list of length {len(options)})" if long else str(options)
        facts["input_config"] = None if long else config
        return [
            problem("value_not_in_list", "Value not in list", f"{name}: '{value}' not in {listed}", facts)
        ]

    def _image_file(self, node_class: NodeClass, inputs: dict[str, Any]) -> list[Problem]:
        if node_class.name not in ("LoadImage", "LoadImageMask") or self._file_exists(inputs["image"]):
            return []
        details = f"image - Invalid image file: {inputs['image']}"
        said = "Custom validation failed for node"
        return [problem("custom_validation_failed", said, details, {"input_name": "image"})]


_CONVERSIONS: dict[Any, Callable[[Any], Any]] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
