"""How long a finished picture takes to its asset-ready event: ``python -m benchmarks.finish``.

The simulator draws 1024 by 1024 pixels of real scenery, one job at a time. Measured is from the end of the
prompt, by the simulator's own record, to the moment in which a subscriber of ``FORGE_ASSETS_READY`` has the
message. Beside it, in the same round and of the same pictures: fetch, SHA-256 and fsync alone, on a warm
connection, in a client that knows what to fetch.

We want at most 1.5 times that. What forge does beyond it: it hears of the end and reads the history, decodes
every pixel before it believes them, makes the file canonical, and writes three events as one batch. So a
second yardstick decodes, too, which takes longer than all that the first one does.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import msgspec
import nats
from nats.aio.msg import Msg
from PIL import Image
from rich.table import Table

from benchmarks import harness, servers
from benchmarks.asked import SUBMIT, user
from benchmarks.harness import Figure, Spread
from benchmarks.wire import Connection, connect, post
from forge.domain.ids import prompt_id
from forge.topology import ASSETS_READY

SIDE = 1024
WANTED = 1.5

Heard = dict[UUID, asyncio.Future[float]]
"""Job → when its message came (Unix seconds); a message may come before the job's id is known here."""


class Drawn(msgspec.Struct, frozen=True):
    """One picture: when its prompt ended and its message was heard (Unix seconds), and what to fetch."""

    ended: float
    heard: float
    output: dict[str, str]


class Round(msgspec.Struct, frozen=True):
    """Milliseconds, a value for each picture."""

    forge: list[float]
    alone: list[float]
    decoded: list[float]


def main() -> None:
    given = harness.command(
        __doc__.splitlines()[0] if __doc__ else "",
        5,
        0.0,
        ("--pictures", {"type": int, "default": 12, "help": "pictures a round [%(default)s]"}),
    )
    if given.short:
        given.pictures = 3
    with (
        servers.place(given.dir) as place,
        servers.simulator(place) as comfyui,
        servers.forge_worker(place, comfyui),
        servers.forge_api(place) as forge,
    ):
        where = harness.environment(place.root)
        rounds = asyncio.run(_rounds(given.rounds, given.pictures, place, forge, comfyui))
    how = f"{given.rounds} rounds of {given.pictures} pictures; milliseconds, the median of each round"
    harness.show("finish", where, how, [_table(rounds)])
    harness.write(given.json, "finish", where, rounds=rounds, figures=_figures(rounds))


async def _rounds(count: int, pictures: int, place: servers.Place, forge: str, comfyui: str) -> list[Round]:
    heard: Heard = {}
    rounds = []
    async with (
        await nats.connect(place.environ["FORGE_NATS_URL"]) as nc,
        aiohttp.ClientSession(auto_decompress=False) as session,
    ):

        async def ready(message: Msg) -> None:
            now = time.time()
            told = _of(heard, UUID(msgspec.json.decode(message.data)["job_id"]))
            if not told.done():
                told.set_result(now)

        await nc.jetstream().subscribe(
            "forge.public.asset.>", stream=ASSETS_READY, ordered_consumer=True, cb=ready
        )
        for nth in range(-1, count):
            wire = await connect(forge)
            each = range(pictures if nth >= 0 else 2)  # before the first round everything gets warm
            drawn = [await _draw(wire, forge, session, comfyui, heard, f"{nth} {one}") for one in each]
            wire.close()
            found = Round(
                [1e3 * (one.heard - one.ended) for one in drawn],
                [1e3 * await _alone(session, comfyui, one.output, place.root) for one in drawn],
                [1e3 * await _alone(session, comfyui, one.output, place.root, decode=True) for one in drawn],
            )
            rounds += [found] if nth >= 0 else []
    return rounds


def _of(heard: Heard, job: UUID) -> asyncio.Future[float]:
    return heard.setdefault(job, asyncio.get_running_loop().create_future())


async def _draw(
    wire: Connection,
    forge: str,
    session: aiohttp.ClientSession,
    comfyui: str,
    heard: Heard,
    name: str,
) -> Drawn:
    params = {"prompt": f"a pavilion above the mist, {os.getpid()} {name}", "width": SIDE, "height": SIDE}
    body = msgspec.json.encode({"job_type": "character_portrait", "params": params | {"steps": 1}})
    status, answer = await wire.insist(post(forge, SUBMIT, body, user(0, 0), f"{os.getpid()} {name}"))
    if status not in (200, 202):
        raise SystemExit(f"forge answered {status}: {answer[:500]!r}")
    job = UUID(msgspec.json.decode(answer)["id"])
    at = await asyncio.wait_for(_of(heard, job), harness.PATIENCE_SECONDS)
    async with session.get(f"{comfyui}/simulator/record", params={"events": ""}) as record:
        events: list[dict[str, Any]] = (await record.json())["events"]
    prompt = str(prompt_id(job, 1))
    end = next(e for e in reversed(events) if e["event"] == "ended" and e["prompt_id"] == prompt)
    [images] = [output["images"] for output in end["outputs"].values()]
    return Drawn(end["at"], at, images[0])


async def _alone(
    session: aiohttp.ClientSession,
    comfyui: str,
    output: dict[str, str],
    folder: Path,
    *,
    decode: bool = False,
) -> float:
    """Seconds to fetch a picture, hash it and have it on disk, and to decode it where that is wanted."""
    target, digest = folder / "alone.png", hashlib.sha256()
    began = time.perf_counter()
    async with session.get(f"{comfyui}/view", params=output) as answer:
        with target.open("wb", 0) as file:
            async for chunk in answer.content.iter_chunked(256 * 1024):
                digest.update(chunk)
                file.write(chunk)
            os.fsync(file.fileno())
    if decode:
        with Image.open(target) as image:
            image.load()
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def _ratio(rounds: list[Round], yardstick: str) -> Spread:
    return harness.ratio(_medians(rounds, "forge"), _medians(rounds, yardstick))


def _medians(rounds: list[Round], what: str) -> list[float]:
    return [harness.spread(getattr(one, what)).median for one in rounds]


def _table(rounds: list[Round]) -> Table:
    table = Table(title=f"from the end at ComfyUI to asset-ready, {SIDE} × {SIDE}")
    for column in ("to asset-ready", "fetch, hash, fsync alone", "of that", "and decode", "of that"):
        table.add_column(column, justify="right")
    table.add_row(
        harness.spread(_medians(rounds, "forge")).shown(),
        harness.spread(_medians(rounds, "alone")).shown(),
        _ratio(rounds, "alone").shown(2),
        harness.spread(_medians(rounds, "decoded")).shown(),
        _ratio(rounds, "decoded").shown(2),
    )
    return table


def _figures(rounds: list[Round]) -> list[Figure]:
    mine, alone, decoded = (
        harness.spread(_medians(rounds, what)).median for what in ("forge", "alone", "decoded")
    )
    return [
        harness.figure(
            f"end at ComfyUI to asset-ready, {SIDE}²",
            _ratio(rounds, "alone"),
            "×",
            runs=len(rounds),
            beside=f"{mine:.0f} ms; fetch, hash, fsync alone {alone:.1f} ms",
            at_most=WANTED,
        ),
        harness.figure(
            "the same, of what also decodes",
            _ratio(rounds, "decoded"),
            "×",
            runs=len(rounds),
            beside=f"{mine:.0f} ms; fetch, hash, fsync, decode {decoded:.1f} ms",
        ),
    ]


if __name__ == "__main__":
    main()
