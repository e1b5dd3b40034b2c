"""What the API is made of; the composition root opens these and hands them over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from litestar.connection import ASGIConnection

from forge.admissions import Admissions
from forge.api.live import Live
from forge.api.reads import ReadCounter
from forge.comfyui.workflows import Workflow
from forge.commands import Jobs
from forge.database import Pool
from forge.eventstore import EventStore
from forge.images import Workshop
from forge.keys import Keys
from forge.library import Library
from forge.resources import Capacity
from forge.retention import Retention
from forge.settings import Settings
from forge.store import Store
from forge.uploads import Uploads

if TYPE_CHECKING:
    from nats.aio.client import Client


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the routes use.

    ``open_to_loopback`` lets requests from this very machine in without a key, as long as no keys are set.
    """

    settings: Settings
    nc: Client
    store: EventStore
    admissions: Admissions
    jobs: Jobs
    library: Library
    uploads: Uploads
    keys: Keys
    reads: ReadCounter
    retention: Retention
    pool: Pool
    workflows: dict[str, Workflow]
    blobs: Store
    capacity: Capacity
    workshop: Workshop
    live: Live
    open_to_loopback: bool = False


def parts_of(connection: ASGIConnection[Any, Any, Any, Any]) -> Parts:
    """The parts of the app that serves this connection."""
    parts: Parts = connection.scope["litestar_app"].state.parts
    return parts
