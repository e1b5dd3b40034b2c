"""Everything at once: two of each worker, parts killed, frozen and cut off at random, ComfyUI misbehaving,
players who change their minds. Then it heals and all invariants hold. `FORGE_TEST_SCALE` makes it longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from acceptance import chaos
from acceptance.players import SCALE, SEED
from acceptance.system import say

SECONDS = 15.0


@pytest.mark.timeout(400 * max(1, SCALE))
@pytest.mark.fault("K1", "K2", "K3", "K4", "K5", "K6", "K7", "H1", "H2", "H3", "H4", "H5", "N1", "N2")
async def test_whatever_happens_every_request_ends_once(root: Path) -> None:
    say(f"FORGE_TEST_SEED={SEED}")
    await chaos.run(root, SEED, SECONDS * SCALE, say)
