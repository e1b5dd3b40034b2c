"""NATS with TLS, by `nats/tls.conf`: whoever knows its authority is let in, and nobody talks in the clear."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from forge.broker import connect, request
from forge.credentials import OPERATOR, login
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
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    for part in certificate.cert_chain_pems:
        part.write_to_path(tmp_path / "cert.pem", append=True)
    given = {"CERT": tmp_path / "cert.pem", "KEY": tmp_path / "key.pem"}
    variables = {f"FORGE_NATS_{name}_FILE": f"'{file}'" for name, file in given.items()}
    nats = EmbeddedNats(tmp_path / "nats", config=CONFIG.with_name("tls.conf"), variables=variables)
    nats.start()
    yield nats
    nats.stop()


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


async def test_a_server_that_cannot_be_trusted_is_told_as_such(server: EmbeddedNats) -> None:
    url = server.url.replace("nats://", "tls://")
    with pytest.raises(LogUnavailable, match="certificate"):
        await connect(url, "test", login(server.passwords_dir, OPERATOR))
