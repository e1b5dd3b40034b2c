"""What commands share: which data directory is meant, and the settings that follow from it."""

from __future__ import annotations

import os
from pathlib import Path

import click

from forge.settings import Settings

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of pictures and embedded servers [FORGE_DATA_DIR, or .forge]. While a `forge dev` runs "
    "on it, this command talks to the servers of that one.",
)


def given_settings(data_dir: Path | None) -> Settings:
    """The settings of this run, see :func:`environment`."""
    from forge.settings import load

    return load(environment(data_dir))


def system_settings(data_dir: Path | None) -> Settings:
    """The settings of a system that is there already: what is said of one directory must not reach another's
    servers, which the defaults may name.

    Raises:
        click.UsageError: no `forge dev` runs on the directory, and nothing says where its servers are.
    """
    named = _given().keys() & {"FORGE_NATS_URL", "FORGE_POSTGRES_DSN"}
    if data_dir is not None and not named and dev_url(data_dir) is None:
        raise click.UsageError(
            f"no `forge dev` runs on {_place(data_dir)}. Start it, or say with FORGE_NATS_URL and "
            "FORGE_POSTGRES_DSN where its servers are"
        )
    return given_settings(data_dir)


def environment(data_dir: Path | None) -> dict[str, str]:
    """The variables of this run. A `forge dev` on the data directory says where its servers are.

    `--data-dir` means that system and wins over addresses in the environment; a directory that is merely the
    default does not.
    """
    from forge.embedded.record import running

    environ, place = _given(), _place(data_dir)
    record = running(place)
    addresses = record.environment() if record else {}
    if data_dir is not None:
        return {**environ, **addresses, "FORGE_DATA_DIR": str(place)}
    if "FORGE_NATS_URL" in environ:  # that server's passwords are others
        addresses.pop("FORGE_NATS_PASSWORDS_DIR", None)
    return {**addresses, **environ, "FORGE_DATA_DIR": str(place)}


def dev_url(data_dir: Path | None) -> str | None:
    """Where the `forge dev` on the data directory serves, if one runs there."""
    from forge.embedded.record import running

    record = running(_place(data_dir))
    return record.url if record else None


def dev_environment(
    host: str | None, port: int | None, data_dir: Path | None, comfyui_urls: tuple[str, ...]
) -> dict[str, str]:
    """The variables of a whole system: what the command line says wins."""
    environ = _given()
    said = {"FORGE_HOST": host, "FORGE_PORT": port, "FORGE_COMFYUI_URLS": ",".join(comfyui_urls) or None}
    environ.update({name: str(value) for name, value in said.items() if value is not None})
    return {**environ, "FORGE_DATA_DIR": str(_place(data_dir))}


def _given() -> dict[str, str]:
    """The environment with its secrets; a variable of forge's that is set to nothing counts as not set."""
    from forge.settings import opened

    return opened(
        {name: value for name, value in os.environ.items() if value.strip() or not name.startswith("FORGE_")}
    )


def _place(data_dir: Path | None) -> Path:
    return (data_dir or Path(_given().get("FORGE_DATA_DIR", ".forge"))).expanduser().absolute()


def report(line: str) -> None:
    click.echo(f"forge: {line}", err=True)


def actor() -> str:
    """Whose shell it is, for the log."""
    import pwd

    try:
        return f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:
        return f"cli:{os.getuid()}"
