"""How far the book may be closed, and what is known of closed events."""

from __future__ import annotations

from uuid import uuid4

import pytest

from forge.domain.closing import MARK, Bound, Known, Mark, mark_of, refusal
from forge.domain.wholeness import Extent, lacking


def test_a_mark_is_read_as_it_was_written() -> None:
    mark = Mark(7, "ab" * 32)
    assert mark_of({MARK: mark.text()}) == mark
    assert mark_of({"other": "1"}) == Mark()


def test_a_log_may_begin_where_its_book_is_closed() -> None:
    assert lacking(Extent(8, 20, closed=Mark(7))) is None
    assert lacking(Extent(1, 20, closed=Mark(7))) is None, "closed, and not trimmed yet"
    assert "it begins at event 9" in (lacking(Extent(9, 20, closed=Mark(7))) or "")


@pytest.mark.parametrize(
    ("through", "why"),
    [(0, "nothing before"), (20, "newest stays"), (21, "newest stays"), (13, "b is at event 12"), (12, None)],
)
def test_the_book_closes_behind_everybody(through: int, why: str | None) -> None:
    found = refusal(through, 20, [Bound("a", 15), Bound("b", 12)])
    assert found is None if why is None else why in (found or "")


def test_what_was_taken_in_is_known_and_little_else() -> None:
    known = Known.of(4000)
    jobs = [str(uuid4()) for _ in range(1000)]
    for job in jobs:
        known.add(f"forge.evt.job.mei.{job}.1.started")
    again = Known(bytearray(known.bits))
    assert all(again.may_have(f"forge.evt.job.mei.{job}.>") for job in jobs)
    assert all(again.may_have(f"forge.evt.job.*.{job}.>") for job in jobs)
    assert sum(again.may_have(f"forge.evt.job.mei.{uuid4()}.>") for _ in range(1000)) < 10
    assert not again.may_have("forge.evt.session.mei")
