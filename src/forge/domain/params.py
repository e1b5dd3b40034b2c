"""What a job type asks for: its typed params, what they accept, and how they look to a client.

Definitions come from a job type's file, values from a request. What leaves :func:`resolve` is complete,
bounded and plain, so that the same resolved params always make the same graph.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from forge.domain import prompts
from forge.errors import FieldError, Invalid

Kind = Literal["integer", "number", "string", "prompt", "boolean", "choice", "seed", "image"]
Scalar = bool | int | float | str

# ComfyUI takes seeds up to 2^64-1, but a browser reads every JSON number as a double: past 2^53-1 the seed
# it shows, copies and sends back would be another one. Numbers without a bound of their own get this one too.
SAFE = 2**53 - 1
STRING_LENGTH = 200

_UPLOAD_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UNKNOWN_SHOWN = 20


class Param(msgspec.Struct, frozen=True, kw_only=True):
    """One thing a client may set, and the places of the graph it goes to."""

    type: Kind
    description: str = ""
    minimum: int | float | None = None
    maximum: int | float | None = None
    step: int | None = None
    default: Scalar | None = None
    example: Scalar | None = None
    choices: tuple[str, ...] = ()
    phrases: dict[str, str] = {}
    max_length: int | None = None
    required: bool = False
    weights: bool = False
    embeddings: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


def resolve(params: Mapping[str, Param], given: Mapping[str, object], *, entropy: int) -> dict[str, object]:
    """Check what a client sent and fill in what it left out.

    Null counts as left out. A seed left out is drawn from `entropy`; any other param without a default stays
    out of the result, and the graph keeps its own value there. Resolving a result again gives the same, where
    the defaults are :func:`settled`.

    Raises:
        Invalid: names every field that is wrong as `params.NAME`.
    """
    errors = list(_unknown(params, given))
    resolved: dict[str, object] = {}
    for name, param in params.items():
        try:
            value = _value(name, param, given.get(name), entropy)
        except Invalid as refusal:
            errors += refusal.errors
        else:
            if value is not None:
                resolved[name] = value
    if errors:
        raise Invalid(errors)
    return resolved


def settled(name: str, param: Param) -> Param:
    """The param with its default in the one form that :func:`check` gives it, so that no request has to.

    Raises:
        Invalid: it does not accept its own default.
    """
    if param.default is None:
        return param
    return msgspec.structs.replace(param, default=check(name, param, param.default))


def check(name: str, param: Param, value: object) -> Scalar:
    """The one form of a value that the param accepts.

    Raises:
        Invalid: says what is wrong with `params.NAME`.
    """
    match param.type:
        case "integer" | "seed" | "number":
            return _number(name, param, value)
        case "prompt" | "string":
            return _text(name, param, value)
        case "boolean":
            return _boolean(name, value)
        case "choice":
            return _choice(name, param, value)
        case "image":
            return _image(name, value)


def bounds(param: Param) -> tuple[int | float, int | float]:
    """The smallest and the largest number the param accepts."""
    lowest = 0 if param.type == "seed" else -SAFE
    return (
        lowest if param.minimum is None else param.minimum,
        SAFE if param.maximum is None else param.maximum,
    )


def length(param: Param) -> int:
    """How many characters the param accepts."""
    if param.max_length is not None:
        return param.max_length
    return prompts.MAX_LENGTH if param.type == "prompt" else STRING_LENGTH


def schema(params: Mapping[str, Param]) -> dict[str, Any]:
    """The params as JSON Schema 2020-12; `x-forge-type` tells a form which kind of field each one is."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {name: _property(name, param) for name, param in params.items()},
        "required": [name for name, param in params.items() if param.required],
        "additionalProperties": False,
    }


def _unknown(params: Mapping[str, Param], given: Mapping[str, object]) -> Iterator[FieldError]:
    unknown = [name for name in given if name not in params]
    for name in unknown[:_UNKNOWN_SHOWN]:
        shown = name[:64].encode("utf-8", "replace").decode("utf-8")
        close = difflib.get_close_matches(shown, params, n=1)
        message = "there is no such param"
        yield FieldError(f"params.{shown}", f"{message}; did you mean {close[0]}?" if close else message)


def _value(name: str, param: Param, given: object, entropy: int) -> Scalar | None:
    if given is not None:
        return check(name, param, given)
    if param.required:
        raise _wrong(name, "is required")
    if param.type == "seed":
        return _drawn(name, param, entropy)
    return param.default


def _drawn(name: str, param: Param, entropy: int) -> int:
    """A seed between the bounds; two seed params of one job get different ones."""
    lowest, highest = (int(bound) for bound in bounds(param))
    digest = hashlib.sha256(f"{entropy}:{name}".encode()).digest()
    return lowest + int.from_bytes(digest) % (highest - lowest + 1)


def _wrong(name: str, message: str) -> Invalid:
    return Invalid([FieldError(f"params.{name}", message)])


def _number(name: str, param: Param, value: object) -> int | float:
    whole = param.type != "number"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise _wrong(name, "must be a whole number" if whole else "must be a number")
    lowest, highest = bounds(param)
    if not lowest <= value <= highest:  # no NaN is
        raise _wrong(name, f"must be from {lowest} to {highest}")
    if param.step and value % param.step:
        raise _wrong(name, f"must be a multiple of {param.step}")
    # One form for equal values, so that 7 and 7.0, 0.0 and -0.0 are the same picture to the cache.
    return value if whole else float(value) + 0.0


def _text(name: str, param: Param, value: object) -> str:
    field = f"params.{name}"
    if not isinstance(value, str):
        raise _wrong(name, "must be text")
    if param.type == "string":
        text = prompts.plain(value, max_length=length(param), field=field)
        if "\n" in text or "\t" in text:
            raise _wrong(name, "must be a single line without tabs")
    elif not value.strip():
        text = ""
    else:
        names = frozenset(param.embeddings)
        text = prompts.clean(
            value, embeddings=names, allow_weights=param.weights, max_length=length(param), field=field
        )
    if param.required and not text:
        raise _wrong(name, "must not be empty")
    return text


def _boolean(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise _wrong(name, "must be true or false")


def _choice(name: str, param: Param, value: object) -> str:
    if isinstance(value, str) and value in param.choices:
        return value
    raise _wrong(name, f"must be one of {', '.join(param.choices)}")


def _image(name: str, value: object) -> str:
    if isinstance(value, str) and _UPLOAD_ID.fullmatch(value):
        return value
    raise _wrong(name, "must be the id of an uploaded picture")


def _property(name: str, param: Param) -> dict[str, Any]:
    shape: dict[str, Any] = {"title": name.replace("_", " ").capitalize(), "x-forge-type": param.type}
    if param.description:
        shape["description"] = param.description
    json_type = {"integer": "integer", "seed": "integer", "number": "number", "boolean": "boolean"}.get(
        param.type, "string"
    )
    # Null is what a form sends for an empty field; where there is a default, the form shows that instead.
    nullable = not param.required and param.default is None
    shape["type"] = [json_type, "null"] if nullable else json_type
    shape |= _limits(param, nullable)
    if param.default is not None:
        shape["default"] = param.default
    shape["examples"] = [_example(param)]
    return shape


def _limits(param: Param, nullable: bool) -> dict[str, Any]:
    match param.type:
        case "integer" | "seed" | "number":
            lowest, highest = bounds(param)
            step = {"multipleOf": param.step} if param.step else {}
            return {"minimum": lowest, "maximum": highest, **step}
        case "string" | "prompt":
            return {"minLength": 1 if param.required else 0, "maxLength": length(param)}
        case "choice":
            return {"enum": [*param.choices, None] if nullable else list(param.choices)}
        case "image":
            return {"format": "uuid", "pattern": f"^{_UPLOAD_ID.pattern}$"}
        case "boolean":
            return {}


def _example(param: Param) -> Scalar:
    if param.example is not None:
        return param.example
    if param.default is not None:
        return param.default
    lowest, highest = bounds(param)
    match param.type:
        case "integer" | "seed" | "number":
            return min(max(0, lowest), highest)
        case "choice":
            return param.choices[0]
        case "boolean":
            return True
        case "image":
            return "0199c0de-0000-7000-8000-000000000000"
        case "string" | "prompt":
            return "a crane above the clouds"[: length(param)].strip()
