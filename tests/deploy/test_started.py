"""What `compose.yml` starts, as plain processes: its commands, variables, secrets, order and health checks.

Only names and places are translated: hosts are this machine, ports are free, paths are folders of the test.
A simulator stands in for the ComfyUI on the CPU, and the one on the GPU is not there.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from acceptance.players import granted
from deploy.composed import ROOT, services
from forge.embedded import EmbeddedPostgres
from forge.embedded.nats import binary
from ports import free_port
from waiting import wait_until

DOCKERFILE = (ROOT / "Dockerfile").read_text()
PATH = os.pathsep.join([str(Path(sys.executable).parent), str(binary().parent), os.defpath])


def of_image(stage: str, instruction: str) -> Any:
    """What the Dockerfile says for a stage: its ENTRYPOINT or CMD, or the last ENV of them as a mapping."""
    text = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    (body,) = [part for part in text if re.match(rf"\S+ AS {stage}\n", part)]
    found = re.findall(rf"^{instruction} (.+)$", body, re.MULTILINE)[-1]
    if instruction == "ENV":
        return dict(pair.split("=", 1) for pair in found.split())
    return json.loads(found)


class Here:
    """Where on this machine the things of `compose.yml` are."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ports = {name: free_port() for name in ("nats", "monitor", "gpu", "cpu", "api")}
        self.worker_ports = {name: free_port() for name in ("worker", "projector", "cleanup")}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def translated(self, text: str, service: str) -> str:
        """A word of a command or a variable, in this machine's terms."""
        places = {
            "nats:4222": f"127.0.0.1:{self.ports['nats']}",
            "127.0.0.1:8222": f"127.0.0.1:{self.ports['monitor']}",
            "comfyui-gpu:8188": f"127.0.0.1:{self.ports['gpu']}",
            "comfyui-cpu:8188": f"127.0.0.1:{self.ports['cpu']}",
            "8600": str(self.ports["api"]),
            "8601": str(self.worker_ports.get(service, 0)),
            "0.0.0.0": "127.0.0.1",
            **({"api": "127.0.0.1"} if text == "api" and service == "forge" else {}),
            "/run/secrets": str(self.root / "run" / service),
            "/comfyui/": f"{self.root}/comfyui/",
            "/etc/nats": str(ROOT / "nats"),
        }
        for there, here in places.items():
            text = text.replace(there, here)
        return re.sub(r"^/data$", str(self.root / ("log" if service == "nats" else "data")), text)

    def give_secrets(self, service: str, wanted: list[Any]) -> None:
        """Into the service's own `/run/secrets`, those that it is given and no others."""
        for secret in wanted:
            source = secret if isinstance(secret, str) else secret["source"]
            target = secret if isinstance(secret, str) else secret["target"].removeprefix("/run/secrets/")
            file = self.root / "run" / service / target
            file.parent.mkdir(parents=True, exist_ok=True)
            file.symlink_to(self.root / "secrets" / source.replace("nats_", "nats/"))

    def start(self, name: str, service: dict[str, Any]) -> None:
        """Launch it with what it is given there, and nothing of this test's environment."""
        stage = service["build"]["target"]
        environ = of_image("forge", "ENV") if stage == "forge" else {}
        environ |= service.get("environment", {})
        words = [*of_image(stage, "ENTRYPOINT"), *service.get("command", of_image(stage, "CMD"))]
        if stage == "nats":
            words[0] = str(ROOT / "deploy/nats/start")
            words += ["-a", "127.0.0.1", "-p", str(self.ports["nats"]), "-m", str(self.ports["monitor"])]
        given = {key: self.translated(str(value), name) for key, value in environ.items() if value != ""}
        with (self.root / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [self.translated(word, name) for word in words],
                env={**given, "PATH": PATH},
                stdout=log,
                stderr=log,
                cwd=self.root,
            )

    def draw(self) -> None:
        """A simulator in the place of the ComfyUI on the CPU."""
        words = ["forge", "sim", "--port", str(self.ports["cpu"]), "--output-dir", self.root / "comfyui/cpu"]
        self.processes["sim"] = subprocess.Popen(words, env={"PATH": PATH}, stdout=subprocess.DEVNULL)

    async def satisfied(self, name: str, service: dict[str, Any], condition: str) -> bool:
        process = self.processes[name]
        if condition == "service_completed_successfully":
            assert process.poll() in (None, 0), self.words_of(name)
            return process.poll() == 0
        assert process.poll() is None, self.words_of(name)
        return await self.healthy(name, service)

    async def healthy(self, name: str, service: dict[str, Any]) -> bool:
        """Whether its health check says so; `wget` may not be on this machine."""
        check = " ".join(service["healthcheck"]["test"])
        (url,) = re.findall(r"http://[^' ]+", check)
        async with httpx.AsyncClient(timeout=5) as client:
            try:
                return (await client.get(self.translated(url, name))).status_code == 200
            except httpx.TransportError:
                return False

    def words_of(self, name: str) -> str:
        return f"{name}: {(self.root / f'{name}.log').read_text()[-3000:]}"

    def stop(self) -> dict[str, int]:
        """Ask all to end, those first that others are needed by; the statuses they ended with."""
        ended = {}
        for name, process in reversed(self.processes.items()):
            process.terminate()
            ended[name] = process.wait(60)
        return ended


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    environ = {**os.environ, "FORGE_SECRETS": str(tmp_path / "secrets")}
    subprocess.run([ROOT / "deploy/up", "--secrets-only"], env=environ, check=True, timeout=30)
    postgres = EmbeddedPostgres(tmp_path / "postgres")
    (tmp_path / "secrets/postgres_dsn").chmod(0o600)
    (tmp_path / "secrets/postgres_dsn").write_text(postgres.start())
    place = Here(tmp_path)
    for folder in ("data", "log", "comfyui/gpu", "comfyui/cpu"):
        (tmp_path / folder).mkdir(parents=True)
    try:
        yield place
    finally:
        for process in place.processes.values():
            process.kill()
            process.wait()
        postgres.stop()


@pytest.mark.timeout(400)
async def test_what_compose_starts_draws_a_picture(here: Here) -> None:
    here.draw()
    wanted = {name: service for name, service in services().items() if "comfyui" not in name}
    wanted.pop("postgres")
    tool = wanted.pop("forge")
    for name, service in wanted.items():
        for needed, how in service.get("depends_on", {}).items():
            if needed in wanted:
                await wait_until(
                    lambda needed=needed, how=how: here.satisfied(needed, wanted[needed], how["condition"]),
                    90,
                    f"{name} waits for {needed}",
                )
        here.give_secrets(name, service.get("secrets", []))
        here.start(name, service)
    for name in ("api", "worker", "projector", "cleanup"):
        await wait_until(lambda name=name: here.healthy(name, wanted[name]), 90, f"{name} is healthy")

    key = (here.root / "secrets/api_keys").read_text().strip().split(":")[2]
    base = f"http://127.0.0.1:{here.ports['api']}/api/v1/comfyui"
    async with httpx.AsyncClient(base_url=base, timeout=10) as client:
        assert (await client.get("/queue")).status_code == 401, "without a key nobody"
        client.headers["Authorization"] = f"Bearer {key}"
        job = (await granted(client, "POST", "/jobs", json={"job_type": "ui_icon", "params": {}})).json()

        async def drawn() -> bool:
            return (await client.get(f"/jobs/{job['id']}")).json()["status"] == "completed"

        await wait_until(drawn, 90, "a picture of the fallback")

        async def by_the_fallback() -> bool:
            return (await client.get("/backends")).json()["state"] == "fallback"

        await wait_until(by_the_fallback, 60, "a worker says who draws")
    here.give_secrets("forge", tool.get("secrets", []))
    tool["command"] = [*tool["command"], "--json"]

    async def only_the_gpu_is_away() -> bool:
        here.start("forge", tool)
        status = await asyncio.to_thread(here.processes["forge"].wait, 60)
        found = [json.loads(line) for line in (here.root / "forge.log").read_text().splitlines()]
        wrong = [(f["check"], f["level"]) for f in found if f["level"] != "ok"]
        return (status, wrong) == (1, [("comfyui", "warning")])

    await wait_until(only_the_gpu_is_away, 60, "the doctor misses the one on the GPU, and nothing else")
    ended = await asyncio.to_thread(here.stop)
    assert {ended[name] for name in ("api", "worker", "projector", "cleanup", "setup")} == {0}
