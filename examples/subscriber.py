"""A game service that hears of every picture that became ready, and misses none.

    forge subscribers add shop                                   # once, as forge's operator
    python examples/subscriber.py nats://127.0.0.1:4222 PASSWORD_FILE shop heard.jsonl

It may be killed at any moment, and so may the server: what was not acked comes again, and what was written
down already is recognised by its id. See docs/SUBSCRIBERS.md.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import nats
from nats.aio.msg import Msg
from nats.errors import Error


class Heard:
    """What this service does with a picture: here it writes it down, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # the last one may be half written
        self.ids = {json.loads(line)["id"] for line in whole}
        self.file = path.open("ab")
        self.file.truncate(sum(map(len, whole)))

    def take(self, message: Msg) -> None:
        assert message.headers is not None
        id_ = message.headers["ce-id"]
        if id_ not in self.ids:
            self.file.write(json.dumps({"id": id_, "asset": json.loads(message.data)}).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())  # before the ack: afterwards it does not come again
            self.ids.add(id_)


async def main(url: str, password: str, name: str, path: str) -> None:
    heard = Heard(Path(path))
    login = {"user": "subscriber", "password": password, "inbox_prefix": "_INBOX_subscriber"}
    nc = await nats.connect(url, **login, max_reconnect_attempts=-1, reconnect_time_wait=0.5)
    subscription = await nc.jetstream().pull_subscribe_bind(name, stream="FORGE_ASSETS_READY")
    while True:
        try:
            [message] = await subscription.fetch(1, timeout=5)
            heard.take(message)
            await message.ack_sync(timeout=5)
        except TimeoutError:
            continue  # nothing new; or an answer was lost, then it comes again
        except Error as error:
            print(f"again in a second: {error!r}", file=sys.stderr)
            await asyncio.sleep(1)


asyncio.run(main(sys.argv[1], Path(sys.argv[2]).read_text().strip(), *sys.argv[3:]))
