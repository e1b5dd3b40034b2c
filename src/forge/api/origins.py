"""Which web pages may open a socket: browsers let every page try, and send along whose it is."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from forge.api.addresses import parsed

_PORTS = {"http": 80, "https": 443}


def allowed(origin: str | None, host: str, listed: Collection[str]) -> bool:
    """Whether a page of ``origin`` may talk to us, who were asked for as ``host``.

    Without an Origin it was no page of a browser. Else it must be listed, of the client's own machine, or
    ours: same name, same port, whatever the scheme, since a proxy may have taken the encryption off.
    """
    if origin is None or origin.lower() in listed:
        return True
    try:
        page, asked = urlsplit(origin), urlsplit(f"//{host}")
        ours = (page.hostname, page.port or _PORTS[page.scheme])
        named = {(asked.hostname, port) for port in ((asked.port,) if asked.port else _PORTS.values())}
    except (KeyError, ValueError):
        return False
    return ours in named or _local(page.hostname)


def _local(name: str | None) -> bool:
    address = parsed(name or "")
    return name == "localhost" or (address is not None and address.is_loopback)
