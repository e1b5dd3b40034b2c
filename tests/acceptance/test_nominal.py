"""200 jobs of 20 users: all complete, three at a time, in the order the rules give, each stored once.

The checker that says so is itself put to the test: every bug planted into its evidence has to be found.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from acceptance.checker import Asked, check, drawn_twice
from acceptance.evidence import Evidence, Message
from acceptance.order import out_of_turn
from acceptance.players import ask_until_answered, request, scaled
from acceptance.settling import ends, settled, watching
from acceptance.system import running, say
from forge.asyncapi import document
from schemas import Described

USERS = 20
KINDS = ("ui_icon", "character_portrait", "npc_bust", "fate_card")


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    dice = random.Random(20)
    kinds = dice.choices(KINDS, k=scaled(120))
    return [
        request(f"user-{nth % USERS}", priority=dice.randint(1, 10), job_type=kind)
        for nth, kind in enumerate(kinds)
    ]


@pytest.fixture(scope="module")
async def evidence(module_root: Path, asked: list[Asked]) -> AsyncIterator[Evidence]:
    """What is there when all is done, checked against every invariant."""
    async with running(module_root, workers=("projector",)) as system, watching(system) as witness:
        async with system.client() as client:
            for one in asked:
                await ask_until_answered(client, one)
        system.start("dispatcher", "generation", "housekeeping")  # all wait before the first may start
        evidence = await settled(witness, asked, timeout=250)
        assert system.deaths == []
        yield evidence


@pytest.mark.timeout(330)  # the first one waits for the whole run
def test_all_complete_with_a_picture_each(evidence: Evidence, asked: list[Asked]) -> None:
    assert Counter(ends(evidence)) == {"completed": len(asked)}
    assert len(evidence.assets) == len(evidence.files) == len(evidence.references) == len(asked)


def test_every_message_is_as_the_asyncapi_document_says(evidence: Evidence) -> None:
    described = Described(document())
    messages = [*evidence.events, *evidence.public]
    wrong = [fault for one in messages for fault in described.faults(one.type, one.headers, one.data)]
    assert wrong == []
    assert len({one.type for one in messages}) >= 5


def test_each_is_drawn_once_at_its_first_attempt(evidence: Evidence, asked: list[Asked]) -> None:
    drawn = [line for line in evidence.simulators["sim"] if line["event"] == "started"]
    assert len(drawn) == len(asked)
    assert {event.data["attempt"] for event in _of(evidence, "started")} == {1}


def test_starts_follow_priority_and_turn_and_say_so(evidence: Evidence) -> None:
    wrong = list(out_of_turn(evidence.events))
    assert not wrong, "\n".join(wrong[:10])
    reasons = [event.data["reason"] for event in _of(evidence, "started")]
    assert all("priority" in reason and "turn" in reason and "backend" in reason for reason in reasons)


def test_comfyui_has_the_next_prompt_before_it_needs_it(evidence: Evidence) -> None:
    """While work waits, two prompts and more are there most of the time, and hardly ever none."""
    lines = [line for line in evidence.simulators["sim"] if line["event"] != "booted"]
    last = [line["at"] for line in lines if line["event"] == "submitted"][-1]
    shares: Counter[int] = Counter()
    for line, following in pairwise(lines):
        if following["at"] <= last:
            shares[line["present"]] += following["at"] - line["at"]
    total = sum(shares.values())
    told = {present: round(seconds / total, 3) for present, seconds in sorted(shares.items())}
    say(f"prompts present, share of {total:.0f} s: {told}")
    assert (shares[2] + shares[3]) / total > 0.8, told
    assert shares[0] / total < 0.05, told


# ------------------------------------------------------------- planted bugs


def _end_is_missing(e: Evidence) -> None:
    e.events.remove(next(_of(e, "completed")))


def _ended_twice(e: Evidence) -> None:
    e.events.append(next(_of(e, "completed")))


def _event_twice(e: Evidence) -> None:
    last = e.events[-1]
    e.events.append(replace(last, seq=last.seq + 1))


def _row_is_missing(e: Evidence) -> None:
    e.assets.popitem()


def _reference_twice(e: Evidence) -> None:
    e.references.append(e.references[0])


def _reference_is_missing(e: Evidence) -> None:
    e.references.pop()


def _file_is_missing(e: Evidence) -> None:
    e.files.popitem()


def _file_of_nobody(e: Evidence) -> None:
    e.files[f"assets/00/00/{'0' * 64}.png"] = "0" * 64


def _file_is_damaged(e: Evidence) -> None:
    e.files[next(iter(e.files))] = "0" * 64


def _thumbnail_of_nobody(e: Evidence) -> None:
    e.thumbnails.add(f"thumbs/00/00/{'0' * 64}.256.webp")


def _a_fourth_prompt(e: Evidence) -> None:
    e.simulators["sim"][5]["present"] = 4


def _four_in_two_places(e: Evidence) -> None:
    full = next(line for line in e.simulators["sim"] if line["present"] == 3)
    e.simulators["sim2"] = [
        {"event": "submitted", "at": full["at"], "present": 1, "prompt_id": "x"},
        {"event": "ended", "at": full["at"] + 0.001, "present": 0, "prompt_id": "x"},
    ]


def _drawn_twice(e: Evidence) -> None:
    e.simulators["sim"].insert(9, next(x for x in e.simulators["sim"] if x["event"] == "started"))


def _drawn_at_two_places(e: Evidence) -> None:
    e.simulators["sim2"] = [next(x for x in e.simulators["sim"] if x["event"] == "started")]


def _prompt_is_left(e: Evidence) -> None:
    e.simulators["sim"][-1]["present"] = 1


def _file_is_left_in_tmp(e: Evidence) -> None:
    e.leftovers.append("half-a-picture")


def _file_is_left_at_comfyui(e: Evidence) -> None:
    e.left_at_comfyui["sim"].append("output/forge/a-job")


def _order_is_left(e: Evidence) -> None:
    e.orders.append("forge.dispatch.main.x")


def _row_disagrees(e: Evidence) -> None:
    next(iter(e.jobs.values()))["status"] = "running"


def _tables_are_behind(e: Evidence) -> None:
    e.checkpoints["inventory"] -= 1


def _nobody_was_told(e: Evidence) -> None:
    e.public.pop()


def _told_in_another_order(e: Evidence) -> None:
    e.public[3], e.public[4] = e.public[4], e.public[3]


def _no_cloud_event(e: Evidence) -> None:
    del e.public[0].headers["ce-source"]


def _an_eleventh_job(e: Evidence) -> None:
    admitted = list(_of(e, "submitted"))[:11]
    for event in admitted:
        event.data["user_id"] = "greedy"


def _a_balance_is_wrong(e: Evidence) -> None:
    next(event for event in e.events if event.type == "forge.asset.stored.v1").data["session_bytes"] += 1


def _a_session_holds_too_much(e: Evidence) -> None:
    stored = next(event for event in e.events if event.type == "forge.asset.stored.v1")
    stored.data["session_bytes"] = stored.data["file_size_bytes"] = 2 * 1024**3 + 1


BUGS = (
    _an_eleventh_job,
    _a_balance_is_wrong,
    _a_session_holds_too_much,
    _end_is_missing,
    _ended_twice,
    _event_twice,
    _row_is_missing,
    _reference_twice,
    _reference_is_missing,
    _file_is_missing,
    _file_of_nobody,
    _file_is_damaged,
    _thumbnail_of_nobody,
    _a_fourth_prompt,
    _four_in_two_places,
    _drawn_twice,
    _drawn_at_two_places,
    _prompt_is_left,
    _file_is_left_in_tmp,
    _file_is_left_at_comfyui,
    _order_is_left,
    _row_disagrees,
    _tables_are_behind,
    _nobody_was_told,
    _told_in_another_order,
    _no_cloud_event,
)


@pytest.mark.parametrize("plant", BUGS, ids=lambda bug: bug.__name__.strip("_"))
def test_the_checker_finds_a_planted_bug(
    plant: Callable[[Evidence], None], evidence: Evidence, asked: list[Asked]
) -> None:
    spoilt = copy.deepcopy(evidence)
    plant(spoilt)
    with pytest.raises(AssertionError, match="wrong"):
        check(spoilt, asked)


def test_the_checker_finds_lost_and_doubled_requests(evidence: Evidence, asked: list[Asked]) -> None:
    first, second = asked[:2]
    for answers in ([*first.answers, *second.answers], second.answers, ["nowhere"]):
        with pytest.raises(AssertionError, match=first.mark):
            check(evidence, [replace(first, answers=answers)])
    twin = copy.deepcopy(evidence)
    one, other = list(_of(twin, "submitted"))[:2]
    other.data["session_id"] = one.data["session_id"]
    with pytest.raises(AssertionError, match="is 2 jobs in the log"):
        check(twin, asked)


def test_what_a_comfyui_forgot_when_it_died_may_be_given_to_it_again(evidence: Evidence) -> None:
    again = copy.deepcopy(evidence)
    given = [x for x in again.simulators["sim"] if x["event"] in ("submitted", "started")][:2]
    again.simulators["sim"] += [{"event": "booted"}, *given]
    assert list(drawn_twice(again)) == []


def test_the_order_is_told_from_its_opposite(evidence: Evidence) -> None:
    assert any(out_of_turn(evidence.events[::-1]))
    spoilt: list[Any] = list(evidence.events)
    starts = [nth for nth, event in enumerate(spoilt) if event.type == "forge.job.started.v1"]
    early, late = starts[10], starts[20]
    spoilt[early], spoilt[late] = spoilt[late], spoilt[early]
    assert any(out_of_turn(spoilt)), "two that were ten starts apart"


def _of(evidence: Evidence, kind: str) -> Iterator[Message]:
    return (event for event in evidence.events if event.type == f"forge.job.{kind}.v1")
