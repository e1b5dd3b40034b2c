"""In front of everything: a rate for each address, wrong keys apart, and heads of a sane size."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import httpx
import msgspec
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from api.raw import ask
from api.serving import Serve, Served
from forge.api import gate, origins
from forge.api.addresses import asker
from forge.domain.rates import Rate
from forge.settings import ApiKey, Settings

PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


def who(peer: str | None, *forwarded: str, trusted: Any = PROXIES) -> str:
    headers = [(b"x-forwarded-for", line.encode()) for line in forwarded]
    scope = {"client": None if peer is None else (peer, 1), "headers": headers}
    return asker(scope, trusted).network


@pytest.mark.parametrize(
    ("peer", "forwarded", "counted_as"),
    [
        ("203.0.113.7", (), "203.0.113.7"),
        ("203.0.113.7", ("1.2.3.4",), "203.0.113.7"),
        ("10.0.0.1", (), "10.0.0.1"),
        ("10.0.0.1", ("1.2.3.4",), "1.2.3.4"),
        ("10.0.0.1", ("6.6.6.6, 1.2.3.4",), "1.2.3.4"),
        ("10.0.0.1", ("6.6.6.6", "1.2.3.4, 10.9.9.9"), "1.2.3.4"),
        ("10.0.0.1", ("1.2.3.4:51000",), "1.2.3.4"),
        ("10.0.0.1", ("[2001:db8::1]:443",), "2001:db8::/64"),
        ("10.0.0.1", ("1.2.3.4, rubbish",), "10.0.0.1"),
        ("10.0.0.1", ("rubbish, 10.2.2.2",), "10.2.2.2"),
        ("10.0.0.1", ("",), "10.0.0.1"),
        ("10.0.0.1", ("1.1.1.1, " * 5000 + "1.2.3.4",), "1.2.3.4"),
        ("::ffff:203.0.113.7", (), "203.0.113.7"),
        ("::ffff:10.0.0.1", ("1.2.3.4",), "1.2.3.4"),
        ("2001:db8:1:2:aaaa::1", (), "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bbbb::2", (), "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", (), "2001:db8:1:3::/64"),
        ("fe80::1%eth0", (), "fe80::/64"),
        (None, (), "unknown"),
        ("testclient", (), "unknown"),
    ],
)
def test_who_asks(peer: str | None, forwarded: tuple[str, ...], counted_as: str) -> None:
    assert who(peer, *forwarded) == counted_as


def test_without_named_proxies_nobody_is_believed() -> None:
    assert who("10.0.0.1", "1.2.3.4", trusted=()) == "10.0.0.1"


def test_a_proxy_on_this_machine_is_not_this_machine() -> None:
    forwarded = {"client": ("127.0.0.1", 1), "headers": [(b"x-forwarded-for", b"1.2.3.4")]}
    assert not asker(forwarded, ()).local
    assert asker({"client": ("127.0.0.1", 1), "headers": []}, ()).local


@pytest.fixture
async def slow(serve: Serve, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Served:
    """An API that takes one request in 50 seconds from an address, five at once; behind a proxy here."""
    monkeypatch.setattr(gate, "BURST_SECONDS", 250)
    changed = {"rate_per_ip": 0.02, "trusted_proxies": (ip_network("127.0.0.1"),)}
    return await serve(with_settings=msgspec.structs.replace(settings, **changed))


async def asked(served: Served, address: str, path: str = "/livez") -> httpx.Response:
    async with httpx.AsyncClient(base_url=served.base_url) as client:
        return await client.get(path, headers={"X-Forwarded-For": address})


async def test_the_sixth_is_told_when_to_come_again(slow: Served) -> None:
    answers = [await asked(slow, "1.2.3.4", path) for path in ("/livez", "/nowhere", "/", "/livez", "/livez")]
    assert [answer.status_code for answer in answers] == [200, 404, 200, 200, 200]
    refused = await asked(slow, "1.2.3.4")
    assert (refused.status_code, refused.headers["content-type"]) == (429, "application/problem+json")
    assert int(refused.headers["retry-after"]) >= 1
    problem = refused.json()
    assert problem["code"] == "limit_reached"
    assert {**problem["limit"], "resets_at": None} == {
        "name": "requests_per_ip",
        "allowed": 5,
        "used": 5,
        "resets_at": None,
    }
    assert problem["limit"]["resets_at"]
    for spoofed in ("6.6.6.6, 1.2.3.4", "9.9.9.9,1.2.3.4", "::ffff:1.2.3.4"):
        assert (await asked(slow, spoofed)).status_code == 429, spoofed
    assert (await asked(slow, "1.2.3.5")).status_code == 200


async def test_an_ipv6_customer_is_one_whatever_address_it_takes(slow: Served) -> None:
    answers = [await asked(slow, f"2001:db8::{n:x}") for n in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    assert (await asked(slow, "2001:db8:0:1::1")).status_code == 200


async def test_sockets_are_counted_too(slow: Served) -> None:
    headers = {"X-Forwarded-For": "1.2.3.4"}
    for _ in range(5):
        async with connect(slow.socket_url, additional_headers=headers, compression=None):
            pass
    with pytest.raises(InvalidStatus) as refused:
        async with connect(slow.socket_url, additional_headers=headers, compression=None):
            pass
    assert refused.value.response.status_code == 429
    assert int(refused.value.response.headers["retry-after"]) >= 1


async def test_this_machine_itself_is_not_limited_unless_it_is_said(
    serve: Serve, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "DEFAULT_RATE", 0.02)
    monkeypatch.setattr(gate, "BURST_SECONDS", 250)
    for rate, last in ((None, 200), (0.02, 429), (0.0, 200)):
        served = await serve(with_settings=msgspec.structs.replace(settings, rate_per_ip=rate))
        async with httpx.AsyncClient(base_url=served.base_url) as client:
            codes = [(await client.get("/livez")).status_code for _ in range(6)]
            assert codes == [200] * 5 + [last], rate
            proxied = [
                await client.get("/livez", headers={"X-Forwarded-For": f"1.1.1.{n}"}) for n in range(6)
            ]
            assert proxied[-1].status_code == (200 if rate == 0 else 429), rate


async def test_wrong_keys_cost_those_who_try_them(
    serve: Serve, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "UNKNOWN_KEYS", Rate(per_second=0.01, burst=3))
    keys = (ApiKey("player", "mei", "s3cret"),)
    served = await serve(with_settings=msgspec.structs.replace(settings, api_keys=keys))
    async with served.client(key="guess") as guessing:
        answers = [await guessing.get("/queue") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [401, 401, 401, 429]
        assert answers[-1].json()["limit"]["name"] == "unknown_keys_per_ip"
        assert int(answers[-1].headers["retry-after"]) > 60
    async with connect(
        served.socket_url, additional_headers={"Authorization": "Bearer guess"}, compression=None
    ) as socket:
        await socket.wait_closed()
        assert socket.close_code == 4429
    async with served.client(key="s3cret") as mei:
        assert (await mei.get("/queue")).status_code == 200, "a neighbour's guesses lock nobody out"
    async with served.client() as nobody:
        assert (await nobody.get("/queue")).status_code == 401, "no key is no guess"


async def test_heads_have_a_size(served: Served) -> None:
    async def status(target: bytes = b"/livez", *headers: tuple[bytes, bytes]) -> tuple[int, str]:
        answer = await ask(served.base_url, "GET", target, headers)
        return answer.status, answer.type

    problem = "application/problem+json"
    assert await status(b"/livez?" + b"a" * 8100) == (200, "text/plain; charset=utf-8")
    assert await status(b"/livez?" + b"a" * 8200) == (414, problem)
    assert await status(b"/livez?" + b"&a" * 99) == (200, "text/plain; charset=utf-8")
    assert await status(b"/livez?" + b"&a" * 101) == (400, problem)
    assert await status(b"/livez", *[(b"x-%d" % n, b"") for n in range(98)]) == (431, problem)
    assert await status(b"/livez", (b"x", b"a" * 33_000)) == (431, problem)
    assert await status(b"/livez", (b"x", b"a" * 200_000)) == (431, problem)
    for twice in (b"Authorization", b"X-Forge-User", b"Idempotency-Key", b"Content-Type", b"Host"):
        assert await status(b"/livez", (twice, b"a"), (twice.lower(), b"b")) == (400, problem), twice


async def test_head_is_get_without_a_body(served: Served, mei: httpx.AsyncClient) -> None:
    got, head = await mei.get("/catalogue"), await mei.head("/catalogue")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(got.content))
    assert (await mei.head("/nowhere")).status_code == 404


@pytest.mark.parametrize(
    ("origin", "host", "may"),
    [
        (None, "game.example", True),
        ("https://game.example", "game.example", True),
        ("http://game.example:8600", "game.example:8600", True),
        ("https://game.example", "game.example:443", True),
        ("https://game.example:444", "game.example", False),
        ("https://game.example", "game.example:8600", False),
        ("https://game.example.evil.example", "game.example", False),
        ("https://evil.example", "game.example", False),
        ("https://ui.example", "game.example", True),
        ("HTTPS://UI.EXAMPLE", "game.example", True),
        ("http://ui.example", "game.example", False),
        ("http://localhost:5173", "game.example", True),
        ("http://127.0.0.1:5173", "127.0.0.1:8600", True),
        ("http://[::1]:5173", "[::1]:8600", True),
        ("http://127.0.0.1.evil.example", "127.0.0.1", False),
        ("null", "game.example", False),
        ("", "", False),
        ("file://", "", False),
        ("http://[::1", "game.example", False),
        ("http://game.example:99999", "game.example", False),
        ("https://game.example", "[", False),
    ],
)
def test_which_pages_may_open_sockets(origin: str | None, host: str, may: bool) -> None:
    assert origins.allowed(origin, host, ("https://ui.example",)) is may
