"""How long ``forge dev`` takes to its first picture, and where it goes: ``python -m benchmarks.start``.

The environment is warm: installed, compiled, read before. *First* is a start on a data directory that is not
there yet; *again* a second one on the same. Watched from outside: files that the servers write when they are
ready, the line on stdout, and a job asked for at once over HTTP until its picture is read. How long the
simulator draws, which ``forge dev`` makes take 200 to 800 ms, stands apart.

We want at most 3 s to the first picture, on a directory that is not there yet.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.table import Table

from benchmarks import harness, servers
from benchmarks.harness import PATIENCE_SECONDS, Figure

API = "/api/v1/comfyui"
WANTED_SECONDS = 3.0
_LOOK_SECONDS = 0.005

STEPS = (
    "nats-server serves",
    "database made",
    "Postgres serves",
    "API answers",
    "forge ready",
    "job accepted",
    "picture begun",
    "picture drawn and stored",
    "picture read",
)

Times = dict[str, float]
"""Step → seconds since the start; ``drawing`` is what of it the picture took."""


def main() -> None:
    given = harness.command(__doc__.splitlines()[0] if __doc__ else "", rounds=5, seconds=0.0)
    parent = given.dir or Path("/var/tmp")
    where = harness.environment(parent)
    found: dict[str, list[Times]] = {"first": [], "again": []}
    with tempfile.TemporaryDirectory(prefix="forge-bench-", dir=parent) as name:
        root = Path(name)
        root.chmod(0o755)
        workflows = servers.job_type(root / "workflows")
        if not given.short:
            asyncio.run(_start(root / "warm-up", workflows))
        for nth in range(given.rounds):
            place = root / f"data-{nth}"
            found["first"].append(asyncio.run(_start(place, workflows)))
            found["again"].append(asyncio.run(_start(place, workflows)))
            shutil.rmtree(place, ignore_errors=True)
    how = f"{given.rounds} starts of each kind; seconds since the process was started, median (least–most)"
    harness.show("start", where, how, [_table(found)])
    harness.write(given.json, "start", where, seconds=found, figures=_figures(found))


async def _start(place: Path, workflows: Path) -> Times:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FORGE_")}
    environ |= {"FORGE_WORKFLOWS_DIR": str(workflows), "FORGE_LOG_LEVEL": "WARNING"}
    port = servers.free_port()
    began = time.perf_counter()
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "forge", "dev", "--port", str(port), "--data-dir", str(place)),
        env=environ,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    watch = Watch(began, place, f"http://127.0.0.1:{port}")
    watching = asyncio.create_task(watch.run())
    try:
        assert child.stdout is not None
        line = await asyncio.wait_for(child.stdout.readline(), PATIENCE_SECONDS)
        if not line.startswith(b"forge ready"):
            raise SystemExit(f"forge dev said: {line!r}")
        watch.reached("forge ready")
        await _first_picture(watch)
        await asyncio.wait_for(watching, PATIENCE_SECONDS)
    finally:
        watching.cancel()
        child.send_signal(signal.SIGTERM)
        await asyncio.wait_for(child.wait(), PATIENCE_SECONDS)
    return watch.times


class Watch:
    """Notes when a start reached which step."""

    def __init__(self, began: float, place: Path, url: str) -> None:
        self.began, self.url, self.times = began, url, Times()
        self._nats = place / "nats"
        self._postgres = place / "postgres"

    def reached(self, step: str) -> None:
        self.times.setdefault(step, time.perf_counter() - self.began)

    async def run(self) -> None:
        """Look at files and the port until everything has been seen."""
        due: dict[str, Callable[[], bool]] = {
            "nats-server serves": lambda: any(self._nats.glob("*.ports")),
            "database made": lambda: (self._database() / "PG_VERSION").exists(),
            "Postgres serves": self._postgres_serves,
            "API answers": self._answers,
        }
        while due:
            for step, seen in list(due.items()):
                if await asyncio.to_thread(seen):
                    self.reached(step)
                    del due[step]
            await asyncio.sleep(_LOOK_SECONDS)

    def _database(self) -> Path:
        elsewhere = self._postgres / "elsewhere"
        return (elsewhere if elsewhere.exists() else self._postgres) / "data"

    def _postgres_serves(self) -> bool:
        try:
            return "ready" in (self._database() / "postmaster.pid").read_text()
        except OSError:
            return False

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/livez", timeout=1.0):
                return True
        except OSError:
            return False


async def _first_picture(watch: Watch) -> None:
    async with httpx.AsyncClient(base_url=watch.url + API, timeout=PATIENCE_SECONDS) as client:
        color = int(time.time() * 1000) % (1 << 24)
        asked = {"job_type": servers.JOB_TYPE, "params": {"color": color}}
        accepted = await _answered(
            client, "POST", "/jobs", json=asked, headers={"Idempotency-Key": f"{color}"}
        )
        watch.reached("job accepted")
        job = await _ended(client, accepted.json()["id"], watch)
        watch.reached("picture drawn and stored")
        [asset] = job["assets"]
        await _answered(client, "GET", f"/assets/{asset['id']}/file", params={"min_seq": job["seq"]})
        watch.reached("picture read")
        watch.times["drawing"] = watch.times["picture drawn and stored"] - watch.times["picture begun"]


async def _answered(client: httpx.AsyncClient, method: str, path: str, **more: Any) -> httpx.Response:
    """What forge says; asked again while it is too busy to know in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (answer := await client.request(method, path, **more)).status_code == 503:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(_LOOK_SECONDS)
    return answer.raise_for_status()


async def _ended(client: httpx.AsyncClient, job_id: str, watch: Watch) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        job: dict[str, Any] = (await _answered(client, "GET", f"/jobs/{job_id}")).json()
        if job["status"] != "pending":
            watch.reached("picture begun")
        if job["status"] == "completed":
            return job
        if job["status"] in ("failed", "cancelled"):
            raise SystemExit(f"the first job ended as {msgspec.json.encode(job).decode()}")
        await asyncio.sleep(_LOOK_SECONDS)
    raise SystemExit("the first job did not end")


# ------------------------------------------------------------------- the report


def _table(found: dict[str, list[Times]]) -> Table:
    table = Table(title="a start of forge dev")
    table.add_column("step")
    for kind in found:
        table.add_column(f"{kind}, s", justify="right")
    for step in (*STEPS, "drawing"):
        cells = [harness.spread([times[step] for times in rounds]).shown(2) for rounds in found.values()]
        table.add_row("of it, the picture" if step == "drawing" else step, *cells)
    return table


def _figures(found: dict[str, list[Times]]) -> list[Figure]:
    figures = []
    for kind, rounds in found.items():
        parts = {
            step: harness.spread([times[step] for times in rounds]).median
            for step in ("forge ready", "drawing")
        }
        figures.append(
            harness.figure(
                f"forge dev to the first picture, {kind} start",
                harness.spread([times["picture read"] for times in rounds]),
                "s",
                runs=len(rounds),
                beside="ready after {forge ready:.2f} s, the picture took {drawing:.2f}".format(**parts),
                at_most=WANTED_SECONDS,
            )
        )
    return figures


if __name__ == "__main__":
    main()
