"""Typed params: everything strict, every error at once, the same result for the same request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.domain.params import SAFE, Param, resolve, schema, settled
from forge.errors import Invalid

ONE_OF_EACH = {
    "count": Param(type="integer", minimum=1, maximum=4, default=1),
    "width": Param(type="integer", minimum=256, maximum=1024, step=8, default=512),
    "cfg": Param(type="number", minimum=1, maximum=20, default=7),
    "name": Param(type="string", max_length=20),
    "prompt": Param(type="prompt", max_length=100),
    "tiled": Param(type="boolean", default=False),
    "element": Param(type="choice", choices=("fire", "water"), default="fire"),
    "seed": Param(type="seed"),
    "reference": Param(type="image"),
}
UPLOAD = "0199c0de-0000-7000-8000-00000000abcd"

any_char = st.integers(0, 0x10FFFF).map(chr)
any_json = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["fire", "mei", "a crane", UPLOAD]),
    st.text(any_char),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from("ab"), st.integers(), max_size=2),
)


def refusals(params: dict[str, Param], values: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(Invalid) as caught:
        resolve(params, values, entropy=1)
    return {error.field: error.message for error in caught.value.errors}


def test_what_is_left_out_is_filled_in() -> None:
    resolved = resolve(ONE_OF_EACH, {}, entropy=7)
    seed = resolved.pop("seed")
    assert resolved == {"count": 1, "width": 512, "cfg": 7.0, "tiled": False, "element": "fire"}
    assert isinstance(seed, int)
    assert 0 <= seed <= SAFE


def test_null_is_left_out() -> None:
    assert resolve(ONE_OF_EACH, dict.fromkeys(ONE_OF_EACH), entropy=7) == resolve(ONE_OF_EACH, {}, entropy=7)


def test_what_is_given_is_kept() -> None:
    given_values = {
        "count": 4,
        "width": 1024,
        "cfg": 1.5,
        "name": "mei",
        "prompt": "a crane",
        "tiled": True,
        "element": "water",
        "seed": SAFE,
        "reference": UPLOAD,
    }
    assert resolve(ONE_OF_EACH, given_values, entropy=7) == given_values


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("count", True, "whole number"),
        ("count", 2.0, "whole number"),
        ("count", "2", "whole number"),
        ("count", 0, "from 1 to 4"),
        ("count", 5, "from 1 to 4"),
        ("count", 10**400, "from 1 to 4"),
        ("count", [1], "whole number"),
        ("width", 257, "multiple of 8"),
        ("cfg", True, "a number"),
        ("cfg", "7", "a number"),
        ("cfg", float("nan"), "from 1 to 20"),
        ("cfg", float("inf"), "from 1 to 20"),
        ("cfg", 10**400, "from 1 to 20"),
        ("cfg", 0.99, "from 1 to 20"),
        ("name", 5, "text"),
        ("name", "a\0b", "U+0000"),
        ("name", "a\ud800", "U+D800"),
        ("name", "a\nb", "single line"),
        ("name", "a\tb", "single line"),
        ("name", "x" * 21, "at most 20"),
        ("prompt", ["a"], "text"),
        ("prompt", "a\0b", "U+0000"),
        ("prompt", "x" * 101, "at most 100"),
        ("prompt", "embedding:evil", "embedding"),
        ("tiled", 1, "true or false"),
        ("tiled", "true", "true or false"),
        ("element", "earth", "one of fire, water"),
        ("element", ["fire"], "one of fire, water"),
        ("seed", -1, f"from 0 to {SAFE}"),
        ("seed", SAFE + 1, f"from 0 to {SAFE}"),
        ("seed", True, "whole number"),
        ("reference", "x.png", "uploaded"),
        ("reference", UPLOAD.upper(), "uploaded"),
        ("reference", UPLOAD + "\n", "uploaded"),
        ("reference", 7, "uploaded"),
    ],
)
def test_refused(name: str, value: object, why: str) -> None:
    refused = refusals(ONE_OF_EACH, {name: value})
    assert set(refused) == {f"params.{name}"}
    assert why in refused[f"params.{name}"]


def test_every_wrong_field_is_named_at_once() -> None:
    assert set(
        refusals(ONE_OF_EACH, {"count": 9, "cfg": "x", "prompt": "{{", "elment": "fire", "zzz": 1})
    ) == {
        "params.count",
        "params.cfg",
        "params.prompt",
        "params.elment",
        "params.zzz",
    }


def test_a_misspelt_name_is_recognised() -> None:
    refused = refusals(ONE_OF_EACH, {"elment": "fire", "zzz": 1})
    assert refused["params.elment"].endswith("did you mean element?")
    assert refused["params.zzz"] == "there is no such param"


def test_hostile_names_give_a_short_answer() -> None:
    refused = refusals(ONE_OF_EACH, {f"{n}\ud800" + "x" * 60_000: 1 for n in range(100)})
    assert len(refused) == 20
    assert all(len(field.encode()) < 100 for field in refused)


def test_a_required_param_must_be_there() -> None:
    required = {"prompt": Param(type="prompt", required=True), "name": Param(type="string", required=True)}
    assert refusals(required, {"prompt": None}) == {
        "params.prompt": "is required",
        "params.name": "is required",
    }
    assert refusals(required, {"prompt": " ", "name": ""}) == {
        "params.prompt": "must not be empty",
        "params.name": "must not be empty",
    }


def test_an_optional_text_may_be_empty() -> None:
    emptied = resolve({"negative": Param(type="prompt", default="blurry")}, {"negative": " "}, entropy=1)
    assert emptied == {"negative": ""}


def test_prompts_are_cleaned_and_keep_what_the_operator_allows() -> None:
    params = {"plain": Param(type="prompt"), "free": Param(type="prompt", weights=True, embeddings=("good",))}
    assert resolve(params, {"plain": " (a) ", "free": "(a:1.2) embedding:good"}, entropy=1) == {
        "plain": r"\(a\)",
        "free": "(a:1.2) embedding:good",
    }


def test_equal_numbers_are_one_number() -> None:
    cfg = {"cfg": Param(type="number")}
    assert json.dumps(resolve(cfg, {"cfg": 7}, entropy=1)) == json.dumps(
        resolve(cfg, {"cfg": 7.0}, entropy=1)
    )
    assert json.dumps(resolve(cfg, {"cfg": -0.0}, entropy=1)) == '{"cfg": 0.0}'


@settings(deadline=None)
@given(entropy=st.integers())
def test_a_drawn_seed_is_within_its_bounds_and_repeats(entropy: int) -> None:
    params = {"a": Param(type="seed", minimum=5, maximum=7), "b": Param(type="seed")}
    drawn = resolve(params, {}, entropy=entropy)
    assert drawn == resolve(params, {}, entropy=entropy)
    assert 5 <= drawn["a"] <= 7  # type: ignore[operator]
    assert 0 <= drawn["b"] <= SAFE  # type: ignore[operator]


def test_drawn_seeds_differ_by_name_and_by_entropy() -> None:
    params = {"a": Param(type="seed"), "b": Param(type="seed")}
    drawn = [seed for entropy in range(20) for seed in resolve(params, {}, entropy=entropy).values()]
    assert len(set(drawn)) == 40


@settings(deadline=None)
@given(values=st.dictionaries(st.sampled_from([*ONE_OF_EACH, "other"]), any_json))
def test_a_refusal_names_just_what_is_wrong_and_resolving_again_changes_nothing(
    values: dict[str, Any],
) -> None:
    try:
        resolved = resolve(ONE_OF_EACH, values, entropy=3)
    except Invalid as refusal:
        named = {error.field for error in refusal.errors}
        resolved = resolve(
            ONE_OF_EACH, {k: v for k, v in values.items() if f"params.{k}" not in named}, entropy=3
        )
    json.dumps(resolved, allow_nan=False)
    assert resolve(ONE_OF_EACH, resolved, entropy=4) == resolved


def test_schema() -> None:
    described = schema(
        {**ONE_OF_EACH, "title": Param(type="prompt", required=True, description="What to draw.")}
    )
    assert described["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert described["additionalProperties"] is False
    assert described["required"] == ["title"]
    assert described["properties"]["title"] == {
        "title": "Title",
        "description": "What to draw.",
        "x-forge-type": "prompt",
        "type": "string",
        "minLength": 1,
        "maxLength": 2000,
        "examples": ["a crane above the clouds"],
    }
    assert described["properties"]["width"] == {
        "title": "Width",
        "x-forge-type": "integer",
        "type": "integer",
        "minimum": 256,
        "maximum": 1024,
        "multipleOf": 8,
        "default": 512,
        "examples": [512],
    }
    assert described["properties"]["element"]["enum"] == ["fire", "water"]
    assert described["properties"]["seed"]["type"] == ["integer", "null"]


def test_every_example_of_the_schema_is_accepted() -> None:
    examples = {name: shape["examples"][0] for name, shape in schema(ONE_OF_EACH)["properties"].items()}
    assert set(resolve(ONE_OF_EACH, examples, entropy=1)) == set(ONE_OF_EACH)


@pytest.mark.parametrize(
    ("param", "default"),
    [
        (Param(type="number", default=7), 7.0),
        (Param(type="prompt", default=" blurry (hands) "), "blurry \\(hands\\)"),
        (Param(type="integer"), None),
    ],
)
def test_a_settled_default_is_what_asking_for_it_gives(param: Param, default: object) -> None:
    left_out = resolve({"it": settled("it", param)}, {}, entropy=1)
    assert repr(left_out.get("it")) == repr(default)
    if default is not None:
        assert resolve({"it": param}, {"it": param.default}, entropy=1) == left_out


def test_a_default_that_is_refused_cannot_be_settled() -> None:
    with pytest.raises(Invalid, match="from 0 to 3"):
        settled("it", Param(type="integer", minimum=0, maximum=3, default=4))
