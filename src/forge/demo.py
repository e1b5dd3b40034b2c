"""`forge demo`: a whole system makes a sample set through its public HTTP API, and every picture is checked.

In come the variables of a `forge dev`; out come pictures, a table of them, and an exit status that is 0 only
if every asset is stored, listed and readable. Nothing here knows forge's insides: it does what a game would.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx
import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from forge.dev import Dev, free_port, serve
from forge.embedded import record as dev_record
from forge.errors import ServerFailed
from forge.settings import ApiKey, load

API = "/api/v1/comfyui"
OVER = ("completed", "failed", "cancelled")
PATIENCE = 600.0
"""Seconds without any job coming to its end: a real ComfyUI without a GPU takes minutes for one picture."""

BUSY_SECONDS, SOON_SECONDS = 60.0, 5.0
"""How long one request is repeated that forge is too busy for, if it says that it will not be for longer."""

WIDTH_IN_FILES = 140
"""Columns of what is written to a file or pipe, where nothing needs to be cut."""

Report = Callable[[str], None]


class Sample(msgspec.Struct, frozen=True):
    """One picture that somebody asks for."""

    user: str
    job_type: str
    params: dict[str, Any]
    character_id: str | None = None


_ELDER = {
    "gender": "male",
    "age": "elder",
    "category": "monk",
    "traits": "scar over the left eye, grey braid",
}

SAMPLES = (
    Sample(
        "mei",
        "character_portrait",
        {"prompt": "a jade hairpin, cherry blossoms", "element": "wood"},
        "mei-lin",
    ),
    Sample(
        "tao",
        "character_portrait",
        {"gender": "male", "realm": "core_formation", "element": "fire"},
        "tao-wu",
    ),
    Sample(
        "yun",
        "character_portrait",
        {"category": "spirit", "scene": "void", "element": "shadow"},
        "nine-tails",
    ),
    *(
        Sample(user, "npc_bust", {**_ELDER, "expression": expression, "archetype_id": "abbot"}, "abbot-kong")
        for user, expression in (("mei", "serene"), ("tao", "stern"), ("yun", "surprised"), ("mei", "smile"))
    ),
    Sample("tao", "fate_card", {"omen": "tribulation", "motif": "dragon", "element": "lightning"}),
    Sample(
        "yun", "fate_card", {"omen": "rebirth", "motif": "phoenix", "element": "fire", "rarity": "heaven"}
    ),
    Sample("mei", "ui_icon", {"kind": "pill", "prompt": "a glowing elixir", "element": "light"}),
    Sample("tao", "ui_icon", {"kind": "weapon", "prompt": "a flying sword", "element": "metal"}),
    Sample("yun", "ui_icon", {"kind": "talisman", "shape": "hexagon", "element": "ice"}),
)


class Asset(msgspec.Struct, frozen=True):
    """One asset of the sample set, and what is wrong with it."""

    sample: Sample
    record: dict[str, Any]
    faults: list[str]


class DemoFailed(Exception):
    """The sample set could not be made; says why in one line."""


def show(environ: Mapping[str, str], *, once: bool, report: Report) -> int:
    """Make the sample set and serve on, or with `once` leave; returns the exit status.

    A `forge dev` that already runs on the data directory is used, and left running.
    """
    environ = {
        "FORGE_RATE_PER_HOUR": "1000",
        **environ,
    }  # who likes the demo may run it more than once an hour
    settings = load(environ)
    console = Console(width=None if sys.stdout.isatty() else WIDTH_IN_FILES)
    if already := dev_record.running(settings.data_dir):
        console.print(f"a forge runs here already: {already.url}")
        return asyncio.run(_tour(already.url, settings.api_keys, console))

    async def use(dev: Dev) -> int | None:
        console.print(f"forge ready at {dev.url}")
        status = await _tour(dev.url, settings.api_keys, console)
        console.print(f"pictures and logs are in {settings.data_dir}")
        if once or status:
            console.print("nothing serves any more: `forge dev` serves these again")
            return status
        console.print("serving until Ctrl-C")
        return None

    console.print("starting NATS, Postgres, ComfyUI simulator, API and worker …")
    return serve(_with_a_free_port(environ), use, report)


def _with_a_free_port(environ: Mapping[str, str]) -> Mapping[str, str]:
    """A port that nobody chose gives way when it is taken; the first look at forge should not fail by it."""
    settings = load(environ)
    if environ.get("FORGE_PORT"):
        return environ
    try:
        free_port(settings.host, settings.port)
    except ServerFailed:
        return {**environ, "FORGE_PORT": "0"}
    return environ


async def _tour(url: str, keys: tuple[ApiKey, ...], console: Console) -> int:
    secret = next((key.secret for key in keys if key.role == "operator"), None)
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    async with httpx.AsyncClient(base_url=url + API, headers=headers, timeout=30.0) as client:
        try:
            earlier = {asset["id"] async for asset in _listed(client)}
            if earlier:
                console.print(f"{len(earlier)} assets of earlier runs are still here")
            jobs = await _submit(client)
            await _watch(client, jobs, console)
            assets = await _check(client, jobs)
        except (DemoFailed, httpx.HTTPError) as error:
            console.print(f"[red]the demo failed:[/] {error or type(error).__name__}")
            return 1
    return _tell(assets, len(jobs), earlier, url, console)


async def _submit(client: httpx.AsyncClient) -> dict[str, Sample]:
    """Job id → what was asked for."""
    jobs: dict[str, Sample] = {}
    for sample in SAMPLES:
        body = {"job_type": sample.job_type, "params": sample.params, "character_id": sample.character_id}
        headers = {"X-Forge-User": sample.user, "Idempotency-Key": str(uuid.uuid4())}
        answer = _good(await _ask(client, "POST", "/jobs", json=body, headers=headers))
        jobs[answer.json()["id"]] = sample
    return jobs


async def _watch(client: httpx.AsyncClient, jobs: Mapping[str, Sample], console: Console) -> None:
    """Wait until every job is over, with a bar a kind on a terminal and a line a job elsewhere."""
    waiting = dict(jobs)
    deadline = time.monotonic() + PATIENCE
    with _bars(console) as bars:
        tasks = _bar_per_kind(bars, jobs)
        while waiting:
            for job_id in list(waiting):
                job = _good(await _ask(client, "GET", f"/jobs/{job_id}")).json()
                if job["status"] not in OVER:
                    continue
                sample = waiting.pop(job_id)
                if job["status"] != "completed":
                    raise DemoFailed(
                        f"{sample.job_type} of {sample.user} ended as {job['status']}: {job['error']}"
                    )
                deadline = time.monotonic() + PATIENCE
                bars.advance(tasks[sample.job_type])
                if not console.is_terminal:
                    console.print(
                        f"{len(jobs) - len(waiting)}/{len(jobs)} {sample.job_type} for {sample.user}"
                    )
            if time.monotonic() > deadline:
                raise DemoFailed(f"no job came to its end in {PATIENCE:.0f} s; {len(waiting)} are left")
            await asyncio.sleep(0.05)


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _bar_per_kind(bars: Progress, jobs: Mapping[str, Sample]) -> dict[str, TaskID]:
    kinds = [sample.job_type for sample in jobs.values()]
    return {kind: bars.add_task(kind, total=kinds.count(kind)) for kind in dict.fromkeys(kinds)}


async def _check(client: httpx.AsyncClient, jobs: Mapping[str, Sample]) -> list[Asset]:
    """Read everything back the way a game would."""
    finished = [_good(await _ask(client, "GET", f"/jobs/{job_id}")).json() for job_id in jobs]
    newest = max(job["seq"] for job in finished)
    listed = {asset["id"]: asset async for asset in _listed(client, min_seq=newest)}
    checked = []
    for job in finished:
        if not job["assets"]:
            raise DemoFailed(f"job {job['id']} is completed, but has no asset")
        for made in job["assets"]:
            record = _good(await _ask(client, "GET", f"/assets/{made['id']}")).json()
            faults = [] if made["id"] in listed else ["not listed"]
            faults += await faults_of(client, record)
            checked.append(Asset(jobs[job["id"]], record, faults))
    return checked


async def faults_of(client: httpx.AsyncClient, record: Mapping[str, Any]) -> list[str]:
    """What is wrong with an asset's file and thumbnail."""
    faults = []
    file = await _ask(client, "GET", f"/assets/{record['id']}/file")
    if file.status_code != 200:
        faults.append(f"file: status {file.status_code}")
    elif hashlib.sha256(file.content).hexdigest() != record["content_hash"]:
        faults.append("file: its bytes are not the ones that were stored")
    thumbnail = await _ask(client, "GET", f"/assets/{record['id']}/thumbnail", params={"width": 256})
    if thumbnail.status_code != 200 or thumbnail.content[8:12] != b"WEBP":
        faults.append(f"thumbnail: status {thumbnail.status_code}")
    return faults


async def _listed(client: httpx.AsyncClient, min_seq: int = 0) -> AsyncIterator[dict[str, Any]]:
    """Every asset there is, page by page."""
    params: dict[str, Any] = {"limit": 100, "min_seq": min_seq}
    while True:
        page = _good(await _ask(client, "GET", "/assets", params=params)).json()
        for asset in page["items"]:
            yield asset
        if not page["next_cursor"]:
            return
        params["cursor"] = page["next_cursor"]


async def _ask(client: httpx.AsyncClient, method: str, path: str, **more: Any) -> httpx.Response:
    """The answer; as a game would, it comes again when that is a 503 which is soon over, unlike a full volume
    or a damaged file."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        answer = await client.request(method, path, **more)
        wait = float(answer.headers.get("Retry-After", "inf")) if answer.status_code == 503 else math.inf
        if wait > SOON_SECONDS or time.monotonic() > deadline:
            return answer
        await asyncio.sleep(wait)


def _good(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    try:
        reason = answer.json().get("detail", "")
    except ValueError:
        reason = answer.text[:200]
    request = answer.request
    raise DemoFailed(f"{request.method} {request.url.path} was answered with {answer.status_code}: {reason}")


def _tell(assets: list[Asset], jobs: int, earlier: set[str], url: str, console: Console) -> int:
    table = Table("kind", "variant", "for", "pixels", "kB", "checked", box=SIMPLE_HEAD)
    table.add_column("asset", no_wrap=True)
    for asset in assets:
        record = asset.record
        table.add_row(
            record["asset_type"],
            record["variant_key"] or "",
            asset.sample.user,
            record["dimensions"],
            str(record["file_size_bytes"] // 1000),
            "; ".join(asset.faults) or "ok",
            f"[link={url}{API}/assets/{record['id']}/file]{record['id']}[/link]",
            style="red" if asset.faults else "",
        )
    faulty = sum(bool(asset.faults) for asset in assets)
    kept = len(earlier | {asset.record["id"] for asset in assets})
    console.print(table)
    console.print(f"{len(assets)} assets of {jobs} jobs, {faulty} with faults; {kept} in all", soft_wrap=True)
    for what, where in (("one", "assets/ASSET/file"), ("all", "assets"), ("statistics", "stats")):
        console.print(f"{what:>12}  {url}{API}/{where}", soft_wrap=True)
    console.print(f"{'the API':>12}  {url}/openapi.json", soft_wrap=True)
    return 1 if faulty else 0
