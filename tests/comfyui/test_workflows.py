"""Job types: what the built-in ones post, and how an operator's own are read, used and refused."""

from __future__ import annotations

import copy
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.comfyui import workflows
from forge.comfyui.client import Comfy
from forge.comfyui.simulator import Simulator, SimulatorOptions
from forge.comfyui.workflow_file import Definition, Model
from forge.comfyui.workflows import Workflow
from forge.domain.params import SAFE, Param, resolve
from forge.errors import Invalid, WorkflowInvalid

GOLDEN = Path(__file__).with_name("golden")
BUILT_IN = workflows.load()
WITH_LORA = workflows.load(models={"lora": "ink.safetensors@0.6"})
PROMPT = "a (jade) hairpin, cherry blossoms"

SWATCH_GRAPH = """\
{
  "1": {
    "class_type": "EmptyImage",
    "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}
  },
  "2": {
    "class_type": "SaveImage",
    "inputs": {"images": ["1", 0], "filename_prefix": "ComfyUI"}
  }
}
"""
SWATCH = """\
asset_type = "ui_icon"
description = "A flat colour swatch"
timeout_seconds = 30
outputs = ["2"]                    # node ids whose images become assets
[params.color]
type = "integer"                   # integer | number | string | prompt | boolean | choice | seed | image
minimum = 0
maximum = 16777215
default = 0
targets = ["1.color"]              # node.input, one or more
"""


def write(folder: Path, name: str = "swatch", toml: str = SWATCH, graph: str = SWATCH_GRAPH) -> Path:
    (folder / f"{name}.toml").write_text(toml, encoding="utf-8")
    (folder / f"{name}.json").write_text(graph, encoding="utf-8")
    return folder


def refusals(folder: Path, **models: str) -> list[str]:
    """The problems of a folder without its path: `FILE:LINE: REASON`."""
    with pytest.raises(WorkflowInvalid) as caught:
        workflows.load(folder, models=models)
    return [line.removeprefix(f"{folder}/") for line in caught.value.detail.split("\n")]


def rendered(workflow: Workflow, given_params: dict[str, Any]) -> dict[str, Any]:
    resolved = resolve(workflow.params, given_params, entropy=1)
    return workflows.render(workflow, resolved, filename_prefix="forge/job/1/img")


# The built-in job types


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_built_in_job_type_posts_this_graph(name: str) -> None:
    assert rendered(BUILT_IN[name], {"prompt": PROMPT, "seed": 7}) == golden(f"{name}.json")


def test_a_chosen_lora_is_spliced_in() -> None:
    graph = rendered(WITH_LORA["npc_bust"], {"prompt": PROMPT, "seed": 7})
    assert graph == golden("npc_bust_with_lora.json")


def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def test_the_four_job_types_are_built_in_and_need_no_params() -> None:
    assert sorted(BUILT_IN) == ["character_portrait", "fate_card", "npc_bust", "ui_icon"]
    for name, workflow in BUILT_IN.items():
        assert workflow.asset_type == name
        resolve(workflow.params, {}, entropy=1)


def a_value(name: str, param: Param) -> st.SearchStrategy[Any]:
    match param.type:
        case "choice":
            return st.sampled_from(param.choices)
        case "seed":
            return st.integers(0, SAFE)
        case "integer":
            lowest, highest, step = int(param.minimum or 0), int(param.maximum or 0), param.step or 1
            return st.integers(lowest // step, highest // step).map(lambda n: n * step)
        case "number":
            return st.floats(float(param.minimum or 0), float(param.maximum or 0))
        case _:
            return st.text("ab (:,é仙{}", max_size=30)


@st.composite
def built_in_requests(draw: st.DrawFn) -> tuple[Workflow, dict[str, Any]]:
    workflow = draw(st.sampled_from([*BUILT_IN.values(), *WITH_LORA.values()]))
    optional = {name: a_value(name, param) for name, param in workflow.params.items()}
    return workflow, draw(st.fixed_dictionaries({}, optional=optional))


@settings(deadline=None)
@given(built_in_requests())
def test_a_posted_graph_is_the_template_but_for_its_declared_slots(
    request: tuple[Workflow, dict[str, Any]],
) -> None:
    workflow, params = request
    try:
        graph = rendered(workflow, params)
    except Invalid:
        return
    declared = {target for param in workflow.params.values() for target in param.targets} | set(
        workflow.compose
    )
    declared |= {f"{node}.filename_prefix" for node in workflow.outputs}
    for target in declared:
        node, _, slot = target.partition(".")
        kind = type(workflow.graph[node]["inputs"][slot])
        value = graph[node]["inputs"].pop(slot)
        assert isinstance(value, kind)
    expected = copy.deepcopy(workflow.graph)
    for target in declared:
        node, _, slot = target.partition(".")
        del expected[node]["inputs"][slot]
    assert graph == expected


@settings(deadline=None)
@given(built_in_requests())
def test_comfyui_accepts_every_value_a_built_in_may_send(request: tuple[Workflow, dict[str, Any]]) -> None:
    workflow, params = request
    try:
        graph = rendered(workflow, params)
    except Invalid:
        return
    for node in graph.values():
        wanted = NODES[node["class_type"]]["input"]["required"]
        assert set(node["inputs"]) == set(wanted)
        for slot, value in node["inputs"].items():
            kind, *options = wanted[slot]
            if isinstance(value, list):
                assert NODES[graph[value[0]]["class_type"]]["output"][value[1]] == kind
            elif isinstance(kind, list):
                assert value in kind or slot in ("ckpt_name", "lora_name")
            elif kind in ("INT", "FLOAT"):
                assert options[0]["min"] <= value <= options[0]["max"]
                assert kind == "FLOAT" or value % options[0].get("step", 1) == 0


NODES = json.loads(files("forge.comfyui.simulator").joinpath("object_info.json").read_text("utf-8"))


@pytest.mark.parametrize("workflow", [*BUILT_IN.values(), WITH_LORA["npc_bust"]], ids=lambda w: w.name)
async def test_a_built_in_job_type_runs(workflow: Workflow) -> None:
    resolved = resolve(
        workflow.params, {"prompt": PROMPT, "width": 256, "height": 256, "variations": 2}, entropy=1
    )
    graph = workflows.render(workflow, resolved, filename_prefix="forge/job/1/img")
    async with (
        Simulator(SimulatorOptions(loras=("ink.safetensors",))) as simulator,
        Comfy(simulator.url) as comfy,
    ):
        prompt_id = uuid4()
        await comfy.submit(prompt_id, graph, outputs=workflow.outputs)
        outputs = await comfy.wait(prompt_id, timeout=30)
    assert len(outputs) == workflows.pictures(workflow, resolved) == 2
    assert {output.subfolder for output in outputs} == {"forge/job/1"}


def test_labels_name_category_archetype_and_variant() -> None:
    bust = BUILT_IN["npc_bust"]
    params = {
        "gender": "male",
        "age": "elder",
        "expression": "angry",
        "category": "military",
        "archetype_id": "x-7",
    }
    assert workflows.labels(bust, resolve(bust.params, params, entropy=1)) == {
        "category": "military",
        "archetype_id": "x-7",
        "variant_key": "male_elder_angry",
    }
    assert workflows.labels(bust, resolve(bust.params, {}, entropy=1))["archetype_id"] is None


def test_a_job_type_says_how_many_pictures_it_makes(tmp_path: Path) -> None:
    bust = BUILT_IN["npc_bust"]
    assert workflows.pictures(bust, resolve(bust.params, {"variations": 3}, entropy=1)) == 3
    swatch = workflows.load(write(tmp_path))["swatch"]
    assert workflows.pictures(swatch, {}) == 1


def test_what_is_left_out_leaves_no_hole_in_the_prompt() -> None:
    text = rendered(BUILT_IN["fate_card"], {})["6"]["inputs"]["text"]
    assert ", ," not in text
    assert "lotus" not in text
    assert (
        "a lone lotus" in rendered(BUILT_IN["fate_card"], {"prompt": "a lone lotus"})["6"]["inputs"]["text"]
    )


def test_values_are_said_in_words(tmp_path: Path) -> None:
    toml = (
        LOADER_TOP
        + """
[compose]
"2.text" = ["{who} {{and}} {{{moons}}}", "{light}", "{ornate}", "{scale} wide", "{mood}"]
[params]
who = { type = "choice", choices = ["sword_saint"] }
light = { type = "choice", choices = ["dim"], phrases = { dim = "faint (light:0.8)" } }
ornate = { type = "boolean", phrases = { true = "ornate", false = "" } }
moons = { type = "integer", minimum = 0 }
scale = { type = "number" }
mood = { type = "prompt", weights = true, embeddings = ["calm"] }
"""
    )
    scene = workflows.load(write(tmp_path, toml=toml, graph=LOADER))["swatch"]

    def text(**params: object) -> str:
        return str(rendered(scene, params)["2"]["inputs"]["text"])

    said = {"who": "sword_saint", "moons": 0, "light": "dim", "ornate": True, "scale": 2}
    assert text(**said) == "sword saint {and} {0}, faint (light:0.8), ornate, 2 wide"
    assert (
        text(ornate=False, scale=0.5, mood="(a:1.5), embedding:calm") == "0.5 wide, (a:1.5), embedding:calm"
    )
    assert text() == ""


def test_a_client_cannot_name_another_param_in_its_text() -> None:
    text = rendered(BUILT_IN["npc_bust"], {"prompt": "{seed} {style}"})["6"]["inputs"]["text"]
    assert "{seed} {style}" in text


# Model files


def test_model_files_are_the_operators_choice() -> None:
    chosen = workflows.load(models={"checkpoint": "a.safetensors", "ui_icon.checkpoint": "b.safetensors"})
    assert chosen["npc_bust"].graph["4"]["inputs"]["ckpt_name"] == "a.safetensors"
    assert chosen["ui_icon"].graph["4"]["inputs"]["ckpt_name"] == "b.safetensors"
    assert chosen["ui_icon"].version != BUILT_IN["ui_icon"].version != WITH_LORA["ui_icon"].version


def test_without_a_lora_its_node_is_gone_and_nothing_misses_it() -> None:
    graph = BUILT_IN["npc_bust"].graph
    assert "10" not in graph
    assert graph["3"]["inputs"]["model"] == ["4", 0]
    assert graph["6"]["inputs"]["clip"] == graph["7"]["inputs"]["clip"] == ["4", 1]
    lora = WITH_LORA["npc_bust"].graph["10"]["inputs"]
    assert (lora["lora_name"], lora["strength_model"], lora["strength_clip"]) == ("ink.safetensors", 0.6, 0.6)


def test_a_model_without_strength_takes_the_whole_name() -> None:
    chosen = workflows.load(models={"checkpoint": "a@0.5"})["npc_bust"]
    assert chosen.graph["4"]["inputs"]["ckpt_name"] == "a@0.5"


@pytest.mark.parametrize("chosen", ["ink.safetensors", "ink@night.safetensors", "ink.safetensors@nan"])
def test_what_is_no_strength_belongs_to_the_file_name(chosen: str) -> None:
    lora = workflows.load(models={"lora": chosen})["npc_bust"].graph["10"]["inputs"]
    assert (lora["lora_name"], lora["strength_model"]) == (chosen, 0.8)


def test_a_misspelt_model_is_refused() -> None:
    with pytest.raises(WorkflowInvalid, match="no job type has a model chekpoint; did you mean checkpoint"):
        workflows.load(models={"chekpoint": "a.safetensors"})


def test_no_param_of_a_built_in_reaches_a_model_file() -> None:
    for workflow in WITH_LORA.values():
        targets = {target for param in workflow.params.values() for target in param.targets}
        assert not targets & {"4.ckpt_name", "10.lora_name"}


def test_a_model_without_default_must_be_chosen(tmp_path: Path) -> None:
    graph = SWATCH_GRAPH.replace('"color": 0', '"color": 0, "ckpt_name": "x"')
    write(tmp_path, toml=SWATCH + '[models.base]\ntargets = ["1.ckpt_name"]\n', graph=graph)
    assert refusals(tmp_path) == ["swatch.toml:11: no file is chosen for the model base"]
    assert workflows.load(tmp_path, models={"base": "y"})["swatch"].graph["1"]["inputs"]["ckpt_name"] == "y"


# An operator's own job types


def test_the_example_of_the_contract_works(tmp_path: Path) -> None:
    swatch = workflows.load(write(tmp_path))["swatch"]
    assert (swatch.asset_type, swatch.timeout_seconds, swatch.outputs) == ("ui_icon", 30.0, ("2",))
    assert rendered(swatch, {"color": 255}) == {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255},
        },
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": "forge/job/1/img"},
        },
    }


def test_the_example_of_the_docs_works(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "JOB_TYPES.md").read_text(encoding="utf-8")
    block = dict(re.findall(r"```(\w+)\n(.*?)```", docs, re.DOTALL)[:3])
    seal = workflows.load(write(tmp_path, "seal", block["toml"], block["json"]))["seal"]
    resolved = resolve(seal.params, {"details": "three small clouds (white)", "seed": 7}, entropy=1)
    graph = workflows.render(seal, resolved, filename_prefix="x")
    assert graph["2"]["inputs"]["text"] == block["text"].strip()
    assert graph["5"]["inputs"]["seed"] == 7
    assert workflows.labels(seal, resolved) == {
        "category": "seal",
        "archetype_id": None,
        "variant_key": None,
    }
    wrong = block["toml"].replace("4.batch_size", "4.batch")
    (line,) = refusals(write(tmp_path, "seal", wrong, block["json"]))
    assert line in docs


def test_the_docs_name_every_key() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "JOB_TYPES.md").read_text(encoding="utf-8")
    keys = {name for shape in (Definition, Model, Param) for name in shape.__struct_fields__}
    assert {key for key in keys if f"`{key}`" not in docs} == {"params", "compose", "labels", "models"}


def test_it_is_in_the_catalogue_beside_the_built_in_ones(tmp_path: Path) -> None:
    entries = {entry.job_type: entry for entry in workflows.catalogue(workflows.load(write(tmp_path)))}
    assert sorted(entries) == ["character_portrait", "fate_card", "npc_bust", "swatch", "ui_icon"]
    assert entries["swatch"].asset_type == "ui_icon"
    assert entries["swatch"].params["properties"]["color"]["maximum"] == 16777215


def test_a_param_without_default_leaves_the_graphs_own_value(tmp_path: Path) -> None:
    swatch = workflows.load(write(tmp_path, toml=SWATCH.replace("default = 0\n", "")))["swatch"]
    assert rendered(swatch, {})["1"]["inputs"]["color"] == 0
    assert rendered(swatch, {"color": 9})["1"]["inputs"]["color"] == 9


def test_rendering_leaves_the_workflow_as_it_was(tmp_path: Path) -> None:
    swatch = workflows.load(write(tmp_path))["swatch"]
    before = copy.deepcopy(swatch.graph)
    rendered(swatch, {"color": 255})["1"]["inputs"]["width"] = 1
    assert swatch.graph == before


def test_the_version_follows_the_content_and_not_its_form(tmp_path: Path) -> None:
    version = workflows.load(write(tmp_path))["swatch"].version
    assert re.fullmatch("[0-9a-f]{16}", version)
    plain = json.dumps(dict(reversed(json.loads(SWATCH_GRAPH).items())))
    write(tmp_path, toml=SWATCH.replace("# node.input, one or more", ""), graph=plain)
    assert workflows.load(tmp_path)["swatch"].version == version
    write(tmp_path, graph=SWATCH_GRAPH.replace('"width": 64', '"width": 65'))
    assert workflows.load(tmp_path)["swatch"].version != version


def test_nodes_that_no_output_needs_are_dropped(tmp_path: Path) -> None:
    extra = ',\n  "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}\n}\n'
    graph = SWATCH_GRAPH.rstrip().removesuffix("}").rstrip() + extra
    assert sorted(workflows.load(write(tmp_path, graph=graph))["swatch"].graph) == ["1", "2"]


def test_every_saving_node_gets_the_prefix(tmp_path: Path) -> None:
    graph = json.loads(SWATCH_GRAPH)
    graph["3"] = {"class_type": "SaveAnimatedWEBP", "inputs": {"images": ["1", 0], "filename_prefix": "mine"}}
    graph["4"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}
    toml = SWATCH.replace('["2"]', '["2", "3", "4"]')
    saved = rendered(workflows.load(write(tmp_path, toml=toml, graph=json.dumps(graph)))["swatch"], {})
    assert {saved[node]["inputs"]["filename_prefix"] for node in "234"} == {"forge/job/1/img"}


def test_an_uploaded_picture_stands_under_its_name_at_comfyui(tmp_path: Path) -> None:
    graph = json.loads(SWATCH_GRAPH)
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
    toml = SWATCH[: SWATCH.index("[params")] + '[params.face]\ntype = "image"\ntargets = ["1.image"]\n'
    portrait = workflows.load(write(tmp_path, toml=toml, graph=json.dumps(graph)))["swatch"]
    upload = "0199c0de-0000-7000-8000-00000000abcd"
    resolved = resolve(portrait.params, {"face": upload}, entropy=1)
    assert workflows.uploads(portrait, resolved) == {"face": upload}
    posted = workflows.render(portrait, resolved, filename_prefix="x", images={"face": "forge/face (1).png"})
    assert posted["1"]["inputs"]["image"] == "forge/face (1).png"
    assert workflows.uploads(portrait, {}) == {}


def test_a_windows_editor_may_have_written_the_files(tmp_path: Path) -> None:
    write(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert "swatch" in workflows.load(tmp_path)


# Refused, with file, line and reason


def test_a_missing_target_is_refused_with_file_line_and_reason(tmp_path: Path) -> None:
    write(tmp_path, toml=SWATCH.replace("1.color", "1.colour"))
    assert refusals(tmp_path) == [
        "swatch.toml:10: node 1 (EmptyImage) has no input colour; did you mean color?"
    ]


def changed(*changes: tuple[str, str]) -> str:
    toml = SWATCH
    for old, new in changes:
        assert old in toml
        toml = toml.replace(old, new)
    return toml


PARAM = SWATCH[SWATCH.index("[params") :]


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        (SWATCH.replace("= 30", "= = 30"), "3: Invalid value"),
        (SWATCH + "[params.x", "11: Expected"),
        (SWATCH + "[params.color]", "11: Cannot declare"),
        (changed(('asset_type = "ui_icon"', "")), "1: asset_type is missing"),
        (changed(('"ui_icon"', '"UI icon"')), "1: asset_type must be lower-case"),
        (changed(("= 30", "= 0")), "3: timeout_seconds must be above 0"),
        (changed(("= 30", '= "30"')), "3: timeout_seconds: expected `float`, got `str`"),
        (changed(("= 30", "= inf")), "3: timeout_seconds must be above 0"),
        (changed(('["2"]', "[]")), "4: outputs must name at least one node"),
        (changed(('["2"]', '["9"]')), "4: the graph has no node 9"),
        (changed(('["2"]', "[2]")), "4: outputs: expected `str`, got `int`"),
        (changed(("outputs", "outputz")), "4: there is no key outputz; did you mean outputs?"),
        (changed(("minimum", "minimun")), "7: there is no key minimun; did you mean minimum?"),
        (changed(('"integer"', '"int"')), "6: type: invalid enum value 'int'"),
        (changed(("params.color", 'params."a b"')), "5: a param's name is letters"),
        (changed(("default = 0", "default = true")), "9: must be a whole number"),
        (changed(("default = 0", "default = -1")), "9: must be from 0 to 16777215"),
        (changed(("default = 0", "default = nan")), "9: must be a whole number"),
        (changed(("minimum = 0", "minimum = 16777216")), "7: minimum is above maximum"),
        (changed(("minimum = 0", "minimum = 0.5")), "7: minimum must be a whole number"),
        (changed(("16777215", "18446744073709551615")), "8: maximum must be from"),
        (changed(("minimum = 0", "step = 0")), "7: step must be above 0"),
        (changed(("minimum = 0", 'choices = ["a"]')), "7: choices has no meaning for type integer"),
        (changed(("default = 0", "default = 0\nrequired = true")), "10: a required param has no use"),
        (changed(("1.color", "1")), "10: 1 is not node.input"),
        (changed(("1.color", "7.color")), "10: the graph has no node 7"),
        (changed(("1.color", "2.images")), "10: node 2 (SaveImage) takes images from node 1"),
        (changed(("1.color", "2.filename_prefix")), "10: forge sets filename_prefix itself"),
        (changed(('["1.color"]', '["1.color", "1.color"]')), "10: 1.color is set twice"),
        (changed(('targets = ["1.color"]', "")), "5: color goes nowhere"),
        (SWATCH + '[params.text]\ntype = "prompt"\ntargets = ["1.color"]\n', "13: node 1 (EmptyImage) has 0"),
        (SWATCH + '[params.on]\ntype = "boolean"\ntargets = ["1.width"]\n', "13: node 1 (EmptyImage) has 64"),
        (SWATCH + '[params.e]\ntype = "choice"\n', "11: choices must be at least one"),
        (SWATCH + '[params.e]\ntype = "choice"\nchoices = ["a", "a"]\n', "13: choices must be at least one"),
        (
            SWATCH + '[params.e]\ntype = "choice"\nchoices = ["a"]\nphrases = { b = "x" }\n',
            "14: phrases has b, which is no choice",
        ),
        (
            SWATCH + '[params.p]\ntype = "prompt"\nmax_length = 2001\n',
            "13: max_length must be from 1 to 2000",
        ),
        (SWATCH + '[labels]\ncolour = "{color}"\n', "12: a label is one of"),
        (SWATCH + '[labels]\ncategory = "{colour}"\n', "12: there is no param colour; did you mean color?"),
        (SWATCH + '[labels]\ncategory = "{color"\n', "12: a brace that is not around"),
        (SWATCH + '[params.p]\ntype = "prompt"\n[labels]\ncategory = "{p}"\n', "14: p is of type prompt"),
        (SWATCH + '[compose]\n"1.color" = "x"\n', "12: node 1 (EmptyImage) has 0"),
        (SWATCH + '[compose]\n"7.text" = "x"\n', "12: the graph has no node 7"),
        ("pictures = 0\n" + SWATCH, "1: pictures must be from 1"),
        ('pictures = "colour"\n' + SWATCH, "1: there is no param colour of type integer"),
        ('pictures = "color"\n' + SWATCH, "1: color must be bounded from 1"),
        (
            'pictures = "n"\n' + SWATCH + '[params.n]\ntype = "integer"\nminimum = 1\nmaximum = 4\n',
            "1: n needs a default",
        ),
        ("estimated_bytes = 0\n" + SWATCH, "1: estimated_bytes must be above 0"),
        ("params = 3\n" + SWATCH[: SWATCH.index("[params")], "1: must be a table"),
        (SWATCH[: SWATCH.index("[params")] + "[params]\ncolor = 3\n", "6: must be a table, [params.color]"),
        (SWATCH + '[models.m]\ntargets = ["1.color"]\n', "12: node 1 (EmptyImage) has 0"),
    ],
)
def test_a_wrong_toml_is_refused_with_its_line(tmp_path: Path, toml: str, expected: str) -> None:
    found = refusals(write(tmp_path, toml=toml))
    assert any(problem.startswith(f"swatch.toml:{expected}") for problem in found), found


LOADER = """\
{
  "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x", "strength": 1}},
  "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1], "path": "x"}},
  "3": {"class_type": "LoadImage", "inputs": {"image": "x.png"}},
  "4": {"class_type": "SaveImage", "inputs": {"a": ["2", 0], "b": ["3", 0], "filename_prefix": "x"}},
  "5": {"class_type": "SaveImage", "inputs": {"a": ["2", 0], "filename_prefix": "x"}}
}
"""
BOOLEAN = LOADER.replace('"strength": 1', '"strength": true')
LOADER_TOP = 'asset_type = "a"\ndescription = "b"\ntimeout_seconds = 1\noutputs = ["4"]\n'


@pytest.mark.parametrize("kind", ["string", "prompt", "image"])
@pytest.mark.parametrize("target", ["1.ckpt_name", "2.path", "3.image"])
def test_free_text_never_reaches_a_file(tmp_path: Path, kind: str, target: str) -> None:
    toml = f'{LOADER_TOP}[params.p]\ntype = "{kind}"\ntargets = ["{target}"]\n'
    write(tmp_path, toml=toml, graph=LOADER)
    if (kind, target) == ("image", "3.image"):
        workflows.load(tmp_path)
    else:
        assert "must not reach" in refusals(tmp_path)[0]


@pytest.mark.parametrize(
    ("pattern", "fine"),
    [
        ("{p}", True),
        ("a {p}, b", True),
        ("({p}:1.2)", True),
        ("{p}.", True),
        ("{p}{q}", False),
        ("embedd{p}", False),
        ("{p}:x", False),
        ("{p}-", False),
        ("{{{p}", False),
        ("{{ {p} }}", True),
    ],
)
def test_free_text_stands_alone_in_a_pattern(tmp_path: Path, pattern: str, fine: bool) -> None:
    toml = f'{LOADER_TOP}[compose]\n"2.text" = ["{pattern}"]\n'
    for name in "pq":
        toml += f'[params.{name}]\ntype = "prompt"\n'
    write(tmp_path, toml=toml + '[labels]\ncategory = "x"\n', graph=LOADER)
    found = [problem for problem in refusals(tmp_path, unknown="x") if "q goes nowhere" not in problem]
    assert (not any("free text" in problem for problem in found)) is fine, found


def test_all_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        toml=changed(("= 30", "= 0"), ('"integer"', '"int"'), ("1.color", "1.x"), ('["2"]', '["9"]')),
    )
    write(tmp_path, "other", graph='{"1": {}, "2": {"class_type": "SaveImage"}}')
    write(tmp_path, "npc_bust")
    write(tmp_path, "Bad name")
    (tmp_path / "lonely.toml").write_text("")
    (tmp_path / "README.md").write_text("not a job type")
    found = refusals(tmp_path)
    assert [problem.split(" ")[0] for problem in found if "Bad" not in problem] == [
        "lonely.toml:1:",
        "npc_bust.json:1:",
        "other.json:1:",
        "other.json:1:",
        "other.json:1:",
        "swatch.toml:6:",
        "swatch.toml:3:",
        "swatch.toml:4:",
    ]
    assert any("Bad name.json:1: a job type's name" in problem for problem in found)
    assert "npc_bust is built in" in "".join(found)


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ("", "1: Expecting value"),
        ("{\n\n,}", "3: Expecting property name"),
        ("[]", "1: must be an object"),
        ("{}", "1: must be an object"),
        ('{"nodes": [], "links": []}', "1: is a saved workflow; export it"),
        (SWATCH_GRAPH.replace('"2": {', '"1": {'), '6: "1" is there twice'),
        (SWATCH_GRAPH.replace("64,", "NaN,"), "1: NaN is not a number"),
        (SWATCH_GRAPH.replace("64,", "1e999,"), "2: node 1 input width is a number too large"),
        (SWATCH_GRAPH.replace('["1", 0]', '["7", 0]'), '6: node 2 input images is linked to ["7", 0]'),
        (SWATCH_GRAPH.replace('["1", 0]', '["1", -1]'), "6: node 2 input images is linked"),
        (SWATCH_GRAPH.replace('["1", 0]', '["1", true]'), "6: node 2 input images is linked"),
        (SWATCH_GRAPH.replace('["1", 0]', '["1"]'), "6: node 2 input images is linked"),
        (SWATCH_GRAPH.replace('["1", 0]', '{"a": 1}'), "6: node 2 input images is an object"),
        (SWATCH_GRAPH.replace('"color": 0', '"color": ["2", 0]'), "2: node 1 depends on itself"),
        (SWATCH_GRAPH.replace('"class_type": "EmptyImage",', ""), "2: node 1 has no class_type"),
        (
            SWATCH_GRAPH.replace("{", '{"99": {"class_type": "ImageInvert"},', 1),
            "1: node 99 has no inputs object",
        ),
        (
            SWATCH_GRAPH.replace("{", '{"99": {"class_type": "A", "inputs": null},', 1),
            "1: node 99 has no inputs",
        ),
        (SWATCH_GRAPH.replace("{", '{"_meta": 5,', 1), "1: node _meta must be an object"),
        ("[" * 100_000, "1: "),
    ],
)
def test_a_graph_that_would_hurt_comfyui_is_refused(tmp_path: Path, graph: str, expected: str) -> None:
    found = refusals(write(tmp_path, graph=graph))
    assert any(problem.startswith(f"swatch.json:{expected}") for problem in found), found


def test_a_target_that_nothing_needs_or_that_may_vanish_is_refused(tmp_path: Path) -> None:
    top = LOADER_TOP.replace('"4"', '"5"')
    model = '[models.m]\ntargets = ["1.ckpt_name"]\nbypass_node = "{}"\nbypass_inputs = {}\n'
    param = '[params.s]\ntype = "number"\ntargets = ["1.strength"]\n'
    write(
        tmp_path,
        toml=top + '[params.p]\ntype = "choice"\nchoices = ["a"]\ntargets = ["3.image"]\n',
        graph=LOADER,
    )
    assert refusals(tmp_path) == ["swatch.toml:8: no output depends on node 3"]
    write(tmp_path, toml=top + model.format("1", '["ckpt_name"]') + param, graph=LOADER)
    assert refusals(tmp_path) == [
        "swatch.toml:11: node 1 is not always there: a model's bypass takes it out",
        "swatch.toml:7: input ckpt_name of node 1 comes from no other node",
        "swatch.toml:7: bypass_inputs says nothing about output 1 of that node",
    ]
    write(tmp_path, toml=top + model.format("9", "[]"), graph=LOADER)
    assert refusals(tmp_path) == ["swatch.toml:7: the graph has no node 9"]


def test_a_number_does_not_replace_a_switch(tmp_path: Path) -> None:
    param = '[params.s]\ntype = "number"\ntargets = ["1.strength"]\n'
    write(tmp_path, toml=LOADER_TOP + param, graph=BOOLEAN)
    assert refusals(tmp_path) == [
        "swatch.toml:7: node 1 (CheckpointLoaderSimple) has True for strength, which no number replaces"
    ]


def test_a_missing_directory_and_unreadable_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkflowInvalid, match="is not a directory"):
        workflows.load(tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "swatch.toml").write_bytes(b"\xff\xfe")
    assert refusals(tmp_path)[0].startswith("swatch.toml:1: cannot be read")


def rewrite_golden() -> None:
    """Accept what is posted now; the difference is there for all to read in the commit."""
    for name, workflow in BUILT_IN.items():
        _accept(name, workflow)
    _accept("npc_bust_with_lora", WITH_LORA["npc_bust"])


def _accept(name: str, workflow: Workflow) -> None:
    text = json.dumps(rendered(workflow, {"prompt": PROMPT, "seed": 7}), indent=2)
    (GOLDEN / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    rewrite_golden()


def test_a_default_has_the_form_that_a_request_for_it_would_have(tmp_path: Path) -> None:
    toml = SWATCH.replace('type = "integer"', 'type = "number"').replace("default = 0\n", "default = 7\n")
    swatch = workflows.load(write(tmp_path, toml=toml))["swatch"]
    assert repr(swatch.params["color"].default) == "7.0"
