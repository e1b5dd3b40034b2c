"""Judges what is left when everything is quiet: the invariants of an accepted request, one function each.

Every function takes :class:`~acceptance.evidence.Evidence` and yields what is wrong, in words.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from acceptance.evidence import ADMISSION, TERMINAL, Evidence, Message

PLACES = 3
QUEUED, SESSION_BYTES, CHARACTER_ASSETS = 10, 2 * 1024**3, 100
THUMBNAILS = (256, 512)
STATUS = {
    "forge.job.submitted.v1": "pending",
    "forge.job.retried.v1": "pending",
    "forge.job.started.v1": "running",
    "forge.job.attempt_failed.v1": "pending",
    "forge.job.completed.v1": "completed",
    "forge.job.failed.v1": "failed",
    "forge.job.cancelled.v1": "cancelled",
}


@dataclass
class Asked:
    """One request as its client knows it; `mark` went along as the session."""

    mark: str
    user: str
    body: dict[str, Any]
    key: str
    answers: list[str] = field(default_factory=list)
    """Job ids of every 202; more than one where it was repeated. Empty: unknown."""
    seq: int = 0
    """What the last 202 said: reads that name it as `min_seq` know of the job."""


def check(evidence: Evidence, asked: Iterable[Asked], given_up: Collection[str] = ()) -> None:
    """Every invariant at once. Simulators that were `given_up` may hold on to what nobody could take away.

    Raises:
        AssertionError: lists everything that is wrong.
    """
    wrong = [
        *lost(evidence, asked),
        *log_is_whole(evidence),
        *made_once(evidence),
        *crowded(evidence, given_up),
        *drawn_twice(evidence),
        *files_and_rows(evidence),
        *uploads_and_rows(evidence),
        *queue_agrees(evidence),
        *left_behind(evidence, given_up),
        *told(evidence),
        *beyond_limits(evidence),
    ]
    assert not wrong, f"{len(wrong)} things are wrong:\n" + "\n".join(wrong[:40])


def by_job(events: Iterable[Message]) -> dict[str, list[Message]]:
    """Job → its events in order."""
    found: dict[str, list[Message]] = defaultdict(list)
    for event in events:
        if event.type.startswith("forge.job."):
            found[event.data["job_id"]].append(event)
    return found


def lost(evidence: Evidence, asked: Iterable[Asked]) -> Iterator[str]:
    """I-LOST: a 202 is one job, an unknown answer none or one, and every admission has exactly one end."""
    jobs = by_job(evidence.events)
    marked: dict[str, list[str]] = defaultdict(list)
    for id_, events in jobs.items():
        marked[events[0].data.get("session_id", "")].append(id_)
    for request in asked:
        ids = set(request.answers)
        if len(ids) > 1:
            yield f"{request.mark} was answered with {len(ids)} different jobs"
        if len(marked[request.mark]) > 1:
            yield f"{request.mark} is {len(marked[request.mark])} jobs in the log"
        if missing := ids - set(marked[request.mark]):
            yield f"{request.mark} was answered with {missing}, of which the log knows nothing"
    for id_, events in jobs.items():
        kinds = [event.type for event in events]
        submissions = kinds.count("forge.job.submitted.v1")
        if submissions != 1 or kinds[0] != "forge.job.submitted.v1":
            yield f"job {id_} was submitted {submissions} times, and begins with {kinds[0]}"
        admissions = sum(kind in ADMISSION for kind in kinds)
        ends = sum(kind in TERMINAL for kind in kinds)
        if ends != admissions or kinds[-1] not in TERMINAL:
            yield f"job {id_} was admitted {admissions} times and ended {ends} times: {kinds}"


def log_is_whole(evidence: Evidence) -> Iterator[str]:
    """Numbers without a gap, and no event twice."""
    if [event.seq for event in evidence.events] != list(range(1, len(evidence.events) + 1)):
        yield "the log has a gap"
    for id_, times in Counter(event.headers.get("ce-id") for event in evidence.events).items():
        if times > 1 or not id_:
            yield f"event {id_} is in the log {times} times"


def made_once(evidence: Evidence) -> Iterator[str]:
    """I-ONCE: each picture of a completed job is one stored and one ready event, one row, one reference."""
    stored = Counter(
        (e.data["job_id"], e.data["position"]) for e in evidence.events if e.type == "forge.asset.stored.v1"
    )
    ready = Counter(
        (e.data["job_id"], e.data["asset_id"]) for e in evidence.events if e.type == "forge.asset.ready.v1"
    )
    references = Counter((str(r["job_id"]), r["position"]) for r in evidence.references)
    wanted: Counter[tuple[str, int]] = Counter()
    for event in evidence.events:
        if event.type != "forge.job.completed.v1":
            continue
        if not event.data["assets"]:
            yield f"job {event.data['job_id']} completed without a picture"
        for position, made in enumerate(event.data["assets"]):
            wanted[event.data["job_id"], position] += 1
            yield from _asset(evidence, event.data["job_id"], made)
            if not ready[event.data["job_id"], made["asset_id"]]:
                yield f"asset {made['asset_id']} of job {event.data['job_id']} was never ready"
    for name, found in (("stored events", stored), ("references", references)):
        if found != wanted:
            yield f"{name} of completed jobs: missing are {wanted - found}, too many {found - wanted}"


def _asset(evidence: Evidence, job: str, made: dict[str, Any]) -> Iterator[str]:
    row = evidence.assets.get(made["asset_id"])
    if row is None:
        yield f"asset {made['asset_id']} of job {job} has no row"
    elif row["content_hash"] != made["content_hash"]:
        yield f"asset {made['asset_id']} of job {job} has another content in its row"


def crowded(evidence: Evidence, given_up: Collection[str] = ()) -> Iterator[str]:
    """I-3: no simulator ever has more than three prompts, and all together neither."""
    for name, lines in evidence.simulators.items():
        if (most := max(line["present"] for line in lines)) > PLACES:
            yield f"{name} had {most} prompts at once"
    working = [name for name in evidence.simulators if name not in given_up]
    moments = ((line["at"], name, line["present"]) for name in working for line in evidence.simulators[name])
    present: dict[str, int] = {}
    for at, where, count in sorted(moments):
        present[where] = count
        if sum(present.values()) > PLACES:
            yield f"all simulators together had {present} at {at}"
            return


def drawn_twice(evidence: Evidence) -> Iterator[str]:
    """No prompt is submitted or executed a second time, whoever died. Only a ComfyUI that died itself has
    forgotten what it was given: its next life may be given it again."""
    for happening in ("submitted", "started"):
        lives: dict[str, list[tuple[str, int]]] = {}
        for name, lines in evidence.simulators.items():
            life = 0
            for line in lines:
                life += line["event"] == "booted"
                if line["event"] == happening:
                    lives.setdefault(line["prompt_id"], []).append((name, life))
        for id_, where in lives.items():
            if len(where) > len(set(where)) or len({name for name, _ in where}) > 1:
                yield f"prompt {id_} was {happening} {len(where)} times: {where}"


def files_and_rows(evidence: Evidence) -> Iterator[str]:
    """I-FILE: every row has its file, every file its row, and its name is its SHA-256.

    Thumbnails are promised nowhere: a killed worker's are made when somebody asks for them.
    """
    for path, digest in evidence.files.items():
        if PurePath(path).stem != digest:
            yield f"{path} holds {digest}"
    rows = {row["file_path"]: row for row in evidence.assets.values()}
    if len(rows) != len(evidence.assets):
        yield "two rows name one file"
    yield from (f"{path} has no file" for path in rows.keys() - evidence.files.keys())
    yield from (f"{path} has no row" for path in evidence.files.keys() - rows.keys())
    yield from (
        f"{path} is not where its hash belongs"
        for path, row in rows.items()
        if row["content_hash"] not in path
    )
    known = {
        str(PurePath("thumbs", *PurePath(path).parts[1:-1], f"{PurePath(path).stem}.{width}.webp"))
        for path in rows
        for width in THUMBNAILS
    }
    yield from (f"{path} belongs to nothing" for path in evidence.thumbnails - known)
    referred = {str(r["asset_id"]) for r in evidence.references}
    yield from (f"asset {id_} has no reference" for id_ in evidence.assets.keys() - referred)
    yield from (f"a reference names asset {id_}, which is none" for id_ in referred - evidence.assets.keys())


def uploads_and_rows(evidence: Evidence) -> Iterator[str]:
    """I-FILE of pictures that users sent. A file may outlive its row by a grace, a row never its file."""
    alive: dict[str, dict[str, Any]] = {}
    known: set[str] = set()
    for event in evidence.events:
        if event.type == "forge.upload.stored.v1":
            alive[event.data["upload_id"]] = event.data
            known.add(event.data["file_path"])
        elif event.type == "forge.upload.expired.v1":
            alive.pop(event.data["upload_id"], None)
    if alive.keys() != evidence.uploads.keys():
        yield f"the log has uploads {sorted(alive)}, the table {sorted(evidence.uploads)}"
    for id_, row in evidence.uploads.items():
        if row["file_path"] not in evidence.upload_files:
            yield f"upload {id_} has no file"
    for path, digest in evidence.upload_files.items():
        if PurePath(path).stem != digest:
            yield f"{path} holds {digest}"
        if path not in known:
            yield f"{path} belongs to no upload"


def queue_agrees(evidence: Evidence) -> Iterator[str]:
    """The table of jobs says what the log says."""
    last = evidence.events[-1].seq if evidence.events else 0
    for name in ("queue", "inventory", "stats", "uploads"):
        if evidence.checkpoints.get(name, 0) != last:
            yield f"{name} is at {evidence.checkpoints.get(name)}, the log at {last}"
    jobs = by_job(evidence.events)
    yield from (f"job {id_} has a row and no event" for id_ in evidence.jobs.keys() - jobs.keys())
    for id_, events in jobs.items():
        row = evidence.jobs.get(id_)
        if row is None:
            yield f"job {id_} has no row"
            continue
        expected = _told_by(events)
        found = {column: row[column] for column in expected}
        if found != expected:
            yield f"job {id_}: the row says {found}, the log {expected}"


def _told_by(events: list[Message]) -> dict[str, Any]:
    first = events[0].data
    states = [STATUS[event.type] for event in events if event.type in STATUS]
    starts = [event for event in events if event.type == "forge.job.started.v1"]
    ends = [event for event in events if event.type in TERMINAL]
    over = events[-1].type in TERMINAL
    return {
        "status": states[-1],
        "attempts": starts[-1].data["attempt"] if starts else 0,
        "user_id": first["user_id"],
        "session_id": first.get("session_id"),
        "priority": first["priority"],
        "job_type": first["job_type"],
        "created_at": events[0].at,
        "started_at": starts[-1].at if starts else None,
        "completed_at": ends[-1].at if over else None,
        "locked_by": None if over else (starts[-1].data["worker"] if states[-1] == "running" else None),
        "seq": max(
            event.seq
            for event in events
            if event.type in STATUS or event.type in ("forge.job.adopted.v1", "forge.job.redirected.v1")
        ),
    }


def left_behind(evidence: Evidence, given_up: Collection[str] = ()) -> Iterator[str]:
    """I-TMP and I-SLOT: no temporary files, no orders, no prompts."""
    yield from (f"{name} is left in tmp" for name in evidence.leftovers)
    yield from (f"{subject} is left in the dispatch queue" for subject in evidence.orders)
    for name, lines in evidence.simulators.items():
        if lines[-1]["present"] and name not in given_up:
            yield f"{name} still has {lines[-1]['present']} prompts"
    for name, folders in evidence.left_at_comfyui.items():
        if name not in given_up:
            yield from (f"{name} still has {folder}" for folder in folders)


def told(evidence: Evidence) -> Iterator[str]:
    """I-SUB: the public stream has each ready asset once, in the order of the log, as a CloudEvent."""
    ready = [event for event in evidence.events if event.type == "forge.asset.ready.v1"]
    if [m.headers.get("ce-id") for m in evidence.public] != [event.headers["ce-id"] for event in ready]:
        yield f"{len(evidence.public)} public events are not the {len(ready)} ready ones of the log, in order"
    for message in evidence.public:
        data, headers = message.data, message.headers
        subject = f"forge.public.asset.{data['asset_type']}.{data['asset_id']}.ready"
        if message.subject != subject:
            yield f"{message.subject} should be {subject}"
        expected = {
            "ce-specversion": "1.0",
            "ce-type": "forge.asset.ready.v1",
            "content-type": "application/json",
        }
        if {name: headers.get(name) for name in expected} != expected:
            yield f"{message.subject} is no CloudEvent: {headers}"
        if not all(headers.get(name) for name in ("ce-source", "ce-subject", "ce-time")):
            yield f"{message.subject} lacks attributes: {json.dumps(headers)}"


def beyond_limits(evidence: Evidence) -> Iterator[str]:
    """I-QUOTA: at no event of the log has a user more than ten jobs that are not over, a session more than
    2 GiB, a character more than a hundred assets; and the balances in the events are the sums."""
    queued: Counter[str] = Counter()
    bytes_: Counter[str] = Counter()
    assets: Counter[str] = Counter()
    for event in evidence.events:
        data = event.data
        session, character = data.get("session_id"), data.get("character_id")
        if event.type in ADMISSION or event.type in TERMINAL:
            queued[data["user_id"]] += 1 if event.type in ADMISSION else -1
            if queued[data["user_id"]] > QUEUED:
                yield f"{data['user_id']} has {queued[data['user_id']]} jobs at {event.seq}"
        elif event.type == "forge.asset.stored.v1" and session:
            bytes_[session] += data["file_size_bytes"]
            yield from _balance(event, "session_bytes", bytes_[session], SESSION_BYTES)
        elif event.type == "forge.session.released.v1":
            bytes_[session] -= data["released_bytes"]
            yield from _balance(event, "session_bytes", bytes_[session], SESSION_BYTES)
        elif event.type == "forge.asset.ready.v1" and character:
            assets[character] += 1
            yield from _balance(event, "character_assets", assets[character], CHARACTER_ASSETS)
        elif event.type in ("forge.asset.deleted.v1", "forge.asset.expired.v1") and character:
            assets[character] -= data.get("pictures", 1)
            yield from _balance(event, "character_assets", assets[character], CHARACTER_ASSETS)


def _balance(event: Message, name: str, sum_: int, most: int) -> Iterator[str]:
    if not 0 <= sum_ <= most:
        yield f"{name} are {sum_} at {event.seq}"
    if event.data.get(name) != sum_:
        yield f"event {event.seq} says {name} are {event.data.get(name)}, they are {sum_}"
