"""The pictures a job uses, sent to ComfyUI before its prompt, under our own names in the attempt's folder."""

from __future__ import annotations

import asyncio
from uuid import UUID

from forge.comfyui.client import Comfy
from forge.comfyui.workflows import Workflow, uploads
from forge.errors import StoreFailed
from forge.events.jobs import JobSubmitted
from forge.store import Store
from forge.uploads import Uploads


async def send(
    comfy: Comfy, known: Uploads, store: Store, workflow: Workflow, request: JobSubmitted, folder: str
) -> dict[str, str]:
    """Upload the picture of each image param as ``folder/PARAM.png``; param → the name to put into the graph.

    Raises:
        UploadGone: an upload expired while the job waited.
        StoreFailed: its file cannot be read.
        ComfyError: ComfyUI does not take it.
    """
    names: dict[str, str] = {}
    for param, upload_id in uploads(workflow, request.params).items():
        upload = await known.find(request.user_id, UUID(upload_id))
        path = store.path(upload.content_hash, "png", "uploads")
        try:
            file = await asyncio.to_thread(path.open, "rb")
        except OSError as error:
            raise StoreFailed(f"{path}: {error.strerror}") from error
        with file:
            names[param] = await comfy.upload(f"{param}.png", file, folder=folder)
    return names
