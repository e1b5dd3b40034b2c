"""A log that a newer forge has written to: an older one says so and ends, and skips nothing."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import nats
import pytest

from acceptance.players import ask_until_answered, request
from acceptance.settling import settled, watching
from acceptance.system import running
from waiting import wait_until

READERS = {"api", "dispatcher", "projector"}
"""Who follows the whole log."""


@pytest.mark.timeout(240)
async def test_what_a_newer_forge_wrote_is_refused_by_name(root: Path) -> None:
    async with running(root, render_ms="20-60") as system, watching(system) as witness:
        async with system.client("mei") as mei:
            asked = request("mei")
            await ask_until_answered(mei, asked)
        first = (await settled(witness, [asked])).events[0]
        nc = await nats.connect(system.nats.url)
        known = {name: value for name, value in first.headers.items() if name.startswith("ce-")}
        newer = known | {"ce-type": "forge.job.submitted.v9", "ce-id": str(uuid4())}
        subject = first.subject.rpartition(".")[0] + ".somebody"
        ack = await nc.jetstream().publish(subject, b"{}", headers=newer)
        await nc.close()

        def refused() -> set[str]:
            return {death.split()[0] for death in system.deaths if death.endswith(" with status 2")}

        await wait_until(lambda: refused() >= READERS, 90, "every reader has ended with status 2")
        for name in READERS:
            said = system.process(name).log.read_text()
            assert "'forge.job.submitted.v9' is newer than this forge" in said, said[-2000:]
            assert "upgrade it" in said
        assert await witness.checkpoint() < ack.seq, "the tables stop before it"
