"""What ComfyUI's words mean: graphs that may be sent, answers, history, socket messages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyui.conformance.comfy_server import recorded
from forge.comfyui import protocol
from forge.comfyui.protocol import Heard, Output, Progress, Sighting
from forge.errors import PictureRefused, PromptFailed, PromptInterrupted, PromptLost, PromptRejected

ID = "6f1b1f6e-0c7e-4c3c-9a3e-1f0b5a1d2c3e"


def swatch() -> dict[str, Any]:
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "forge/a/1/img"}},
    }


def entry(
    *,
    outputs: dict[str, Any] | None = None,
    messages: list[Any] | None = None,
    status: str = "success",
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    images = {"2": {"images": [{"filename": "img_00001_.png", "subfolder": "forge/a/1", "type": "output"}]}}
    return {
        "prompt": [7, ID, swatch(), extra if extra is not None else {"client_id": "c"}, ["2"]],
        "outputs": images if outputs is None else outputs,
        "status": {"status_str": status, "completed": status == "success", "messages": messages or []},
    }


def images(*names: str, **more: Any) -> dict[str, Any]:
    return {"images": [{"filename": name, "subfolder": "", "type": "output"} | more for name in names]}


# Graphs


def test_a_plain_graph_passes() -> None:
    protocol.check_graph(swatch())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"9": {"class_type": "ImageInvert"}}, "no inputs"),
        ({"9": {"class_type": "ImageInvert", "inputs": None}}, "no inputs"),
        ({"9": {"class_type": "ImageInvert", "inputs": []}}, "no inputs"),
        ({"9": {"inputs": {}}}, "no class_type"),
        ({"9": {"class_type": 5, "inputs": {}}}, "no class_type"),
        ({"9": None}, "not an object"),
        ({9: {"class_type": "ImageInvert", "inputs": {}}}, "string id"),
        ({"9": {"class_type": "ImageInvert", "inputs": {"image": ["77", 0]}}}, "does not exist"),
        ({"9": {"class_type": "Blur", "inputs": {"sigma": float("nan")}}}, "not finite"),
        ({"9": {"class_type": "Blur", "inputs": {"deep": [{"x": [float("inf")]}]}}}, "not finite"),
    ],
)
def test_a_graph_that_harms_comfyui_is_refused(change: dict[Any, Any], reason: str) -> None:
    with pytest.raises(PromptRejected, match=reason):
        protocol.check_graph(swatch() | change)


@pytest.mark.parametrize("graph", [{}, None, [], "graph"])
def test_what_is_no_graph_is_refused(graph: Any) -> None:
    with pytest.raises(PromptRejected):
        protocol.check_graph(graph)


def test_nodes_that_no_wanted_output_needs_are_dropped() -> None:
    graph = swatch() | {
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        "4": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    }
    assert protocol.prune(graph, ["2"]) == swatch()
    assert list(protocol.prune(graph, ["3"])) == ["1", "3"]


def test_a_cycle_does_not_hang_pruning() -> None:
    graph = {
        "a": {"class_type": "X", "inputs": {"i": ["b", 0]}},
        "b": {"class_type": "X", "inputs": {"i": ["a", 0]}},
    }
    assert protocol.prune(graph, ["a"]) == graph


@pytest.mark.parametrize("outputs", [[], ["9"], ["2", "9"]])
def test_outputs_that_do_not_exist_are_refused(outputs: list[str]) -> None:
    with pytest.raises(PromptRejected, match="no output node"):
        protocol.prune(swatch(), outputs)


def test_a_submission_always_has_an_owner_and_never_null_extra_data() -> None:
    body = json.loads(protocol.submission(ID, swatch(), ["2"], "me"))
    assert body["client_id"] == "me"
    assert body["prompt_id"] == ID
    assert body["prompt"] == swatch()
    assert "extra_pnginfo" not in body["extra_data"]


@pytest.mark.parametrize("value", [object(), "\ud800", b"\xff".decode("utf-8", "surrogateescape")])
def test_a_graph_that_is_no_json_is_refused(value: object) -> None:
    graph = {"1": {"class_type": "X", "inputs": {"v": value}}}
    with pytest.raises(PromptRejected, match="not JSON"):
        protocol.submission(ID, graph, ["1"], "me")


# Answers


def test_an_answer_with_nan_is_read() -> None:
    queue = protocol.decode(b'{"queue_running": [[1, "a", {"1": {"inputs": {"x": NaN}}}, {}, []]]}')
    assert protocol.queue_sighting(queue, "a") is Sighting.RUNNING


def test_a_rejection_keeps_what_comfyui_said() -> None:
    wrong = {"5": {"errors": [{"type": "value_not_in_list"}], "dependent_outputs": ["2"], "class_type": "X"}}
    said = {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed", "details": "why"}
    error = protocol.rejection(400, json.dumps({"error": said, "node_errors": wrong}).encode())
    assert error.node_errors == wrong
    assert error.detail == "prompt_outputs_failed_validation: Prompt outputs failed (why)"


def test_a_rejection_names_the_node_and_the_value() -> None:
    case = next(case for case in recorded("validation") if case["label"] == "value above max")
    error = protocol.rejection(400, json.dumps(case["body"]).encode())
    assert error.detail == (
        "prompt_outputs_failed_validation: Prompt outputs failed validation "
        "(node 1 (EmptyImage): Value 1000000 bigger than max of 16384: width)"
    )
    assert protocol.refused_outputs(case["body"]["node_errors"]).detail == (
        "ComfyUI does not accept every output: "
        "node 1 (EmptyImage): Value 1000000 bigger than max of 16384: width"
    )


@pytest.mark.parametrize("wrong", [{"1": {}}, {"1": {"errors": 5}}, {"1": {"errors": [{}, 3]}}, {"1": None}])
def test_node_errors_of_another_shape_are_kept_unread(wrong: dict[str, Any]) -> None:
    error = protocol.refused_outputs(wrong)
    assert (error.detail, error.node_errors) == ("ComfyUI does not accept every output: 1", wrong)


@pytest.mark.parametrize(
    "body", [b"Maximum request body size 104857600 exceeded.", b'{"error": 5}', b"\xff\xfe"]
)
def test_a_rejection_in_plain_text_is_one_too(body: bytes) -> None:
    assert protocol.rejection(413, body).detail.startswith("ComfyUI answered 413: ")


@pytest.mark.parametrize("body", [b"", b"[]", b"500 Internal Server Error", b'{"prompt_id": "a"}', b"{}"])
def test_an_answer_that_is_no_submission_is_none(body: bytes) -> None:
    assert protocol.submitted(body) is None


def test_numbers_may_be_negative_and_fractional() -> None:
    told = protocol.submitted(b'{"prompt_id": "a", "number": -1.5, "node_errors": {}, "new_key": 1}')
    assert told is not None
    assert told.number == -1.5


@pytest.mark.parametrize(
    ("status", "sighting"),
    [
        ("pending", Sighting.PENDING),
        ("in_progress", Sighting.RUNNING),
        ("completed", Sighting.SUCCEEDED),
        ("failed", Sighting.FAILED),
        ("cancelled", Sighting.INTERRUPTED),
        ("hibernating", None),
        (None, None),
    ],
)
def test_a_job_is_sighted_by_its_status(status: str | None, sighting: Sighting | None) -> None:
    assert protocol.job_sighting({"id": ID, "status": status}) is sighting


def test_the_queue_is_read_in_any_order_and_tolerates_strangers() -> None:
    queue = {"queue_running": [], "queue_pending": [[9, "b"], "stranger", [3, "a", {}, {}, [], "sensitive"]]}
    assert protocol.queue_sighting(queue, "a") is Sighting.PENDING
    assert protocol.queue_sighting(queue, "c") is None
    assert protocol.queue_sighting({"queue_running": None}, "a") is None


def test_empty_history_means_nothing() -> None:
    assert protocol.history_entry({}, ID) is None
    assert protocol.history_entry({ID: entry()}, ID) == entry()


# How a prompt ended


def test_success_gives_the_files_of_the_wanted_node() -> None:
    assert protocol.conclude(entry()) == [Output("2", "img_00001_.png", "forge/a/1", "output")]


def test_files_of_other_nodes_are_left_out() -> None:
    both = {"3": images("t.png", type="temp"), "2": images("b_00001_.png", "b_00002_.png")}
    assert [file.filename for file in protocol.conclude(entry(outputs=both))] == [
        "b_00001_.png",
        "b_00002_.png",
    ]


def test_whoever_adopts_a_prompt_knows_its_wanted_outputs() -> None:
    body = json.loads(protocol.submission(ID, swatch(), ["3"], "me"))
    outputs = {"3": images("wanted.png"), "2": images("not.png")}
    found = protocol.conclude(entry(outputs=outputs, extra=body["extra_data"] | {"create_time": 1}))
    assert [file.filename for file in found] == ["wanted.png"]


def test_new_keys_beside_files_do_not_disturb() -> None:
    outputs = {"2": images("a.webp", id="x1", metadata={}) | {"animated": [True]}, "5": {"text": ["hello"]}}
    assert protocol.conclude(entry(outputs=outputs)) == [Output("2", "a.webp", "", "output")]


@pytest.mark.parametrize(
    "outputs", [{}, {"2": {}}, {"2": {"images": []}}, {"2": {"text": ["x"]}}, {"3": images("x.png")}]
)
def test_success_without_files_is_lost_not_done(outputs: dict[str, Any]) -> None:
    with pytest.raises(PromptLost):
        protocol.conclude(entry(outputs=outputs))


def test_every_wanted_output_must_have_files() -> None:
    wanted = {"forge_outputs": ["2", "3"]}
    with pytest.raises(PromptLost, match="node 3"):
        protocol.conclude(entry(extra=wanted))


def test_files_named_from_the_cache_are_lost_not_done() -> None:
    cached = [["execution_start", {}], ["execution_cached", {"nodes": ["1", "2"]}], ["execution_success", {}]]
    with pytest.raises(PromptLost, match="cache"):
        protocol.conclude(entry(messages=cached))


def test_a_cached_loader_is_normal() -> None:
    protocol.conclude(entry(messages=[["execution_cached", {"nodes": ["1"]}], ["execution_success", {}]]))


def test_failure_names_node_and_message_even_when_there_are_outputs() -> None:
    told = {"node_id": "3", "node_type": "KSampler", "exception_message": "out of memory\n", "traceback": []}
    with pytest.raises(PromptFailed) as caught:
        protocol.conclude(
            entry(status="error", messages=[["execution_start", {}], ["execution_error", told]])
        )
    assert caught.value.detail == "node 3 (KSampler): out of memory"


def test_a_failure_that_says_nothing_is_one_all_the_same() -> None:
    with pytest.raises(PromptFailed):
        protocol.conclude(entry(status="error"))


def test_an_interrupted_prompt_is_not_a_failed_one() -> None:
    with pytest.raises(PromptInterrupted):
        protocol.conclude(entry(status="error", messages=[["execution_interrupted", {"node_id": "1"}]]))


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/passwd",
        "a\x00b.png",
        "x" * 400,
        "C:\\windows\\win.ini",
        "<script>.png",
        "",
        ".hidden",
        "a..b",
        "a/b.png",
        "x.png [input]",
        "naïve.png",
        "a\n.png",
        "a.png ",
    ],
)
def test_hostile_file_names_are_refused(name: str) -> None:
    with pytest.raises(PictureRefused):
        protocol.conclude(entry(outputs={"2": images("good.png", name)}))


@pytest.mark.parametrize("folder", ["../..", "/etc", "a//b", "a/../b", "..\\..", "x" * 500, 5])
def test_hostile_folders_are_refused(folder: Any) -> None:
    with pytest.raises(PictureRefused):
        protocol.conclude(entry(outputs={"2": images("good.png", subfolder=folder)}))


@pytest.mark.parametrize("kind", ["input", "root", 5])
def test_only_files_that_comfyui_wrote_are_asked_for(kind: Any) -> None:
    with pytest.raises(PictureRefused):
        protocol.conclude(entry(outputs={"2": images("good.png", type=kind)}))


@pytest.mark.parametrize("item", [5, None, "a.png", {"filename": 5}])
def test_files_named_in_nonsense_are_refused(item: Any) -> None:
    with pytest.raises(PictureRefused):
        protocol.conclude(entry(outputs={"2": {"images": [item]}}))


def test_too_many_files_are_refused() -> None:
    names = [f"i_{number}.png" for number in range(protocol.MAX_OUTPUTS + 1)]
    with pytest.raises(PictureRefused, match="257"):
        protocol.conclude(entry(outputs={"2": images(*names)}))


def test_windows_servers_separate_folders_with_backslashes() -> None:
    assert protocol.is_safe_folder("forge\\job\\1")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(JSON, JSON, JSON)
def test_no_history_entry_breaks_the_reader(prompt: Any, outputs: Any, status: Any) -> None:
    try:
        found = protocol.conclude({"prompt": prompt, "outputs": outputs, "status": status})
    except (PromptLost, PictureRefused, PromptFailed, PromptInterrupted):
        return
    assert all(protocol.is_safe_name(file.filename) for file in found)


# The socket


def message(kind: str, **data: Any) -> str:
    return json.dumps({"type": kind, "data": data})


def test_over_is_only_executing_nothing() -> None:
    assert protocol.read_message(message("executing", node=None, prompt_id="a")) == Heard("a", over=True)
    assert protocol.read_message(message("executing", node="3", prompt_id="a")) == Heard("a")
    assert protocol.read_message(message("execution_success", prompt_id="a", timestamp=1)) == Heard("a")


def test_progress_is_read() -> None:
    heard = protocol.read_message(message("progress", value=3.0, max=20, prompt_id="a", node="5"))
    assert heard == Heard("a", progress=Progress(3, 20, "5"))


@pytest.mark.parametrize(
    "text",
    [
        message("executing", node="3"),  # as it is repeated after a reconnect
        message("status", status={"exec_info": {"queue_remaining": 1}}, sid="x"),
        message("progress_state", prompt_id="a", nodes={}),
        message("forge.unheard_of", prompt_id="a"),
        message("progress", value="three", prompt_id="a"),
        '{"type": 5}',
        '{"type": "executing"}',
        "[]",
        "not json",
        "",
    ],
)
def test_what_says_nothing_of_a_prompt_is_skipped(text: str) -> None:
    assert protocol.read_message(text) is None


@given(st.text(max_size=60) | JSON.map(json.dumps))
def test_no_message_breaks_the_reader(text: str) -> None:
    protocol.read_message(text)
