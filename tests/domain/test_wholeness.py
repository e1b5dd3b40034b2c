"""What a stream says of itself, beside what is remembered of it."""

from __future__ import annotations

import pytest

from factories import meta, submitted
from forge.domain.wholeness import Extent, Landmark, gap, lacking, unlike
from forge.events.envelope import Recorded
from forge.topology import subject

WHOLE = Extent(1, 9)
IDS: dict[int, str | None] = {1: "a", 5: "e", 9: "i"}


@pytest.mark.parametrize("extent", [WHOLE, Extent(0, 0), Extent(1, 0), Extent(1, 1)])
def test_a_stream_from_1_without_holes_lacks_nothing(extent: Extent) -> None:
    assert lacking(extent) is None


@pytest.mark.parametrize(
    ("extent", "said"),
    [
        (Extent(4, 9), "begins at event 4, and the 3 before"),
        (Extent(10, 9), "begins at event 10, and the 9 before"),  # all of it is gone
        (Extent(1, 9, restoring=True), "being restored, as far as event 9"),
        (Extent(1, 9, missing=2), "2 of its events between 1 and 9"),
    ],
)
def test_a_stream_that_says_it_lacks_events_is_believed(extent: Extent, said: str) -> None:
    assert said in (lacking(extent) or "")


def test_a_log_with_every_remembered_event_in_place_is_the_one() -> None:
    assert unlike(WHOLE, [Landmark("the copy", 1, "a"), Landmark("the table", 9, "i")], IDS) is None


def test_nothing_remembered_fits_every_log() -> None:
    assert unlike(WHOLE, [], IDS) is None
    assert unlike(Extent(0, 0), [], {}) is None


def test_a_log_that_ends_before_what_is_remembered_was_shortened() -> None:
    assert unlike(WHOLE, [Landmark("the copy", 12, "l"), Landmark("the table", 9, "i")], IDS) == (
        "it ends at event 9, and the copy has event 12"
    )
    assert (
        unlike(Extent(0, 0), [Landmark("the table", 3, "c")], {}) == "it is empty, and the table has event 3"
    )


def test_another_log_is_told_from_a_shortened_one() -> None:
    """Whichever of them is longer: its event has another id."""
    said = unlike(WHOLE, [Landmark("the table", 12, "l"), Landmark("the copy", 1, "z")], IDS)
    assert said == "it is another log: its event 1 is a, and the copy has z there"
    assert "another log" in (unlike(WHOLE, [Landmark("the copy", 5, "z")], IDS) or "")


def test_of_an_old_checkpoint_only_the_number_is_known() -> None:
    assert unlike(WHOLE, [Landmark("the table", 5)], IDS) is None
    assert unlike(WHOLE, [Landmark("the table", 12)], IDS) == "it ends at event 9, and the table has event 12"


def test_what_the_stream_cannot_show_is_told() -> None:
    assert unlike(WHOLE, [Landmark("the table", 5, "e")], {**IDS, 5: None}) == "event 5 cannot be read"
    assert unlike(WHOLE, [], {1: None, 9: "i"}) == "event 1 cannot be read"


def test_events_follow_one_by_one() -> None:
    three = [Recorded(seq, subject(submitted()), meta(), submitted()) for seq in (4, 5, 6)]
    assert gap(3, three) is None
    assert gap(6, []) is None
    assert gap(2, three) == "event 4 comes right after event 2"
    assert gap(3, [three[0], three[2]]) == "event 6 comes right after event 4"
