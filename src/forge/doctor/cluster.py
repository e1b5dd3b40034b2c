"""The servers that hold the log: what answers at each address of FORGE_NATS_URL, asked as a client would up
to where it says who it is, and how far those that follow the leader of a stream have come.

The client itself tries for long, and one address after the other until one is good: what is wrong with the
others it keeps to itself.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from forge.doctor.facts import Away, Follower, Greeting
from forge.topology import Standing

_UNHEARD_NS = 5 * 10**9
"""A follower is heard every second."""

_UNTRUSTED = (18, 19, 20, 21)
_EXPIRED = (9, 10)
_OTHER_NAME = (62, 64)
"""OpenSSL's numbers for what is wrong with a certificate."""


class _Info(msgspec.Struct):
    server_name: str = ""
    version: str = ""
    cluster: str = ""
    jetstream: bool = False
    tls_required: bool = False


_info = msgspec.json.Decoder(_Info)


def addresses(urls: str) -> dict[str, str]:
    """What FORGE_NATS_URL lists, each as it may be shown, without a password → as it is."""
    return {_shown(url): url for part in urls.split(",") if (url := part.strip())}


async def greeted(url: str) -> Greeting | Away:
    """Who says that it is there, over TLS where one of both wants it.

    Raises:
        OSError: nobody listens there, or not to us.
        ValueError: it is no address, or what answers is no NATS server.
    """
    address, shown = _split(url), _shown(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port or 4222)
    try:
        line = await reader.readline()
        if not line.startswith(b"INFO "):
            return Away(f"{shown} is no NATS server")
        info = _info.decode(line.removeprefix(b"INFO "))
        if address.scheme == "tls" and not info.tls_required:
            return Away(
                f"{shown} offers no TLS, so nothing is sent there",
                remedy="start that nats-server with nats/tls.conf, or call it nats:// in FORGE_NATS_URL",
            )
        if info.tls_required:
            await writer.start_tls(ssl.create_default_context(), server_hostname=address.hostname)
    except ssl.SSLCertVerificationError as error:
        return Away(f"{shown}: {error.verify_message}", remedy=_trust(error.verify_code))
    except msgspec.DecodeError:
        return Away(f"{shown} is no NATS server")
    finally:
        writer.transport.abort()  # closed politely, asyncio wonders aloud that TLS says goodbye
    if not info.jetstream:
        return Away(f"{shown} has no JetStream", remedy="start it with a file of nats/, which has")
    return Greeting(info.server_name, _version(info.version), info.cluster)


def _trust(code: int) -> str:
    if code in _UNTRUSTED:
        return "name the authority that signed its certificate by SSL_CERT_FILE, to every process of forge"
    if code in _EXPIRED:
        return "give that nats-server a certificate of now (FORGE_NATS_CERT_FILE), or set the clock right"
    if code in _OTHER_NAME:
        return "call it in FORGE_NATS_URL by a name in its certificate, or give it one for this name"
    return "give that nats-server a certificate that can be trusted (FORGE_NATS_CERT_FILE)"


def _split(url: str) -> SplitResult:
    return urlsplit(url if "://" in url else f"nats://{url}")


def _shown(url: str) -> str:
    scheme, _, rest = url.rpartition("://")
    return f"{scheme or 'nats'}://{rest.rpartition('@')[2]}"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.partition("-")[0].split(".") if part.isdecimal())


def followers(first: Sequence[Standing], later: Sequence[Standing]) -> tuple[Follower, ...]:
    """Every copy of a stream but its leader's, seen twice."""
    before = {(stream, one["name"]): (seq, one) for stream, seq, one in _copies(first)}
    found = []
    for stream, seq, one in _copies(later):
        was_at, was = before.get((stream, one["name"]), (seq, one))
        away = one.get("offline", False) or one.get("active", 0) > _UNHEARD_NS
        lags = was.get("lag", 0), one.get("lag", 0)
        found.append(Follower(stream, one["name"], *lags, moving=seq > was_at, away=away))
    return tuple(found)


def behind(standings: Sequence[Standing]) -> bool:
    """Whether any copy of a stream lacks something now."""
    return any(not one["current"] or one.get("lag", 0) for _, _, one in _copies(standings))


def _copies(standings: Sequence[Standing]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Stream, its last sequence, and what its leader says of a follower."""
    for of in standings:
        if of.info is not None and "state" in of.info:
            for one in (of.info.get("cluster") or {}).get("replicas") or ():
                yield of.path, of.info["state"]["last_seq"], one
