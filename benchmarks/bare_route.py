"""The yardstick of acceptance: a route that decodes the body and awaits one JetStream publish, and no more.

``python -m benchmarks.bare_route NATS_URL PORT MESSAGE_BYTES``. The server around it is set as forge's own;
the message is as large as forge's event with its headers, on a stream of its own on the same NATS server.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import nats
import uvicorn
import uvloop
from litestar import Litestar, Request, get, post
from litestar.datastructures import State

from benchmarks.asked import SUBMIT
from forge.api.schemas import SubmitJob

STREAM = "BENCH_ROUTE"
SUBJECT = "bench.route"

_body = msgspec.json.Decoder(SubmitJob)


class Accepted(msgspec.Struct):
    job_type: str
    seq: int


@post(SUBMIT, status_code=202)
async def submit(request: Request[Any, Any, Any]) -> Accepted:
    asked = _body.decode(await request.body())
    state = request.app.state
    ack = await state.js.publish(SUBJECT, state.payload)
    return Accepted(asked.job_type, ack.seq)


@get("/livez")
async def livez() -> None:
    return None


async def serve(nats_url: str, port: int, message_bytes: int) -> None:
    nc = await nats.connect(nats_url)
    js = nc.jetstream()
    await js.add_stream(name=STREAM, subjects=[SUBJECT])
    state = State({"js": js, "payload": bytes(message_bytes)})
    app = Litestar([submit, livez], state=state, openapi_config=None, logging_config=None)
    config = uvicorn.Config(
        app, port=port, loop="none", http="httptools", access_log=False, log_config=None, server_header=False
    )
    await uvicorn.Server(config).serve()
    await nc.close()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
