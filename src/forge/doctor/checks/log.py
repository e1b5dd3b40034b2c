"""NATS, its streams and the log in them."""

from __future__ import annotations

from forge.doctor.facts import Away, Facts, Follower, Greeting, Server, seen
from forge.doctor.findings import Level, Verdict, Verdicts, dotted, failure, ok, warning
from forge.topology import EVENTS, Standing

MUCH_LAG = 100
"""Messages that a follower may lack while more come in: it is told of them after its leader has them."""

NATS_AT_LEAST = (2, 12)
"""Atomic batches came with it."""


def nats(facts: Facts) -> Verdicts:
    away = {url: of for url, of in facts.nats_servers.items() if isinstance(of, Away)}
    if isinstance(facts.nats, Away):
        told = {of.why: of for of in (*away.values(), facts.nats)}.values()
        yield from (failure(of.why, of.remedy or _start(facts)) for of in told)
    elif _too_few(facts) or isinstance(facts.standings, Away):
        yield _leaderless(facts, away)
    else:
        for of in away.values():
            yield warning(f"{of.why}; the others hold the log meanwhile", of.remedy or _start(facts))
        yield from _greetings(facts, facts.nats)


def _start(facts: Facts) -> str:
    if len(facts.nats_servers) > 1:
        return "start nats-server there with nats/cluster.conf, or take it out of FORGE_NATS_URL"
    return "start nats-server with nats/nats-server.conf, or point FORGE_NATS_URL at the one that runs"


def _too_few(facts: Facts) -> bool:
    """Whether so many servers are away that the others cannot agree on anything."""
    answers = [isinstance(of, Greeting) for of in facts.nats_servers.values()]
    return answers.count(False) > answers.count(True)


def _leaderless(facts: Facts, away: dict[str, Away]) -> Verdict:
    count = len(facts.nats_servers)
    if away:
        what = "; ".join(of.why for of in away.values())
        said = (
            f"{count - len(away)} of {count} servers answer, too few to agree, so nothing is accepted: {what}"
        )
        return failure(said, next((of.remedy for of in away.values() if of.remedy), _start(facts)))
    why = facts.standings.why if isinstance(facts.standings, Away) else ""
    if count > 1:
        return failure(
            f"all servers answer, and none leads, so nothing is accepted: {why}",
            "they have to reach each other: same FORGE_NATS_ROUTES and FORGE_NATS_ROUTE_PASSWORD, its port "
            "open between them; their logs say `route`. All well there: restart them one after the other",
        )
    return failure(f"JetStream gives no answer: {why}", "look at the log of that nats-server, and restart it")


def _greetings(facts: Facts, server: Server) -> Verdicts:
    """What the servers that answer say of themselves."""
    there = {url: of for url, of in facts.nats_servers.items() if isinstance(of, Greeting)}
    clusters = {of.cluster for of in there.values()}
    oldest = min(of.version for of in there.values())
    said, tested = f"nats-server {dotted(oldest)} at {server.where}", dotted(facts.tested_nats)
    if len(there) > 1 and (len(clusters) > 1 or clusters == {""}):
        each = ", ".join(f"{url}: {of.cluster or 'none'}" for url, of in there.items())
        yield failure(
            f"FORGE_NATS_URL lists servers that are not one cluster, each with a log of its own ({each})",
            "name in it the servers of one cluster, or one that stands alone",
        )
    elif oldest < NATS_AT_LEAST:
        yield failure(f"{said} knows no atomic batches", f"run nats-server {tested}")
    elif oldest[:2] < facts.tested_nats[:2]:
        yield warning(f"{said} is older than what forge is tested with", f"run nats-server {tested}")
    else:
        leader = "" if clusters == {""} else _leader(facts)  # one that stands alone leads by its number
        yield ok(f"{said}, {leader} leads the log" if leader else said)


def _leader(facts: Facts) -> str:
    """The server of a cluster that leads the log."""
    log = next((of.info for of in seen(facts.standings) if of.path == EVENTS and of.info), {})
    return str((log.get("cluster") or {}).get("leader", ""))


def streams(facts: Facts) -> Verdicts:
    standings = seen(facts.standings)
    if _too_few(facts):
        seen(Away("too few servers", behind="nats"))
    wrong = False
    for level, found, remedy in (*_standing(facts, standings), *_copies(facts, standings)):
        wrong |= level != Level.OK
        yield level, found, remedy
    if not wrong:
        yield ok(f"{len(standings)} streams and consumers are as their files say")


def _standing(facts: Facts, standings: tuple[Standing, ...]) -> Verdicts:
    for of in standings:
        if of.info is None and not of.silent and not (of.path == EVENTS and facts.damage):
            yield failure(f"{of.path} is missing", "`forge setup` makes it")
        elif of.differs:
            what = f"{of.path} differs from its file under nats/ in {', '.join(of.differs)}"
            yield failure(what, "`forge setup` brings it back, or says why the server refuses")
    silent = [of.path for of in standings if of.silent]
    if silent:
        yield failure(
            f"{', '.join(silent)}: no server leads, so nobody answers for it",
            "start the servers that hold it; where all are there, restart them one after the other",
        )


def _copies(facts: Facts, standings: tuple[Standing, ...]) -> Verdicts:
    """Whether each stream is where it has to be to outlive a server."""
    members = len(facts.nats_servers)
    single = [
        of.path
        for of in standings
        if members > 1 and of.info and "state" in of.info and of.info["config"].get("num_replicas", 1) == 1
    ]
    if single:
        yield warning(
            f"{', '.join(single)}: one copy, which is lost with its server",
            f"`FORGE_NATS_REPLICAS={3 if members < 5 else 5} forge setup` makes copies on the others",
        )
    followers = () if isinstance(facts.followers, Away) else facts.followers
    for server in sorted({one.server for one in followers}):
        yield from _follower(facts, server, [one for one in followers if one.server == server])


def _follower(facts: Facts, server: str, copies: list[Follower]) -> Verdicts:
    answers = {of.name for of in facts.nats_servers.values() if isinstance(of, Greeting)}
    if server not in answers:
        # that one of FORGE_NATS_URL is away is told already, with or without this one's name
        if len(answers) == len(facts.nats_servers) and any(one.away or _late(one) for one in copies):
            yield warning(
                f"{server}, which has a copy of {', '.join(one.stream for one in copies)}, is away",
                "start nats-server there with nats/cluster.conf, and list it in FORGE_NATS_URL",
            )
        return
    unheard = [one.stream for one in copies if one.away]
    late = {one.stream: one.later for one in copies if not one.away and _late(one)}
    if unheard:
        yield warning(
            f"{server} answers, but not the leader of {', '.join(unheard)}",
            "open the way between the servers (FORGE_NATS_ROUTES), or restart that nats-server",
        )
    if late:
        each = ", ".join(f"{stream} by {lag}" for stream, lag in late.items())
        yield warning(
            f"{server} lags and does not catch up: {each}",
            f"look at the disk and the network of {server}; if both are well, restart its nats-server; "
            "meanwhile stop no other one",
        )


def _late(one: Follower) -> bool:
    """Not coming on, although nothing new came or it is far behind."""
    return one.later >= max(one.lag, 1) and (not one.moving or one.later > MUCH_LAG)


def log(facts: Facts) -> Verdicts:
    damage = seen(facts.damage)
    if damage:
        remedy = (
            "stop forge, then docs/RUNBOOK.md, `the log is not whole`; `forge setup` refuses, and rightly"
        )
        yield failure(damage, remedy)
        return
    ends = seen(facts.ends)
    for what in ends.unreadable:
        yield failure(
            f"{what}: nothing behind it reaches the tables",
            "it needs a forge that can read it; where it came from outside, restore the log from before it",
        )
    if not ends.unreadable:
        yield ok(f"{facts.stream(EVENTS)['state']['last_seq']} events, whole as far as Postgres remembers")
