"""The rules as a whole, against crashes, redelivery, lost acks, late results, cancellations and repeats.

`domain/world.py` is the world they act in. A bug planted in it, or in the rules, has to be found.
"""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from domain.world import Bugs, Work, World
from forge.domain import jobs as life

USERS = ("mei", "lan")
first_or_second = st.integers(0, 1)
nth = st.integers(0, 30)


class WorldMachine(RuleBasedStateMachine):
    """One step of somebody's at a time, in any order; in the end everything heals."""

    bugs, busy = Bugs(), False

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.bugs)
        if self.busy:
            self._work([user for user in USERS for _ in range(3)], steps=3)

    # ----------------------------------------------------------------- clients

    @rule(api=first_or_second, users=st.lists(st.sampled_from(USERS), min_size=1, max_size=4))
    def asked(self, api: int, users: list[str]) -> None:
        for user in users:
            self.world.ask(api, user)

    @precondition(lambda self: self.world.asked)
    @rule(api=first_or_second, nth=nth)
    def asked_again(self, api: int, nth: int) -> None:
        self.world.ask_again(api, *self._asked(nth))

    @precondition(lambda self: self.world.asked)
    @rule(nth=nth)
    def cancelled(self, nth: int) -> None:
        self.world.cancel(self._asked(nth)[0])

    @precondition(lambda self: self.world.works)
    @rule(nth=nth)
    def cancelled_at_work(self, nth: int) -> None:
        self.world.cancel(self.world.works[nth % len(self.world.works)].job)

    @precondition(lambda self: "failed" in self.world.auditor.state.values())
    @rule(api=first_or_second, nth=nth)
    def retried(self, api: int, nth: int) -> None:
        self.world.retry(api, *self._asked(nth))

    @rule(users=st.lists(st.sampled_from(USERS), max_size=5), steps=st.integers(0, 4))
    def work_goes_on_as_it_should(self, users: list[str], steps: int) -> None:
        """Without it too few searches come to where every place is taken."""
        self._work(users, steps)

    # ----------------------------------------------------------------- readers

    @rule(which=first_or_second, count=st.integers(1, 20))
    def an_api_reads(self, which: int, count: int) -> None:
        self.world.apis[which].read(count)

    @rule(which=first_or_second, count=st.integers(0, 20), look=st.booleans())
    def a_dispatcher_gives(self, which: int, count: int, look: bool) -> None:
        self.world.dispatchers[which].read(count)
        self.world.dispatchers[which].dispatch(look=look)

    @rule(which=first_or_second)
    def an_api_starts_again(self, which: int) -> None:
        self.world.apis[which].start_again()

    @rule(which=first_or_second)
    def a_dispatcher_starts_again(self, which: int) -> None:
        self.world.dispatchers[which].start_again()

    # ----------------------------------------------------------------- workers

    @rule()
    def orders_are_pulled(self) -> None:
        self._pull()

    @precondition(lambda self: self.world.works)
    @rule(nth=nth, steps=st.integers(1, 4))
    def a_worker_goes_on(self, nth: int, steps: int) -> None:
        work = self.world.works[nth % len(self.world.works)]
        self._goes_on(work, steps)

    @precondition(lambda self: self.world.works)
    @rule(steps=st.integers(1, 4))
    def all_workers_go_on(self, steps: int) -> None:
        self._all_go_on(steps)

    @precondition(lambda self: self.world.works)
    @rule(nth=nth)
    def a_worker_hears_of_its_cancellation(self, nth: int) -> None:
        work = self.world.works[nth % len(self.world.works)]
        if self.world.auditor.state[work.job] == "cancelled":
            work.hear_of_cancellation()

    # ------------------------------------------------------------------ faults

    @precondition(lambda self: self.world.works)
    @rule(nth=nth)
    def a_worker_is_killed(self, nth: int) -> None:
        self.world.crash(self.world.works[nth % len(self.world.works)])

    @precondition(lambda self: self.world.broker.orders)
    @rule(nth=nth)
    def a_lease_ends(self, nth: int) -> None:
        orders = list(self.world.broker.orders.values())
        self.world.broker.expire(orders[nth % len(orders)])

    @rule()
    def the_broker_is_killed(self) -> None:
        self.world.broker.restart()

    @precondition(lambda self: self.world.comfy.present)
    @rule(nth=nth, well=st.booleans())
    def a_prompt_ends(self, nth: int, well: bool) -> None:
        present = self.world.comfy.present
        self.world.comfy.finish(present[nth % len(present)], well=well)

    @rule()
    def comfyui_is_killed(self) -> None:
        self.world.comfy.die()

    @rule(seconds=st.sampled_from([1, 15, 120, 1900]))
    def time_passes(self, seconds: int) -> None:
        self.world.pass_time(seconds)

    def teardown(self) -> None:
        self.world.drain()

    def _work(self, users: list[str], steps: int) -> None:
        for user in users:
            self.world.ask(0, user)
        for dispatcher in self.world.dispatchers:
            dispatcher.read()
            dispatcher.dispatch()
        self._pull()
        self._all_go_on(steps)

    def _pull(self) -> None:
        while self.world.pull():
            pass

    def _all_go_on(self, steps: int) -> None:
        for work in reversed(self.world.works.copy()):  # the newest first: what is late is interesting
            self._goes_on(work, steps)

    def _goes_on(self, work: Work, steps: int) -> None:
        for _ in range(steps):
            if work in self.world.works:
                self.world.step(work)

    def _asked(self, nth: int) -> tuple[UUID, str]:
        return self.world.asked[nth % len(self.world.asked)]


TestWorld = WorldMachine.TestCase
TestWorld.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)

SEARCH = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)
SEARCHES = 20
"""Many short searches with fixed seeds: a long one may stay in a corner for its whole length."""


def _found(bugs: Bugs) -> str:
    for nth in range(SEARCHES):
        machine = seed(nth)(type("Planted", (WorldMachine,), {"bugs": bugs, "busy": True}))
        try:
            run_state_machine_as_test(machine, settings=SEARCH)
        except AssertionError as found:
            return str(found)
    return "nothing"


def test_a_place_that_is_freed_with_the_lease_is_found() -> None:
    assert "I-3" in _found(Bugs(frees_the_place_with_the_lease=True))


def test_attempts_without_a_fence_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "_require_current", lambda *_: None)
    assert "fence" in _found(Bugs())


def test_results_of_a_worker_that_lost_its_attempt_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "_require_own", lambda job, attempt, _: life._require_current(job, attempt))
    assert "fence" in _found(Bugs())
