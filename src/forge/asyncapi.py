"""The AsyncAPI document: every message that forge publishes for keeps, told by the catalogue of events."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

import msgspec

from forge import topology
from forge.events.assets import AssetReady
from forge.events.catalogue import Event, all_events
from forge.events.system import MetricSampled

_REF = "#/components/schemas/{name}"
_TEXT: dict[str, Any] = {"type": "string"}

_HEADERS: dict[str, Any] = {
    "type": "object",
    "description": "The attributes of a CloudEvent 1.0 in binary form; NATS adds headers of its own.",
    "required": [
        *("ce-specversion", "ce-id", "ce-type", "ce-source", "ce-subject", "ce-time"),
        *("ce-actor", "ce-correlationid", "content-type", "Nats-Msg-Id"),
    ],
    "properties": {
        "ce-specversion": {"const": "1.0"},
        "ce-id": {**_TEXT, "format": "uuid", "description": "Which event it is; whoever had it, has it."},
        "ce-type": {**_TEXT, "pattern": r"^forge\.[a-z_]+\.[a-z_]+\.v[0-9]+$"},
        "ce-source": {"const": "/forge"},
        "ce-subject": {**_TEXT, "description": "Where it stands in forge's own log."},
        "ce-time": {**_TEXT, "format": "date-time"},
        "ce-actor": {**_TEXT, "description": "Who did it: `role:user#key`, or a part of forge."},
        "ce-correlationid": {**_TEXT, "description": "The job or request it was done for."},
        "ce-causationid": {**_TEXT, "description": "The command or event that led to it."},
        "traceparent": {**_TEXT, "description": "The W3C trace it is part of."},
        "content-type": {"const": "application/json"},
        "Nats-Msg-Id": {
            **_TEXT,
            "format": "uuid",
            "description": "`ce-id` once more, for the server's check.",
        },
    },
}


def document() -> dict[str, Any]:
    """The whole document, AsyncAPI 3.0, as JSON would have it."""
    events = [cls for _, cls in sorted(all_events().items())]
    _, schemas = msgspec.json.schema_components(events, ref_template=_REF)
    log = [cls for cls in events if cls is not MetricSampled]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "forge",
            "version": importlib.metadata.version("forge"),
            "description": "What forge tells over NATS JetStream. Other services read `assetsReady` as the "
            "user `subscriber`, through a durable consumer each: at least once, in order, from any point.",
        },
        "defaultContentType": "application/json",
        "servers": {
            "nats": {
                "host": "127.0.0.1:4222",
                "protocol": "nats",
                "description": "FORGE_NATS_URL",
                "security": [{"$ref": "#/components/securitySchemes/user"}],
            }
        },
        "channels": {
            "assetsReady": {
                "address": "forge.public.asset.{assetType}.{assetId}.ready",
                "title": topology.ASSETS_READY,
                "description": "For other services: an asset may be used. Kept for a year.",
                "parameters": {
                    "assetType": {"description": "`ui_icon`, or any type of asset."},
                    "assetId": {"description": "The asset's UUID."},
                },
                "messages": _messages([AssetReady]),
            },
            "log": {
                "address": topology.ALL_EVENTS,
                "title": topology.EVENTS,
                "description": "Forge's own log, for operators: every state change, for ever.",
                "messages": _messages(log),
            },
            "metrics": {
                "address": "forge.metric.{metricType}",
                "title": topology.METRICS,
                "description": "Samples of resources, kept for 30 days.",
                "parameters": {"metricType": {"description": "`disk_usage`, `memory_usage`, …"}},
                "messages": _messages([MetricSampled]),
            },
        },
        "operations": {
            "announceAsset": _sends("assetsReady", [AssetReady]),
            "record": _sends("log", log),
            "sample": _sends("metrics", [MetricSampled]),
        },
        "components": {
            "messages": {cls.type_name(): _message(cls) for cls in events},
            "schemas": {"Headers": _HEADERS, **{name: _open(schema) for name, schema in schemas.items()}},
            "securitySchemes": {
                "user": {"type": "userPassword", "description": "A user of `nats/nats-server.conf`."}
            },
        },
    }


def _messages(events: list[type[Event]]) -> dict[str, Any]:
    names = [cls.type_name() for cls in events]
    return {name: {"$ref": f"#/components/messages/{name}"} for name in names}


def _sends(channel: str, events: list[type[Event]]) -> dict[str, Any]:
    return {
        "action": "send",
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{cls.type_name()}"} for cls in events],
    }


def _message(cls: type[Event]) -> dict[str, Any]:
    return {
        "name": cls.type_name(),
        "title": cls.__name__,
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "contentType": "application/json",
        "headers": {"$ref": _REF.format(name="Headers")},
        "payload": {"$ref": _REF.format(name=cls.__name__)},
    }


def _open(schema: dict[str, Any]) -> dict[str, Any]:
    """A reader takes the fields it knows: new ones may come."""
    told = {"description": inspect.cleandoc(schema["description"])} if "description" in schema else {}
    return {name: value for name, value in schema.items() if name != "additionalProperties"} | told
