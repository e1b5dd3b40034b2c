"""NATS with TLS, by `nats/tls.conf`: whoever knows its authority is let in, and nobody talks in the clear."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from forge.broker import connect, request
from forge.credentials import OPERATOR, login
from forge.doctor import Finding, Level, examine
from forge.embedded import EmbeddedNats
from forge.embedded.nats import CONFIG
from forge.errors import LogUnavailable


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    found = trustme.CA()
    found.cert_pem.write_to_path(tmp_path / "authority.pem")
    return found


@pytest.fixture
def server(tmp_path: Path, authority: trustme.CA) -> Iterator[EmbeddedNats]:
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    for part in certificate.cert_chain_pems:
        part.write_to_path(tmp_path / "cert.pem", append=True)
    given = {"CERT": tmp_path / "cert.pem", "KEY": tmp_path / "key.pem"}
    variables = {f"FORGE_NATS_{name}_FILE": f"'{file}'" for name, file in given.items()}
    nats = EmbeddedNats(tmp_path / "nats", config=CONFIG.with_name("tls.conf"), variables=variables)
    nats.start()
    yield nats
    nats.stop()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor hears out who is slow on a busy machine."""
    monkeypatch.setattr("forge.doctor.gathering.SECONDS", 60.0)


async def refused(url: str, server: EmbeddedNats, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client gives up and says why: soon, or later where it had not come to a single try by then."""
    for patience in (1.0, 10.0, 40.0):
        monkeypatch.setattr("forge.broker.CONNECT_SECONDS", patience)
        with pytest.raises(LogUnavailable) as raised:
            await connect(url, "test", login(server.passwords_dir, OPERATOR))
        if why in raised.value.detail:
            return
    pytest.fail(f"{why!r} is not why: {raised.value.detail}")


async def test_forge_speaks_tls_with_a_server_it_can_trust(
    server: EmbeddedNats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    for scheme in ("tls", "nats"):  # a server that wants TLS gets it either way
        url = server.url.replace("nats://", f"{scheme}://")
        nc = await connect(url, "test", login(server.passwords_dir, OPERATOR))
        await request(nc, "INFO")
        async with httpx.AsyncClient() as client:
            (seen,) = (await client.get(f"{server.monitoring_url}/connz")).json()["connections"]
        assert seen["tls_version"] == "1.3"
        await nc.close()


async def test_a_server_that_cannot_be_trusted_is_told_as_such(
    server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    await refused(server.url.replace("nats://", "tls://"), server, "certificate", monkeypatch)


async def test_tls_is_never_left_for_the_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stands between could say that there is no TLS, and be told the password."""
    plain = EmbeddedNats(tmp_path / "plain")
    url = plain.start().replace("nats://", "tls://")
    try:
        await refused(url, plain, "offers no TLS", monkeypatch)
        assert "offers no TLS" in (await told(url, plain)).found
    finally:
        plain.stop()


async def told(url: str, server: EmbeddedNats) -> Finding:
    """What the doctor says of the server at this address."""
    nowhere = {"FORGE_POSTGRES_DSN": "postgresql://postgres@127.0.0.1:9/postgres"}
    given = {"FORGE_NATS_URL": url, "FORGE_NATS_PASSWORDS_DIR": str(server.passwords_dir)}
    (found,) = [finding for finding in await examine(nowhere | given) if finding.check == "nats"]
    return found


async def test_the_doctor_tells_what_is_wrong_with_a_certificate(
    server: EmbeddedNats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await told(server.url, server)
    assert "self-signed" in found.found or "local issuer" in found.found
    assert "SSL_CERT_FILE" in found.remedy
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    assert (await told(server.url, server)).level == Level.OK
    found = await told(server.url.replace("127.0.0.1", "localhost"), server)
    assert "localhost" in found.found
    assert "by a name in its certificate" in found.remedy
