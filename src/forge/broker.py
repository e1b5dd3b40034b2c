"""The connection to NATS, and its JetStream API in the server's own words.

Facts this rests on (measured on nats-server 2.15, nats-py 2.16): a callback that raises ends reconnecting for
good; a client never returns from CLOSED; a missing leader or stream answers "no responders".
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any, TypeVar

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.protocol.command import hpub_cmd

from forge.credentials import Login
from forge.errors import ForgeError, LogUnavailable, NotLetIn

log = logging.getLogger("forge.broker")

T = TypeVar("T")

CONNECT_SECONDS = 10.0

_NOT_LET_IN = "authorization violation"
_NOT_PERMITTED = "permissions violation"
_STALE = "stale connection"


class BrokerRefused(ForgeError):
    """JetStream refused a request."""

    code = "broker_refused"

    def __init__(self, err_code: int, description: str) -> None:
        self.err_code = err_code
        super().__init__(f"{description} (JetStream error {err_code})")


class _ApiError(msgspec.Struct):
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct):
    error: _ApiError | None = None


class _Ends(msgspec.Struct):
    first_seq: int
    last_seq: int


class _Info(msgspec.Struct):
    state: _Ends


_LEADERLESS = 10008
"""Servers of a cluster without a leader for ten seconds refuse: as good as the silence before."""

_answer = msgspec.json.Decoder(_Answer)
_info = msgspec.json.Decoder(_Info)

_BEHIND_SECONDS = 1.0
"""How long a server may take to catch up with its leader; what it lacks then is not there, or damaged."""


class _Client(Client):
    """nats-py, but for six things."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = count()

    async def _read_loop(self) -> None:
        """Its own ends where something arrives that cannot be decoded, and leaves the connection open and
        deaf."""
        await super()._read_loop()
        if self.is_connected:
            await self._process_op_err(nats.errors.ProtocolError())

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Its own goes on in the clear, password first, where a server that is called tls:// says that it has
        no TLS."""
        server = self._current_server
        if server is not None and server.uri.scheme == "tls" and not info.get("tls_required"):
            raise nats.errors.Error("it offers no TLS")
        await super()._process_info(info, initial_connection)

    async def _process_err(self, err_msg: str) -> None:
        """Its own ends the connection for good at most of what a server complains of, without a word."""
        if not any(mild in err_msg.lower() for mild in (_STALE, _NOT_PERMITTED)):
            await self._error_cb(nats.errors.Error(f"nats: {err_msg}"))
        await super()._process_err(err_msg)

    async def _request_new_style(
        self, subject: str, payload: bytes, timeout: float = 1, headers: dict[str, Any] | None = None
    ) -> Msg:
        """Its own draws a name of 26 letters for each answer and waits with `asyncio.wait_for`: more than all
        else of a request. The inbox is this connection's alone, so a number will do."""
        if not self._resp_sub_prefix:
            await self._init_request_sub()
        assert self._resp_sub_prefix
        token, answer = str(next(self._asked)), asyncio.get_running_loop().create_future()
        self._resp_map[token] = answer
        try:
            async with asyncio.timeout(timeout):
                inbox = self._resp_sub_prefix.decode() + token
                await self.publish(subject, payload, reply=inbox, headers=headers)
                message: Msg = await answer
                return message
        except TimeoutError:
            raise nats.errors.TimeoutError from None
        finally:
            self._resp_map.pop(token, None)

    async def _send_publish(
        self, subject: str, reply: str, payload: bytes, payload_size: int, headers: dict[str, Any] | None
    ) -> None:
        """Its own cleans each name and value by itself; here it does if one would break out of its line."""
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()]) if headers else ""
        if headers is None or not lines.count("\r") == lines.count("\n") == len(headers):
            await super()._send_publish(subject, reply, payload, payload_size, headers)
            return
        command = hpub_cmd(subject, reply, f"NATS/1.0\r\n{lines}\r\n".encode(), payload)
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += payload_size
        await self._send_command(command)
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        """Its own looks at every letter of every header's name, half of what reading a message costs, and
        passes over what is no text: here the message has no headers then, so that nobody takes it for whole.
        """
        lines = raw.decode().split("\r\n")
        try:
            return dict([line.split(": ", 1) for line in lines if line])
        except ValueError:  # not as the server writes them, or nats-py
            return Client._parse_header_lines(raw)


_PATIENCE: dict[str, Any] = {
    "max_reconnect_attempts": -1,
    "reconnect_time_wait": 0.2,
    "ping_interval": 5,
    "max_outstanding_pings": 2,
    "connect_timeout": 3,
    "drain_timeout": 5,
}


def _identity(role: str, login: Login | None) -> dict[str, str]:
    """Who connects; answers come to inboxes that only this user may hear."""
    user = {"user": login.user, "password": login.password} if login else {}
    return {"name": f"forge-{role}", "inbox_prefix": f"_INBOX_{login.user if login else role}", **user}


async def connect(
    url: str, role: str, login: Login | None = None, *, on_closed: Callable[[], Awaitable[None]] | None = None
) -> Client:
    """A connection that heals itself; ``role`` names it, and its user, or without one the role, its inboxes.

    Raises:
        LogUnavailable: no server answered within ten seconds.
        NotLetIn: the server does not take this user and password.
    """
    who = f"user {login.user!r}" if login else "clients without a user"
    connected = False
    latest: Exception | None = None
    told: set[str] = set()

    async def on_error(error: Exception) -> None:
        nonlocal latest
        latest = error
        if nc.is_connected or repr(error) not in told:  # it tries five times a second
            log.log(_level(error, connected), "nats error", extra={"as": role, "error": repr(error)})
            told.add(repr(error))
        if _NOT_LET_IN in str(error).lower() and not connected:
            raise NotLetIn(  # which ends connecting; later it would end reconnecting for good
                f"NATS at {url} does not let in {who}: FORGE_NATS_PASSWORDS_DIR names the directory with "
                "the passwords that the server was given"
            )

    async def back() -> None:
        log.info("connected to nats again", extra={"as": role})
        told.clear()

    async def closed() -> None:
        if on_closed is not None:
            await on_closed()

    callbacks = {"error_cb": on_error, "reconnected_cb": _safe(back), "closed_cb": _safe(closed)}
    options = {**callbacks, **_identity(role, login), **_PATIENCE}
    nc = _Client()
    try:
        await asyncio.wait_for(nc.connect(url.split(","), **options), CONNECT_SECONDS)
    except NotLetIn:
        await nc.close()
        raise
    except (TimeoutError, OSError, nats.errors.Error) as error:
        raise LogUnavailable(f"NATS at {url} does not answer: {latest or error!r}") from error
    connected = True
    return nc


def _level(error: Exception, connected: bool) -> int:
    if _NOT_PERMITTED in str(error):  # the only sign of it: nothing is raised
        return logging.ERROR
    return logging.WARNING if connected else logging.INFO  # how connecting ends is told by `connect`


async def request(nc: Client, subject: str, payload: Any = None, *, timeout: float = 5.0) -> bytes:
    """One call of the JetStream API (``STREAM.INFO.X``), answered as JSON bytes.

    Raises:
        BrokerRefused: the server's own error, with its code.
        LogUnavailable: no answer in time, or no leader; whether the call took effect is unknown.
    """
    body = b"" if payload is None else msgspec.json.encode(payload)
    answer = await exchange(nc, f"$JS.API.{subject}", body, None, timeout)
    error = understood(_answer, answer).error
    if error is not None and error.err_code == _LEADERLESS:
        raise LogUnavailable(f"no NATS server leads: {error.description}")
    if error is not None:
        raise BrokerRefused(error.err_code, error.description)
    return answer


def understood(decoder: msgspec.json.Decoder[T], answer: bytes) -> T:
    """What an answer says; one that arrived garbled is none.

    Raises:
        LogUnavailable: it cannot be read.
    """
    try:
        answer.decode()  # what this decoder skips is for somebody else to read
        return decoder.decode(answer)
    except (UnicodeDecodeError, msgspec.DecodeError) as error:
        raise LogUnavailable(f"an answer of NATS cannot be read: {error}") from error


async def ends(nc: Client, stream: str, *, timeout: float = 5.0) -> tuple[int, int]:
    """The first and the last sequence of a stream, by its leader's word; the last of an empty one is 0.

    Raises:
        LogUnavailable: no answer in time.
    """
    state = understood(_info, await request(nc, f"STREAM.INFO.{stream}", timeout=timeout)).state
    return state.first_seq, state.last_seq


async def stored(nc: Client, stream: str, query: dict[str, object], timeout: float = 2.0) -> Msg | None:
    """One message of a stream, by the server's direct-get query; None where it has none.

    Raises:
        LogUnavailable: no answer in time.
    """
    subject = f"$JS.API.DIRECT.GET.{stream}"
    try:
        message = await nc.request(subject, msgspec.json.encode(query), timeout=timeout)
    except (TimeoutError, nats.errors.Error, OSError) as error:
        raise LogUnavailable(f"NATS gave no answer on {subject} to {query}: {error!r}") from error
    finally:
        heed_cancellation()
    return None if (message.headers or {}).get("Status") else message


async def stored_at(nc: Client, stream: str, seq: int, timeout: float = 2.0) -> Msg | None:
    """What stands at a sequence of a stream; None where it has nothing there, or cannot read it.

    Any server of a cluster answers, also one that is behind its leader (measured under load: by some
    milliseconds, at every ninth look), so "nothing there" that the leader contradicts is looked at again.

    Raises:
        LogUnavailable: no answer in time.
    """
    found = await stored(nc, stream, {"seq": seq}, timeout)
    if found is not None:
        return found
    first, last = await ends(nc, stream, timeout=timeout)
    if not first <= seq <= last:
        return None
    until, pause = time.monotonic() + min(timeout, _BEHIND_SECONDS), 0.005
    while found is None and time.monotonic() < until:
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.2)
        found = await stored(nc, stream, {"seq": seq}, timeout)
    return found


async def exchange(
    nc: Client, subject: str, body: bytes, headers: dict[str, str] | None, timeout: float
) -> bytes:
    """Send a message and await its answer.

    Raises:
        LogUnavailable: no answer in time, or nobody there to give one.
    """
    try:
        return (await nc.request(subject, body, timeout=timeout, headers=headers)).data
    except (TimeoutError, nats.errors.Error, OSError) as error:
        raise LogUnavailable(f"NATS gave no answer on {subject}: {error!r}") from error
    finally:
        heed_cancellation()


def heed_cancellation() -> None:
    """To be called behind every wait for nats-py: before Python 3.12 its `asyncio.wait_for` loses a
    cancellation that meets the answer, and an endless loop would never end.

    Raises:
        CancelledError: the current task was cancelled.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _safe(callback: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def guarded(*args: Any) -> None:
        try:
            await callback(*args)
        except Exception:
            log.exception("a nats callback failed")

    return guarded
