"""`/api/jobs...` of 0.27.0 and later: one view over waiting, running and ended prompts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aiohttp import web

from forge.comfyui.simulator.prompts import is_canonical_uuid, remove_pending
from forge.comfyui.simulator.queue import Item, PromptQueue

if TYPE_CHECKING:
    from forge.comfyui.simulator.server import Simulator

STATUSES = ("pending", "in_progress", "completed", "failed", "cancelled")


def job_routes(simulator: Simulator) -> list[web.RouteDef]:
    """The job routes; they exist under /api only."""
    jobs = _Jobs(simulator)
    return [
        web.get("/api/jobs", jobs.listing),
        web.get("/api/jobs/{job_id}", jobs.one),
        web.post("/api/jobs/cancel", jobs.cancel_many),
        web.post("/api/jobs/{job_id}/cancel", jobs.cancel),
    ]


class _Jobs:
    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator

    async def listing(self, request: web.Request) -> web.Response:
        query = request.query
        wanted = [s for s in query.get("status", "").split(",") if s]
        wrong = _wrong_query(wanted, query)
        if wrong is not None:
            return web.json_response({"error": wrong}, status=400)
        jobs = _all_jobs(self._simulator.memory.queue)
        workflow_id = query.get("workflow_id")
        chosen = [
            job
            for job in jobs
            if (not wanted or job["status"] in wanted)
            and (not workflow_id or job.get("workflow_id") == workflow_id)
        ]
        by_duration = query.get("sort_by") == "execution_duration"
        chosen.sort(
            key=_duration if by_duration else _created, reverse=query.get("sort_order", "desc") == "desc"
        )
        offset = max(int(query.get("offset", "0")), 0)
        limit = int(query["limit"]) if "limit" in query else None
        page = chosen[offset : None if limit is None else offset + limit]
        more = offset + len(page) < len(chosen)
        pagination = {"offset": offset, "limit": limit, "total": len(chosen), "has_more": more}
        return web.json_response({"jobs": page, "pagination": pagination})

    async def one(self, request: web.Request) -> web.Response:
        job = _find(self._simulator.memory.queue, request.match_info["job_id"])
        if job is None:
            return web.json_response({"error": "Job not found"}, status=404)
        return web.json_response(job)

    async def cancel(self, request: web.Request) -> web.Response:
        return web.json_response({"cancelled": self._cancel(request.match_info["job_id"])})

    async def cancel_many(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except json.JSONDecodeError:
            return web.json_response({"error": "Request body must be valid JSON"}, status=400)
        ids = body.get("job_ids")
        if not isinstance(ids, list):
            return web.json_response({"error": "job_ids must be a list"}, status=400)
        invalid = [job_id for job_id in ids if not is_canonical_uuid(job_id)]
        if invalid:
            said = {"error": "job_ids contains invalid id(s)", "invalid_ids": invalid}
            return web.json_response(said, status=400)
        cancelled = [self._cancel(job_id) for job_id in ids]
        return web.json_response({"cancelled": any(cancelled)})

    def _cancel(self, job_id: str) -> bool:
        return remove_pending(self._simulator, job_id) or self._simulator.memory.worker.interrupt(job_id)


def _wrong_query(wanted: list[str], query: Any) -> str | None:
    unknown = [status for status in wanted if status not in STATUSES]
    if unknown:
        return f"Invalid status value(s): {', '.join(unknown)}. Valid values: {', '.join(STATUSES)}"
    if query.get("sort_by", "created_at") not in ("created_at", "execution_duration"):
        return "sort_by must be 'created_at' or 'execution_duration'"
    if query.get("sort_order", "desc") not in ("asc", "desc"):
        return "sort_order must be 'asc' or 'desc'"
    for name in ("limit", "offset"):
        if not query.get(name, "1").lstrip("-").isdigit():
            return f"{name} must be an integer"
    if int(query.get("limit", 1)) < 1:
        return "limit must be a positive integer"
    return None


def _created(job: dict[str, Any]) -> float:
    created: float = job["create_time"]
    return created


def _duration(job: dict[str, Any]) -> float:
    lasted: float = job.get("execution_end_time", 0) - job.get("execution_start_time", 0)
    return lasted


def _all_jobs(queue: PromptQueue) -> list[dict[str, Any]]:
    waiting = [_waiting(item, "pending") for item in queue.pending]
    running = [_waiting(queue.running, "in_progress")] if queue.running is not None else []
    return running + waiting + [_ended(entry) for entry in queue.history.values()]


def _find(queue: PromptQueue, job_id: str) -> dict[str, Any] | None:
    entry = queue.history.get(job_id)
    if entry is not None:
        graph, extra_data = entry["prompt"][2:4]
        details = {
            "outputs": entry["outputs"],
            "execution_status": entry["status"],
            "workflow": {"prompt": graph, "extra_data": extra_data},
        }
        return _ended(entry) | details
    if queue.running is not None and queue.running.prompt_id == job_id:
        return _waiting(queue.running, "in_progress")
    return next((_waiting(item, "pending") for item in queue.pending if item.prompt_id == job_id), None)


def _waiting(item: Item, status: str) -> dict[str, Any]:
    return {
        "id": item.prompt_id,
        "status": status,
        "priority": item.number,
        "create_time": item.extra_data["create_time"],
        "outputs_count": 0,
    } | _workflow_id(item.extra_data)


def _ended(entry: dict[str, Any]) -> dict[str, Any]:
    number, prompt_id, _, extra_data, _ = entry["prompt"]
    messages = entry["status"]["messages"]
    last, data = messages[-1]
    status = {"execution_success": "completed", "execution_interrupted": "cancelled"}.get(last, "failed")
    job = {
        "id": prompt_id,
        "status": status,
        "priority": number,
        "create_time": extra_data["create_time"],
        "execution_start_time": messages[0][1]["timestamp"],
        "execution_end_time": data["timestamp"],
    }
    if status == "failed":
        job["execution_error"] = data
    shown = [
        {**picture, "nodeId": node_id, "mediaType": kind}
        for node_id, output in entry["outputs"].items()
        for kind, pictures in output.items()
        for picture in pictures
        if isinstance(picture, dict)
    ]
    job["outputs_count"] = len(shown)
    if shown:
        job["preview_output"] = shown[0]
    return job | _workflow_id(extra_data)


def _workflow_id(extra_data: dict[str, Any]) -> dict[str, Any]:
    # a null here raises, and one such prompt breaks the whole listing: so it does on the server
    found = extra_data.get("extra_pnginfo", {}).get("workflow", {}).get("id")
    return {} if found is None else {"workflow_id": found}
