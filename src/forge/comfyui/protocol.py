"""ComfyUI's protocol without I/O: graphs in, messages and answers in, decisions out.

Everything ComfyUI says is read tolerantly (unknown keys, types and states are normal between versions) and
believed sparingly (names of files are checked before anything is asked for under them).
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from forge.errors import PictureRefused, PromptFailed, PromptInterrupted, PromptLost, PromptRejected

Graph = dict[str, Any]
"""ComfyUI's API format: node id -> {class_type, inputs, _meta?}; a link is [source node id, output index]."""

MAX_OUTPUTS = 256
MAX_REASON = 500
_WANTED = "forge_outputs"
_LABEL = "forge_attempt"


class Output(msgspec.Struct, frozen=True):
    """One file that a node wrote, as `GET /view` wants it named."""

    node: str
    filename: str
    subfolder: str
    type: str


class Progress(msgspec.Struct, frozen=True):
    """How far the running node is: `value` of `max` steps."""

    value: int
    max: int
    node: str | None


class Health(msgspec.Struct, frozen=True):
    """What one probe of a server found; `detail` says why it is not reachable."""

    reachable: bool
    version: str | None = None
    queue_remaining: int | None = None
    detail: str = ""


class Sighting(enum.Enum):
    """Where ComfyUI has a prompt at one moment."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    ABSENT = "absent"

    @property
    def over(self) -> bool:
        """Whether there is a history entry to read."""
        return self in (Sighting.SUCCEEDED, Sighting.FAILED, Sighting.INTERRUPTED)


class Heard(msgspec.Struct, frozen=True):
    """What one socket message says about one prompt that has been started."""

    prompt_id: str
    over: bool = False
    progress: Progress | None = None


class Submitted(msgspec.Struct, frozen=True):
    """ComfyUI's 200 to a prompt: its place in the order, and the outputs it silently dropped."""

    number: float
    node_errors: dict[str, Any]


# Graphs


def check_graph(graph: object) -> None:
    """Refuse a graph that would harm ComfyUI or could never run, before it is submitted.

    A node without an `inputs` object kills ComfyUI's worker thread for everybody, even if nothing needs it.

    Raises:
        PromptRejected: naming the node and what is wrong with it.
    """
    if not isinstance(graph, dict) or not graph:
        raise PromptRejected("the graph is not an object of nodes")
    for name, node in graph.items():
        if not isinstance(name, str) or not isinstance(node, dict):
            raise PromptRejected(f"node {name!r} is not an object under a string id")
        if not isinstance(node.get("class_type"), str) or not node["class_type"]:
            raise PromptRejected(f"node {name!r} has no class_type")
        if not isinstance(node.get("inputs"), dict):
            raise PromptRejected(f"node {name!r} has no inputs object")
        for key, value in node["inputs"].items():
            if _is_link(value) and value[0] not in graph:
                raise PromptRejected(
                    f"node {name!r}: input {key!r} is linked to {value[0]!r}, which does not exist"
                )
            if not _is_finite(value):
                raise PromptRejected(f"node {name!r}: input {key!r} holds a number that is not finite")


def prune(graph: Graph, outputs: Sequence[str]) -> Graph:
    """The part of a checked graph that the wanted output nodes depend on.

    Raises:
        PromptRejected: no outputs, or one that is not in the graph.
    """
    missing = [node for node in outputs if node not in graph]
    if missing or not outputs:
        raise PromptRejected(f"the graph has no output node {', '.join(missing) or 'at all'}")
    needed: set[str] = set()
    open_nodes = list(outputs)
    while open_nodes:
        name = open_nodes.pop()
        if name not in needed:
            needed.add(name)
            open_nodes += [value[0] for value in graph[name]["inputs"].values() if _is_link(value)]
    return {name: node for name, node in graph.items() if name in needed}


def submission(
    prompt_id: str, graph: Graph, outputs: Sequence[str], client_id: str, label: str = ""
) -> bytes:
    """The body of `POST /prompt`; `client_id` is always sent, else cached outputs are missing from history.

    The wanted outputs travel with the prompt, so that whoever adopts it knows them, and so does the label,
    which tells whoever finds it what it is for.

    Raises:
        PromptRejected: the graph cannot be written as JSON.
    """
    body = {
        "prompt": graph,
        "prompt_id": prompt_id,
        "client_id": client_id,
        "extra_data": {_WANTED: list(outputs), _LABEL: label},
    }
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptRejected(f"the graph is not JSON: {error}") from error


def _is_link(value: object) -> bool:
    match value:
        case [str(), int() | float()]:
            return True
        case _:
            return False


def _is_finite(value: object) -> bool:
    match value:
        case float():
            return math.isfinite(value)
        case dict():
            return all(_is_finite(inner) for inner in value.values())
        case list() | tuple():
            return all(_is_finite(inner) for inner in value)
        case _:
            return True


# Answers


def decode(body: bytes | str) -> Any:
    """JSON as ComfyUI writes it, NaN included where somebody's graph held one; None when it is not JSON."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            return None


def encode(body: dict[str, Any]) -> bytes:
    """A small request body as JSON."""
    return msgspec.json.encode(body)


def submitted(body: bytes) -> Submitted | None:
    """The 200 answer to `POST /prompt`, or None when it is not one."""
    match decode(body):
        case {"prompt_id": str(), "number": int() | float() as number, **rest}:
            errors = rest.get("node_errors")
            return Submitted(number=number, node_errors=errors if isinstance(errors, dict) else {})
        case _:
            return None


def rejection(status: int, body: bytes) -> PromptRejected:
    """The error for a prompt that ComfyUI refused with 400 or 413."""
    match decode(body):
        case {"error": {"type": str(kind), "message": str(message), **more}, **rest}:
            node_errors = rest.get("node_errors")
            node_errors = node_errors if isinstance(node_errors, dict) else {}
            detail = next(_node_complaints(node_errors), None) or more.get("details")
            text = f"{kind}: {message}" + (f" ({detail})" if isinstance(detail, str) and detail else "")
            return PromptRejected(text[:MAX_REASON], node_errors)
        case _:
            return PromptRejected(f"ComfyUI answered {status}: {body[:200].decode(errors='replace')}")


def refused_outputs(node_errors: dict[str, Any]) -> PromptRejected:
    """The error for a prompt that ComfyUI took with 200, but not all of it."""
    which = next(_node_complaints(node_errors), ", ".join(node_errors))
    return PromptRejected(f"ComfyUI does not accept every output: {which}"[:MAX_REASON], node_errors)


def _node_complaints(node_errors: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with which node, in one line each; `error.details` names no node at all."""
    for node, wrong in node_errors.items():
        match wrong:
            case {"errors": [*errors], **rest}:
                for error in errors:
                    match error:
                        case {"message": str(message), "details": str(details)}:
                            yield f"node {node} ({rest.get('class_type')}): {message}: {details}"


def job_sighting(job: Mapping[str, Any]) -> Sighting | None:
    """What `GET /api/jobs/{id}` says; None for a state this version of forge does not know."""
    return _JOB_STATES.get(str(job.get("status")))


_JOB_STATES = {
    "pending": Sighting.PENDING,
    "in_progress": Sighting.RUNNING,
    "completed": Sighting.SUCCEEDED,
    "failed": Sighting.FAILED,
    "cancelled": Sighting.INTERRUPTED,
}


def queue_sighting(queue: Mapping[str, Any], prompt_id: str) -> Sighting | None:
    """Whether `GET /queue` names the prompt; None when it does not.

    Running is looked at first: a prompt posted twice may be in both lists.
    """
    if prompt_id in queued_ids(queue, "queue_running"):
        return Sighting.RUNNING
    return Sighting.PENDING if prompt_id in queued_ids(queue, "queue_pending") else None


def queued_ids(queue: Mapping[str, Any], key: str) -> list[str]:
    """The prompt ids in one list of `GET /queue`: `queue_running` or `queue_pending`."""
    items = queue.get(key)
    return [str(item[1]) for item in items or () if isinstance(item, list) and len(item) > 1]


def queued_labels(queue: Mapping[str, Any]) -> dict[str, str]:
    """Prompt id → its label, for every prompt in `GET /queue` that has one."""
    found: dict[str, str] = {}
    for key in ("queue_running", "queue_pending"):
        items = queue.get(key)
        for item in items if isinstance(items, list) else ():
            match item:
                case [_, str(prompt_id), _, dict(extra), *_] if isinstance(label := extra.get(_LABEL), str):
                    found[prompt_id] = label
                case _:
                    pass
    return found


def history_entry(history: Mapping[str, Any], prompt_id: str) -> dict[str, Any] | None:
    """The entry of `GET /history/{id}`; None for anything forgotten, unknown, pending or running alike."""
    entry = history.get(prompt_id)
    return entry if isinstance(entry, dict) else None


def entry_sighting(entry: Mapping[str, Any]) -> Sighting:
    """How a prompt in history ended; outputs say nothing about it, a failed prompt may have some."""
    status = entry.get("status")
    if not isinstance(status, dict) or status.get("status_str") == "success":
        return Sighting.SUCCEEDED
    kinds = [kind for kind, _ in _messages(entry)]
    return Sighting.INTERRUPTED if "execution_interrupted" in kinds else Sighting.FAILED


def conclude(entry: Mapping[str, Any]) -> list[Output]:
    """The files a prompt in history wrote for its wanted outputs, in node order.

    Raises:
        PromptFailed: a node raised; names it with its message.
        PromptInterrupted: somebody stopped it.
        PromptLost: it "succeeded" without fresh files for every wanted output.
        PictureRefused: a file name that forge will not ask for.
    """
    match entry_sighting(entry):
        case Sighting.FAILED:
            raise PromptFailed(_failure(entry))
        case Sighting.INTERRUPTED:
            raise PromptInterrupted
        case _:
            return _fresh_outputs(entry)


def _fresh_outputs(entry: Mapping[str, Any]) -> list[Output]:
    written = entry.get("outputs")
    written = written if isinstance(written, dict) else {}
    stale = _cached_nodes(entry)
    found: list[Output] = []
    for node in _wanted_nodes(entry, written):
        if node in stale:
            # Names in a cached result may be of files that are gone or were overwritten since.
            raise PromptLost(f"node {node} was answered from ComfyUI's cache, its files may be others by now")
        files = list(_files(node, written.get(node)))
        if not files:
            raise PromptLost(f"ComfyUI reports success, but no files of node {node}")
        found += files
    if not found:
        raise PromptLost("ComfyUI reports success, but no files")
    if len(found) > MAX_OUTPUTS:
        raise PictureRefused(f"ComfyUI names {len(found)} files")
    return found


def _wanted_nodes(entry: Mapping[str, Any], written: Mapping[str, Any]) -> list[str]:
    match entry.get("prompt"):
        case [_, _, _, dict(extra), *_] if isinstance(wanted := extra.get(_WANTED), list):
            return [str(node) for node in wanted]
        case [_, _, _, _, list(targets), *_]:
            return [str(node) for node in targets]
        case _:
            return list(written)


def _files(node: str, output: object) -> Iterator[Output]:
    # Animations and videos come under "images" too.
    images = output.get("images") if isinstance(output, dict) else None
    for item in images if isinstance(images, list) else ():
        match item:
            case {"filename": str(filename), **rest}:
                subfolder, kind = rest.get("subfolder") or "", rest.get("type") or "output"
                if not (isinstance(subfolder, str) and is_safe_name(filename) and is_safe_folder(subfolder)):
                    raise PictureRefused(
                        f"node {node} names a file that forge does not ask for: {filename[:80]!r}"
                    )
                if kind not in ("output", "temp"):
                    raise PictureRefused(f"node {node} names a file of type {str(kind)[:20]!r}")
                yield Output(node=node, filename=filename, subfolder=subfolder, type=kind)
            case _:
                raise PictureRefused(f"node {node} names a file in a way that cannot be read")


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .()+=,@-]{0,199}")


def is_safe_name(name: str) -> bool:
    """Whether a file name is plain: no folder, no climbing dots, no " [input]" that changes its type."""
    return _NAME.fullmatch(name) is not None and ".." not in name and not name.endswith((" ", "."))


def is_safe_folder(folder: str) -> bool:
    """Whether a subfolder stays below its root; ComfyUI on Windows separates with backslashes."""
    return not folder or (
        len(folder) <= 400 and all(is_safe_name(part) for part in re.split(r"[/\\]", folder))
    )


def _failure(entry: Mapping[str, Any]) -> str:
    for kind, data in _messages(entry):
        if kind == "execution_error":
            where = f"node {data.get('node_id')} ({data.get('node_type')})"
            return f"{where}: {str(data.get('exception_message', '')).strip()}"[:MAX_REASON]
    return "ComfyUI reports an error without saying which"


def _cached_nodes(entry: Mapping[str, Any]) -> set[str]:
    nodes: set[str] = set()
    for kind, data in _messages(entry):
        if kind == "execution_cached" and isinstance(data.get("nodes"), list):
            nodes.update(str(node) for node in data["nodes"])
    return nodes


def _messages(entry: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    status = entry.get("status")
    messages = status.get("messages") if isinstance(status, dict) else None
    for message in messages if isinstance(messages, list) else ():
        match message:
            case [str(kind), dict(data), *_]:
                yield kind, data


# The socket


class _Envelope(msgspec.Struct):
    type: str
    data: msgspec.Raw = msgspec.Raw(b"{}")


class _Executing(msgspec.Struct):
    prompt_id: str | None = None
    node: str | None = None
    value: float = 0
    max: float = 0


_envelopes = msgspec.json.Decoder(_Envelope)
_bodies = msgspec.json.Decoder(_Executing)
_TELLING = frozenset(
    (
        "execution_start",
        "execution_cached",
        "executing",
        "progress",
        "executed",
        "execution_success",
        "execution_error",
        "execution_interrupted",
    )
)


def read_message(message: str | bytes) -> Heard | None:
    """What a text message of the socket says about a prompt, or None.

    Only `executing` with `node: null` means over: `execution_success` can come before history is written.
    `progress_state` is left unread: it repeats `progress` at a size that grows with the square of the graph.
    """
    try:
        envelope = _envelopes.decode(message)
        if envelope.type not in _TELLING:
            return None
        data = _bodies.decode(envelope.data)
    except msgspec.MsgspecError:
        return None
    if not data.prompt_id:  # after a reconnect ComfyUI repeats the running node without saying whose it is
        return None
    progress = None
    if envelope.type == "progress":
        progress = Progress(value=int(data.value), max=int(data.max), node=data.node)
    return Heard(data.prompt_id, over=envelope.type == "executing" and data.node is None, progress=progress)
