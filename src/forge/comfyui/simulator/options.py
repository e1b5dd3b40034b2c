"""What a simulator is started with, and the faults that can be switched on before or while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from forge.errors import SettingInvalid

Version = Literal["0.27.0", "0.3.64"]
Hostile = Literal["", "bytes", "html", "names", "huge", "bomb", "truncated"]


class Faults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be made to go wrong. Fields ending in `_next` count down, one prompt at a time."""

    history_delay_ms: int = 0
    """How long after `execution_success` the history entry appears; until then the prompt is running."""
    answer_delay_ms: int = 0
    """How long the answer to `POST /prompt` is held back: WebSocket messages then arrive before it."""
    take_delay_ms: int = 0
    """How long `POST /prompt` lies there before its prompt is queued, even if its client waits no more."""
    slow_http_ms: int = 0
    """How long every HTTP answer waits, WebSocket handshakes included."""
    frozen: bool = False
    """The worker thread is dead: prompts are accepted, one is taken, nothing ever runs."""
    blocked: bool = False
    """The publisher waits for a socket nobody reads: no WebSocket message leaves."""
    noise: bool = False
    """Message types and keys no client knows are mixed in."""
    hostile: Hostile = ""
    """What SaveImage leaves behind instead of a picture."""
    other_device: bool = False
    """Pictures come out as on another kind of GPU: the same graph and seed, other pixels."""
    node_errors_next: int = 0
    """Answer 200 with a non-empty `node_errors`; the prompt runs all the same."""
    refuse_next: int = 0
    """Answer 500 and forget the request."""
    queue_and_refuse_next: int = 0
    """Answer 500 although the prompt is in the queue."""
    hang_up_next: int = 0
    """Put the prompt in the queue and cut the connection instead of answering."""
    fail_next: int = 0
    """The prompt ends in `execution_error` at its first node."""
    stale_next: int = 0
    """The prompt counts as cached and names files that are no longer there."""
    empty_outputs_next: int = 0
    """The prompt succeeds, but history shows no outputs."""


class SimulatorOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one simulator is set up."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one; read it from `Simulator.url`."""
    output_dir: Path | None = None
    """Where `output/`, `input/` and `temp/` are made; when not given, a temporary folder."""
    render_ms: tuple[int, int] = (0, 0)
    """Least and most milliseconds one prompt takes, drawn anew for each."""
    version: Version = "0.27.0"
    seed: int = 0
    """Decides the drawn durations, nothing else: pictures depend on the graph alone."""
    record: Path | None = None
    """JSON lines of all that happened, appended to, so that they outlive the process."""
    checkpoints: tuple[str, ...] = (
        "sd_xl_base_1.0.safetensors",
        "v1-5-pruned-emaonly.safetensors",
        "tiny-random-sd15.safetensors",
    )
    loras: tuple[str, ...] = ("forge-style.safetensors",)
    max_upload_bytes: int = 100 * 1024 * 1024
    faults: Faults = Faults()


def changed_faults(faults: Faults, changes: dict[str, Any]) -> Faults:
    """The same faults with some fields set anew.

    Raises:
        SettingInvalid: an unknown name or a value of the wrong type.
    """
    try:
        return msgspec.convert(msgspec.structs.asdict(faults) | changes, Faults, strict=False)
    except msgspec.ValidationError as error:
        raise SettingInvalid(f"fault: {error}") from error


def faults_from(assignments: Iterable[str]) -> Faults:
    """Faults as a command line names them: `frozen`, `frozen=true`, `fail_next=3`."""
    pairs = (assignment.partition("=") for assignment in assignments)
    return changed_faults(Faults(), {name: value if sign else True for name, sign, value in pairs})
