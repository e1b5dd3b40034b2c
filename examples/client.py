"""A small client of forge's API: asks, listens, fetches. See docs/API.md.

    FORGE_KEY=… python examples/client.py http://127.0.0.1:8600 mei

Needs httpx and websockets. Without FORGE_KEY it works with a `forge dev` on this machine.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

API = "/api/v1/comfyui"
OVER = ("completed", "failed", "cancelled")


# [errors]
class Refused(Exception):
    """What forge does not do: decide by `problem["code"]`, show `problem["detail"]`."""

    def __init__(self, problem: dict[str, Any]) -> None:
        super().__init__(problem["detail"])
        self.problem = problem


async def ask(
    http: httpx.AsyncClient, method: str, path: str, *, patience: float = 60, **more: Any
) -> httpx.Response:
    """Ask; and again after a lost connection, or when forge says when to come again, but not for ever."""
    until = time.monotonic() + patience
    while True:
        try:
            answer = await http.request(method, path, **more)
            wait = float(answer.headers.get("Retry-After", "inf"))  # of 429 and 503
            if time.monotonic() + wait > until:
                break
        except httpx.TransportError:  # perhaps it was done: with its Idempotency-Key it is not done twice
            wait = 1
            if time.monotonic() + wait > until:
                raise
        await asyncio.sleep(wait)
    if answer.is_error:
        raise Refused(answer.json())
    return answer


# [end]


# [events]
async def events(http: httpx.AsyncClient, url: str, after: int) -> AsyncGenerator[dict[str, Any]]:
    """Every event after a sequence, once and in order, whatever happens to the connection.

    A `reset` means that some are not at hand any more: read the lists again.
    """
    epoch = None
    address = url.replace("http", "ws", 1) + f"{API}/events"
    while True:
        ticket = (await ask(http, "POST", f"{API}/events/ticket")).json()["ticket"]
        offered = [Subprotocol("forge.v1"), Subprotocol(f"ticket.{ticket}")]
        wait = 1.0
        try:
            async with connect(address, subprotocols=offered) as socket:
                async for text in socket:
                    message = json.loads(text)
                    match message["t"]:
                        case "welcome":
                            sub = {"t": "sub", "epoch": epoch or message["epoch"], "after": after}
                            await socket.send(json.dumps(sub))
                            epoch = message["epoch"]
                        case "ev" | "mark":
                            after = message["seq"]
                        case "reset":
                            after = message["head"]
                        case "bye":
                            wait = message["retry_after_ms"] / 1000
                    if message["t"] in ("ev", "reset"):
                        yield message
        except (WebSocketException, OSError):
            pass
        await asyncio.sleep(wait)


# [end]


async def main(url: str, user: str) -> None:
    headers = {"X-Forge-User": user}
    if key := os.environ.get("FORGE_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=10) as http:
        # [submit]
        wish = {"job_type": "npc_bust", "params": {"expression": "smile", "width": 256, "height": 256}}
        once = {"Idempotency-Key": f"{user}-smiles"}
        job = (await ask(http, "POST", f"{API}/jobs", json=wish, headers=once)).json()
        # [end]
        print("job", job["id"])

        # [listen]
        seq = job["seq"] - 1  # so that its own event is heard, too
        async with aclosing(events(http, url, seq)) as told:
            async for event in told:
                if event["t"] == "reset":
                    break  # what was missed shows in the job itself
                print(event["seq"], event["type"], flush=True)
                seq = event["seq"]
                if event["key"] == job["id"] and event["type"].partition(".")[2] in OVER:
                    break
        done = (await ask(http, "GET", f"{API}/jobs/{job['id']}", params={"min_seq": seq})).json()
        # [end]

        # [file]
        [asset] = done["assets"]
        picture = await ask(http, "GET", asset["url"])
        same = await http.get(asset["url"], headers={"If-None-Match": picture.headers["ETag"]})
        # [end]
        print(len(picture.content), "bytes, again:", same.status_code)

        # [batch]
        faces = [{**wish, "params": {"expression": face}} for face in ("sad", "angry", "serene")]
        batch = (await ask(http, "POST", f"{API}/batch", json={"jobs": faces})).json()
        now = {"min_seq": batch["seq"]}
        state = (await ask(http, "GET", f"{API}/batch/{batch['batch_id']}", params=now)).json()
        await ask(http, "DELETE", f"{API}/batch/{batch['batch_id']}")
        # [end]
        print("batch", state["status"], state["total"])

        # [limit]
        try:
            await ask(http, "POST", f"{API}/batch", json={"jobs": [wish] * 11}, patience=0)
        except Refused as refused:
            print("refused:", refused.problem["code"], refused.problem["limit"])
        # [end]

        # [pages]
        query = {"asset_type": "npc_bust", "limit": "1", "min_seq": str(done["seq"])}
        found = []
        while True:
            page = (await ask(http, "GET", f"{API}/assets", params=query)).json()
            found += page["items"]
            if page["next_cursor"] is None:
                break
            query["cursor"] = page["next_cursor"]
        # [end]
        print("assets", len(found))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
