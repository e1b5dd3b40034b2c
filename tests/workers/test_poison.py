"""Orders that no dispatcher gave: they are thrown out and named, and hold no place."""

from __future__ import annotations

import logging
from uuid import uuid4

import pytest

from forge.topology import order as order_subject
from forge.workers.orders import Order, encode
from workers.works import Works

POISON = {
    "no JSON": b"\xff\x00 hello",
    "no order": b'{"job_id": 7}',
    "nobody's job": encode(
        Order(job_id=uuid4(), user_id="mei", attempt=1, submitted_seq=0, admitted_seq=0, reason="")
    ),
    "somebody else's event": encode(
        Order(job_id=uuid4(), user_id="m\x00i >", attempt=1, submitted_seq=1, admitted_seq=1, reason="")
    ),
}


@pytest.mark.fault("B3")
@pytest.mark.parametrize("kind", POISON)
async def test_poison_orders_are_thrown_out_and_the_next_job_runs(
    kind: str, works: Works, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):  # one for every place
        await works.nc.request(order_subject(uuid4()), POISON[kind], timeout=10)
    job = await works.submit()
    with caplog.at_level(logging.ERROR, "forge.generation"):
        await works.start_worker()
        await works.happened(job, "completed")
    assert sum("thrown out" in record.message for record in caplog.records) == 3
