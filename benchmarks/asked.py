"""The requests of the benchmarks: what a game would ask for, no two alike, from many users."""

from __future__ import annotations

import os

import msgspec

SUBMIT = "/api/v1/comfyui/jobs"
EVENTS = "/api/v1/comfyui/events"

_RUN = os.getpid()


def user(client: int, nth: int) -> str:
    """Who asks: each client is a user of its own, and after ten jobs another one, because nobody may have
    more that are not over. Users and sessions of another run are others."""
    return f"player-{_RUN}-{client:03}-{nth // 10}"


def bust(client: int, nth: int) -> bytes:
    """A bust of an NPC, with words of its own."""
    return msgspec.json.encode(
        {
            "job_type": "npc_bust",
            "params": {
                "prompt": f"a jade hairpin, cherry blossoms drifting by, portrait {client}/{nth}",
                "archetype_id": f"sword-saint-{nth % 50}",
                "gender": ("female", "male")[nth % 2],
                "age": ("youth", "adult", "elder")[nth % 3],
                "expression": ("smile", "stern", "serene")[client % 3],
                "category": "cultivator",
            },
            "priority": 1 + (client + nth) % 10,
            "session_id": f"session-{_RUN}-{client}-{nth // 100}",
            "character_id": f"npc-{client}-{nth}",
        }
    )


def swatch(color: int) -> bytes:
    """The least a ComfyUI can be asked for: a flat picture of 64 by 64 pixels."""
    return msgspec.json.encode({"job_type": "swatch", "params": {"color": color % (1 << 24)}})
