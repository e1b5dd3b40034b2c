"""Messages held against the AsyncAPI document, more strictly than a reader is to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jsonschema_rs import Draft202012Validator

_OURS = ("ce-", "content-type", "traceparent", "Nats-Msg-Id")


def resolved(document: dict[str, Any], ref: str) -> Any:
    """What a reference within the document leads to; None where there is nothing."""
    node: Any = document
    for part in ref.removeprefix("#/").split("/"):
        node = node.get(part) if isinstance(node, dict) else None
    return node


class Described:
    """A document, and a judge of messages by it."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._validators: dict[str, Draft202012Validator] = {}

    def faults(self, type_name: str, headers: Mapping[str, str], body: Any) -> list[str]:
        """What is wrong with one message: what its schemas refuse, and fields they do not know."""
        message = self.document["components"]["messages"].get(type_name)
        if message is None:
            return [f"{type_name} is not in the document"]
        given = {name: value for name, value in headers.items() if name.startswith(_OURS)}
        return [
            *self._refused(message["headers"]["$ref"], given),
            *self._refused(message["payload"]["$ref"], body),
        ]

    def _refused(self, ref: str, instance: Any) -> Iterator[str]:
        if ref not in self._validators:
            schema = {"$ref": ref, "components": self.document["components"]}
            self._validators[ref] = Draft202012Validator(schema, validate_formats=True)
        for error in self._validators[ref].iter_errors(instance):
            yield f"{'/'.join(map(str, error.instance_path))}: {error.message}"
        known = resolved(self.document, ref)["properties"]
        yield from (f"{name} is not described" for name in instance if name not in known)
