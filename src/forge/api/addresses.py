"""Which address a request comes from, and what it counts as.

Behind proxies that the operator names it is the right-most address in ``X-Forwarded-For`` that is not one of
theirs: everything further left was written by the client. Anybody else's header is ignored.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_FORWARDED = (b"forwarded", b"x-forwarded-for", b"x-real-ip")
_MOST_HOPS = 32
_UNKNOWN = "unknown"


class Asker:
    """Where a request comes from: ``network`` is what it is counted under."""

    __slots__ = ("local", "network")

    def __init__(self, network: str, local: bool) -> None:
        self.network, self.local = network, local


def asker(scope: Any, trusted: Sequence[Network]) -> Asker:
    """Who asks. ``local`` only if this very machine does, for itself."""
    peer = scope.get("client")
    if peer is None:
        return Asker(_UNKNOWN, local=False)
    address = parsed(peer[0])
    if address is None:
        return Asker(_UNKNOWN, local=False)
    if trusted and _in(address, trusted):
        address = _behind(scope["headers"], address, trusted)
    local = address.is_loopback and not any(name in _FORWARDED for name, _ in scope["headers"])
    return Asker(network(address), local)


@lru_cache(10_000)
def network(address: Address) -> str:
    """What an address counts as: itself, or in IPv6 its /64, of which one customer has all."""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


@lru_cache(10_000)
def parsed(text: str) -> Address | None:
    """An address with or without a port; IPv4 written as IPv6 is IPv4."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _behind(headers: list[tuple[bytes, bytes]], peer: Address, trusted: Sequence[Network]) -> Address:
    """The right-most hop that is nobody of ours; the last known one where the header ends or is nonsense."""
    last = peer
    for hop in _hops(headers):
        if hop is None:
            break
        last = hop
        if not _in(hop, trusted):
            break
    return last


def _hops(headers: list[tuple[bytes, bytes]]) -> Iterator[Address | None]:
    lines = [value for name, value in headers if name == b"x-forwarded-for"]
    hops = b",".join(lines)[-4096:].decode("latin-1").split(",")
    for hop in hops[: -_MOST_HOPS - 1 : -1] if lines else []:
        yield parsed(hop)


def _in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)
