"""forge without any I/O: the real rules over a log, a broker and a ComfyUI that are a few lines each.

Every step of a worker between two awaits is a step here, so that a test may put a crash, a redelivery or
somebody else's step between any two of them. The `Auditor` judges from what was written and what was sent,
and shares no rule with forge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar
from uuid import UUID

import msgspec

from factories import NOW, Log, job_id, produced, submitted
from forge.domain import jobs as life
from forge.domain.admission import Grants, demand_hour, demand_places
from forge.domain.dispatch import Choice, Line
from forge.domain.ids import prompt_id
from forge.domain.jobs import Adopt, Cancel, Command, Complete, FailAttempt, Job, Retry, Start, Status
from forge.errors import Conflict, ForgeError, LimitReached, StaleAttempt
from forge.events.catalogue import Event
from forge.events.envelope import Recorded
from forge.events.jobs import (
    JobAdopted,
    JobAttemptFailed,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobRetried,
    JobStarted,
    JobSubmitted,
)

T = TypeVar("T")

PLACES, QUEUED, PER_HOUR = 3, 4, 9
"""Small, so that few steps reach them."""


@dataclass
class Bugs:
    """What is planted."""

    frees_the_place_with_the_lease: bool = False


class Auditor:
    """Judges every event as it is written and every prompt as it is sent.

    Raises:
        AssertionError: names the invariant.
    """

    def __init__(self) -> None:
        self.owner: dict[UUID, str] = {}
        self.state: dict[UUID, str] = {}
        self.attempt: Counter[UUID] = Counter()
        self.worker: dict[UUID, str] = {}
        self.admitted: list[tuple[datetime, str]] = []
        self.posted: Counter[UUID] = Counter()

    def heard(self, event: Event, at: datetime) -> None:
        match event:
            case JobSubmitted():
                assert event.job_id not in self.state, "I-LOST: a job is submitted twice"
                self._admit(event, at)
            case JobRetried():
                assert self.state[event.job_id] == "failed", "I-LOST: retried, and it has not failed"
                self._admit(event, at)
            case JobStarted():
                assert self.state[event.job_id] == "waits", "fence: started, and it does not wait"
                self.attempt[event.job_id] += 1
                assert event.attempt == self.attempt[event.job_id], "fence: attempts are not in a row"
                self.state[event.job_id], self.worker[event.job_id] = "runs", event.worker
            case JobAdopted():
                self._demand_current(event.job_id, event.attempt)
                self.worker[event.job_id] = event.worker
            case JobAttemptFailed():
                self._demand_current(event.job_id, event.attempt)
                self.state[event.job_id] = "waits"
            case JobCompleted() | JobFailed():
                self._demand_current(event.job_id, event.attempt)
                self.state[event.job_id] = "completed" if isinstance(event, JobCompleted) else "failed"
            case JobCancelled():
                assert self.state[event.job_id] in ("waits", "runs"), "I-LOST: ended twice"
                self.state[event.job_id] = "cancelled"
            case _:
                pass

    def _admit(self, event: JobSubmitted | JobRetried, at: datetime) -> None:
        user = event.user_id
        self.owner[event.job_id], self.state[event.job_id] = user, "waits"
        self.admitted.append((at, user))
        queued = sum(
            self.owner[id_] == user for id_, state in self.state.items() if state in ("waits", "runs")
        )
        granted = sum(who == user and when > at - timedelta(hours=1) for when, who in self.admitted)
        assert queued <= QUEUED, f"I-QUOTA: {user} has {queued} jobs"
        assert granted <= PER_HOUR, f"I-QUOTA: {user} was granted {granted} in an hour"

    def _demand_current(self, id_: UUID, attempt: int) -> None:
        current = self.state[id_] == "runs" and attempt == self.attempt[id_]
        assert current, f"fence: a word about attempt {attempt} of a job that {self.state[id_]}"

    def concluded(self, id_: UUID, by: str) -> None:
        assert self.worker[id_] == by, f"fence: {by} concluded what {self.worker[id_]} had"

    def sent(self, prompt: UUID, present: int) -> None:
        self.posted[prompt] += 1
        assert self.posted[prompt] == 1, "I-ONCE: a prompt is drawn twice"
        assert present <= PLACES, f"I-3: {present} prompts at ComfyUI"


@dataclass
class Order:
    """One attempt of a job, in the queue."""

    job: UUID
    attempt: int
    admitted_seq: int
    seq: int
    delivery: int = 0
    """The delivery that has it; 0 for none."""


class Broker:
    """The dispatch queue: three places, one order a job, at least once."""

    def __init__(self, bugs: Bugs) -> None:
        self.bugs = bugs
        self.orders: dict[UUID, Order] = {}
        self._acked: list[Order] = []
        self._ids: set[str] = set()
        self._seq = self._delivery = 0

    def give(self, job: Job, attempt: int, message_id: str) -> bool:
        """Take an order in, or know it already; False when there is no room for it."""
        if message_id in self._ids:
            return True
        if job.id in self.orders or len(self.orders) >= PLACES:
            return False
        self._ids.add(message_id)
        self._acked.clear()
        self._seq += 1
        self.orders[job.id] = Order(job.id, attempt, job.admitted_seq, self._seq)
        return True

    def deliver(self) -> Order | None:
        free = [order for order in self.orders.values() if not order.delivery]
        if not free:
            return None
        self._delivery += 1
        free[0].delivery = self._delivery
        return free[0]

    def ack(self, seq: int) -> None:
        """Whoever says it: the server does not ask who has the message now."""
        for id_, order in list(self.orders.items()):
            if order.seq == seq:
                self._acked.append(self.orders.pop(id_))

    def release(self, seq: int) -> None:
        for order in self.orders.values():
            if order.seq == seq:
                order.delivery = 0

    def expire(self, order: Order) -> None:
        """Nobody renewed the lease: it is for somebody else."""
        order.delivery = 0
        if self.bugs.frees_the_place_with_the_lease:
            del self.orders[order.job]

    def restart(self) -> None:
        """All leases are forgotten, and the last acks, though they were confirmed."""
        for order in self._acked:
            if order.job not in self.orders and len(self.orders) < PLACES:
                self.orders[order.job] = order
        self._acked.clear()
        for order in self.orders.values():
            order.delivery = 0


class Comfy:
    """Prompts that run or wait, and how the others ended."""

    def __init__(self, auditor: Auditor) -> None:
        self.auditor = auditor
        self.present: list[UUID] = []
        self.ended: dict[UUID, bool] = {}

    def post(self, prompt: UUID) -> None:
        self.present.append(prompt)
        self.auditor.sent(prompt, len(self.present))

    def finish(self, prompt: UUID, *, well: bool) -> None:
        self.present.remove(prompt)
        self.ended[prompt] = well

    def cancel(self, prompt: UUID) -> None:
        if prompt in self.present:
            self.present.remove(prompt)

    def forget(self, prompt: UUID) -> None:
        self.ended.pop(prompt, None)

    def die(self) -> None:
        """It comes back and knows nothing."""
        self.present.clear()
        self.ended.clear()


class World:
    """Everything, and who acts in it."""

    def __init__(self, bugs: Bugs | None = None) -> None:
        self.bugs = bugs or Bugs()
        self.now = NOW
        self.log, self.auditor = Log(), Auditor()
        self.broker, self.comfy = Broker(self.bugs), Comfy(self.auditor)
        self.apis = [Api(self), Api(self)]
        self.dispatchers = [Dispatcher(self), Dispatcher(self)]
        self.works: list[Work] = []
        self.asked: list[tuple[UUID, str]] = []
        self.accepted: set[UUID] = set()
        self._newest: Counter[str] = Counter()
        self._workers = 0

    # ------------------------------------------------------------------ the log

    def append(self, event: Event, boundary: str, seen: int) -> Recorded:
        """Raises ``Conflict`` when something newer stands there than was seen."""
        if self._newest[boundary] != seen:
            raise Conflict
        record = self.log.add(event, self.now)
        self._newest[boundary] = record.seq
        self.auditor.heard(event, self.now)
        return record

    def load(self, id_: UUID, admitted_seq: int) -> Loaded:
        admission = self.log.records[admitted_seq - 1]
        assert isinstance(admission.event, JobSubmitted | JobRetried)
        job = life.admitted(admission.event, admission.seq, admission.meta.at)
        seq = 0
        for record in self.facts(id_):
            seq = record.seq
            job = life.evolve(job, record.event, record.meta.at) if seq > admitted_seq else job
        return Loaded(job, f"job {id_}", seq)

    def facts(self, id_: UUID) -> list[Recorded]:
        """What happened to a job since it was let in."""
        return [r for r in self._about(id_) if not isinstance(r.event, JobSubmitted | JobRetried)]

    def admissions_of(self, id_: UUID) -> list[int]:
        return [r.seq for r in self._about(id_) if isinstance(r.event, JobSubmitted | JobRetried)]

    def _about(self, id_: UUID) -> list[Recorded]:
        return [r for r in self.log.records if getattr(r.event, "job_id", None) == id_]

    def act(self, loaded: Loaded, command: Command) -> Loaded:
        """Decide by what was loaded, append, and again on a conflict; errors as `decide` raises them."""
        while True:
            events = life.decide(command, loaded.job)
            if not events:
                return loaded
            [event] = events
            try:
                record = self.append(event, loaded.boundary, loaded.seq)
            except Conflict:
                loaded = self.load(loaded.job.id, loaded.job.admitted_seq)
                continue
            return Loaded(life.evolve(loaded.job, event, self.now), loaded.boundary, record.seq)

    # --------------------------------------------------------------- who acts

    def ask(self, api: int, user: str) -> None:
        """A new request."""
        id_ = job_id(len(self.asked) + 1)
        self.asked.append((id_, user))
        self.ask_again(api, id_, user)

    def ask_again(self, api: int, id_: UUID, user: str) -> None:
        """The same request, at any API: under its key it is the same job."""
        try:
            self.apis[api].submit(id_, user)
        except LimitReached:
            behind = self.apis[api].at < self.log.records[-1].seq  # whoever lags may refuse for a moment
            assert behind or id_ not in self.accepted, "I-LOST: refused after it was accepted"
        else:
            self.accepted.add(id_)

    def cancel(self, id_: UUID) -> None:
        for newest in self.admissions_of(id_)[-1:]:
            with suppress(ForgeError):
                self.act(self.load(id_, newest), Cancel())

    def retry(self, api: int, id_: UUID, user: str) -> None:
        with suppress(ForgeError):
            self.apis[api].retry(id_, user)

    def pull(self) -> bool:
        """A worker takes an order."""
        order = self.broker.deliver()
        if order is not None:
            self._workers += 1
            self.works.append(Work(self, order, f"worker-{self._workers}"))
        return order is not None

    def step(self, work: Work) -> None:
        if not work.step():
            self.works.remove(work)

    def crash(self, work: Work) -> None:
        """Killed: what it had is delivered again when its lease is over."""
        self.works.remove(work)

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def drain(self) -> None:
        """Everything heals and goes on until nothing is left to do.

        Raises:
            AssertionError: it never ends, or not every admission ended once.
        """
        for _ in range(200):
            if not self._unfinished():
                break
            self.pass_time(30)
            for reader in (*self.apis, *self.dispatchers):
                reader.read()
            for dispatcher in self.dispatchers:
                dispatcher.dispatch()
            at_work = {work.delivery for work in self.works}
            for order in list(self.broker.orders.values()):
                if order.delivery and order.delivery not in at_work:
                    self.broker.expire(order)
            while self.pull():
                pass
            for prompt in list(self.comfy.present):
                self.comfy.finish(prompt, well=True)
            for work in list(self.works):
                for _ in range(20):
                    if work in self.works:
                        self.step(work)
        assert not (left := self._unfinished()), f"I-LOST or I-SLOT: {left}"
        ended = set(self.auditor.state.values())
        assert ended <= {"completed", "failed", "cancelled"}, f"I-LOST: {ended}"

    def _unfinished(self) -> str:
        lost = self.accepted - self.auditor.state.keys()
        open_ = [id_ for id_, state in self.auditor.state.items() if state in ("waits", "runs")]
        if not (lost or open_ or self.broker.orders or self.comfy.present):
            return ""
        return f"lost {lost}, open {open_}, orders {self.broker.orders}, prompts {self.comfy.present}"


def _another(line: Line) -> Line:
    """A line restored from this one's snapshot."""
    made = Line()
    made.restore(_carried(line.state()))
    assert made.state() == line.state()
    return made


def _carried(state: T) -> T:
    """A state as it comes back from where it was kept."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=type(state))


@dataclass(frozen=True)
class Loaded:
    """A job as it was when it was read."""

    job: Job
    boundary: str
    seq: int


class Api:
    """Admits, by what it has read of the log so far."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.line, self.grants, self.at = Line(), Grants(), 0

    def read(self, count: int = 10**6) -> None:
        for record in self.world.log.records[self.at : self.at + count]:
            self._apply(record)
            self.at = record.seq

    def start_again(self) -> None:
        """A new process, which begins with a snapshot of what this one knew."""
        grants, self.line, self.grants = self.grants.state(), _another(self.line), Grants()
        self.grants.restore(_carried(grants))

    def submit(self, id_: UUID, user: str) -> None:
        def known() -> bool:
            return id_ in self.line.jobs or bool(self.world.facts(id_))

        self._admit(user, lambda: None if known() else submitted(id_, user))

    def retry(self, id_: UUID, user: str) -> None:
        def again() -> Event:
            if id_ in self.line.jobs:
                raise StaleAttempt("it is not over")
            # where its request stands is all that is known of it; a retry is no fact of the job's own
            first, *_ = self.world.admissions_of(id_) or [0]
            if not first:
                raise StaleAttempt("never admitted")
            [event] = life.decide(Retry(), self.world.load(id_, first).job)
            return event

        self._admit(user, again)

    def _admit(self, user: str, wanted: Callable[[], Event | None]) -> None:
        while True:
            seen = self.line.admission_seq.get(user, 0)
            event = wanted()
            if event is None:
                return
            try:
                demand_places(self.line.queued(user), 1, QUEUED)
                demand_hour(self.grants, user, 1, PER_HOUR, self.world.now)
                record = self.world.append(event, f"admissions of {user}", seen)
            except Conflict:
                self.read()
            else:
                self._apply(record)
                return

    def _apply(self, record: Recorded) -> None:
        if self.line.apply(record):
            self.grants.apply(record)


class Dispatcher:
    """Gives orders, by what it has read of the log and seen in the queue so far."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.line, self.at = Line(), 0
        self.orders: set[UUID] = set()
        self._again = 0

    def read(self, count: int = 10**6) -> None:
        for record in self.world.log.records[self.at : self.at + count]:
            self.line.apply(record)
            self.at = record.seq

    def start_again(self) -> None:
        """A new process, which begins with a snapshot of what this one knew, but for what it gave."""
        self.line = _another(self.line)
        self.orders.clear()

    def dispatch(self, *, look: bool = True) -> None:
        self.line.release(self.world.now)
        if look:
            self._look()
        while self._taken() < PLACES:
            choice = self.line.choose(self._given())
            if choice is None or not self._give(choice):
                return

    def _taken(self) -> int:
        running = {job.id for job in self.line.running()}
        return len(self.orders | running)

    def _given(self) -> list[UUID]:
        jobs = self.line.jobs
        return [id_ for id_ in self.orders if id_ in jobs and jobs[id_].status is Status.PENDING]

    def _give(self, choice: Choice, again: str = "") -> bool:
        job = choice.job
        attempt = job.attempt if job.status is Status.RUNNING else job.attempt + 1
        if not self.world.broker.give(job, attempt, f"{job.id}-{attempt}{again}"):
            self._look()
            return False
        self.orders.add(job.id)
        return True

    def _look(self) -> None:
        there = set(self.world.broker.orders)
        given = [self.line.jobs[id_] for id_ in self._given()]
        lost = [job for job in (*self.line.running(), *given) if job.id not in there]
        self.orders = there
        for job in lost:
            if len(self.orders) < PLACES and job.id not in self.orders:
                self._again += 1
                self._give(Choice(job, "lost"), f"-again-{id(self)}-{self._again}")


class Left(Exception):
    """The attempt ends here without a word: given back, or somebody else has it."""


class Work:
    """One delivery in a worker's hands, as in `workers/attempt.py`; a step is what it does at once."""

    def __init__(self, world: World, order: Order, worker: str) -> None:
        self.world, self.worker = world, worker
        self.job, self.attempt, self.seq = order.job, order.attempt, order.seq
        self.delivery = order.delivery
        self.prompt = prompt_id(order.job, order.attempt)
        self._admitted_seq = order.admitted_seq
        self._doing = self._handle()

    @property
    def held(self) -> bool:
        """Whether the lease is ours."""
        order = self.world.broker.orders.get(self.job)
        return order is not None and order.delivery == self.delivery

    def step(self) -> bool:
        """Go on until the next await; False when there is nothing more to do."""
        try:
            next(self._doing)
        except (StopIteration, Left):
            return False
        return True

    def hear_of_cancellation(self) -> None:
        """Told by the log that the job is cancelled: stop where it is."""
        self._doing = self._withdraw()

    def _handle(self) -> Iterator[None]:
        self.loaded = self._load()
        yield
        try:
            yield from self._flow()
        except StaleAttempt:
            yield from self._withdraw()
        self.world.broker.ack(self.seq)

    def _flow(self) -> Iterator[None]:
        if not self._current():
            raise StaleAttempt
        if self.loaded.job.status is Status.PENDING:
            self._act(Start(self.attempt, self.worker, "http://comfy", ""))
            yield
            self._post()
        elif life.exhausted(self.loaded.job):
            yield from self._fail()
            return
        else:
            self._act(Adopt(self.attempt, self.worker))
        yield
        while self.prompt in self.world.comfy.present:
            if self.world.auditor.state[self.job] == "cancelled":
                raise StaleAttempt  # heard of at the latest while waiting
            yield
        if not self.world.comfy.ended.get(self.prompt):
            yield from self._fail()
            return
        yield
        self._act(Complete(self.attempt, self.worker, (produced(),), self.world.now))
        self.world.auditor.concluded(self.job, self.worker)
        yield
        self.world.comfy.forget(self.prompt)

    def _current(self) -> bool:
        job = self.loaded.job
        return (job.status is Status.PENDING and self.attempt == job.attempt + 1) or (
            job.status is Status.RUNNING and self.attempt == job.attempt
        )

    def _post(self) -> None:
        if not self.held:
            self.world.broker.release(self.seq)
            raise Left
        self.world.comfy.post(self.prompt)

    def _fail(self) -> Iterator[None]:
        mine = self.loaded.job.worker
        self.loaded = self._load()
        yield
        if not self._current() or self.loaded.job.worker != mine:
            raise StaleAttempt
        self.world.comfy.cancel(self.prompt)
        yield
        self._act(FailAttempt(self.attempt, "prompt_failed", "", False, self.world.now))
        yield

    def _withdraw(self) -> Iterator[None]:
        self.loaded = self._load()
        job = self.loaded.job
        yield
        if job.attempt == self.attempt and job.status is Status.RUNNING:
            raise Left
        self.world.comfy.cancel(self.prompt)
        yield
        self.world.broker.ack(self.seq)

    def _load(self) -> Loaded:
        return self.world.load(self.job, self._admitted_seq)

    def _act(self, command: Command) -> None:
        self.loaded = self.world.act(self.loaded, command)
