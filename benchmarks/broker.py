"""What nats-server keeps in memory of the log: ``python -m benchmarks.broker [--jobs N]``.

A bare nats-server with forge's streams is sent what a job writes, six events of its subjects. Its
RSS is sampled while the log grows: with subjects of their own for each job, as forge writes; with six
subjects for all jobs; and at the end when it was idle for a while and after it was started again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from uuid import uuid4

import nats
import psutil
from rich.console import Console
from rich.table import Table

from forge import topology
from forge.embedded import EmbeddedNats

EVENT_BYTES = 1000
SAMPLES = 8


def subjects(user: str, job: str) -> list[str]:
    """The six that a job without session and character writes."""
    asset = uuid4() if job != "same" else "same"
    place = f"forge.evt.job.{user}.{job}"
    stored = f"forge.evt.asset.-.ui_icon.{asset}.{job}"
    return [
        f"forge.evt.admission.{user}",
        f"{place}.0.submitted",
        f"{place}.1.started",
        f"{stored}.stored",
        f"{stored}.ready",
        f"{place}.1.completed",
    ]


async def grown(server: EmbeddedNats, jobs: int, own: bool) -> list[tuple[int, float]]:
    """(jobs, MiB) while so many jobs are written."""
    nc = await nats.connect(server.url)
    await topology.apply(nc)
    js = nc.jetstream(publish_async_max_pending=2000)
    found = [(0, rss(server))]
    for nth in range(jobs):
        names = subjects(f"u{nth // 10}", str(uuid4())) if own else subjects("same", "same")
        for name in names:
            await js.publish_async(name, bytes(EVENT_BYTES), wait_stall=60.0)
        if (nth + 1) % (jobs // SAMPLES) == 0:
            await js.publish_async_completed()
            found.append((nth + 1, rss(server)))
    await nc.close()
    return found


def rss(server: EmbeddedNats) -> float:
    assert server.process is not None
    return float(psutil.Process(server.process.pid).memory_info().rss) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=40_000)
    parser.add_argument("--idle", type=float, default=15.0, help="seconds of rest at the end [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    table = Table("subjects", "MiB after so many jobs", "idle", "started again")
    told = {}
    for own in (True, False):
        with tempfile.TemporaryDirectory(prefix="forge-bench-", dir="/var/tmp") as name:
            server = EmbeddedNats(Path(name, "nats"), anybody=True)
            server.start()
            try:
                found = asyncio.run(grown(server, given.jobs, own))
                time.sleep(given.idle)
                idle = rss(server)
                server.stop()
                server.start()
                again = rss(server)
            finally:
                server.stop()
        label = "a job's own" if own else "the same for all"
        shown = ", ".join(f"{jobs // 1000} k: {size:.0f}" for jobs, size in found)
        table.add_row(label, shown, f"{idle:.0f}", f"{again:.0f}")
        told[label] = {"samples": found, "idle": idle, "again": again}
    Console(width=140).print(table)
    if given.json:
        given.json.write_text(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
