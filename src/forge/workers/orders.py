"""The order: what lies in the dispatch queue from the moment a job is given until its outcome is in the log.

An order is one attempt of one job. It is not a second truth: lost or doubled, it is recognised against the
job's events.
"""

from __future__ import annotations

from uuid import UUID

import msgspec


class Order(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt to run; the sequences say where the job's request and last admission stand in the log.

    ``drawn_at`` is where a job with the same recipe was completed, 0 if none is known; ``traceparent`` is the
    trace that giving it was part of, if any.
    """

    job_id: UUID
    user_id: str
    attempt: int
    submitted_seq: int
    admitted_seq: int
    reason: str
    drawn_at: int = 0
    traceparent: str = ""


_decoder = msgspec.json.Decoder(Order)


def encode(order: Order) -> bytes:
    return msgspec.json.encode(order)


def decode(data: bytes) -> Order:
    """Raises ``msgspec.ValidationError`` on what is no order."""
    return _decoder.decode(data)
