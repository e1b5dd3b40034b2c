"""The command line. Each command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from forge.domain.keys import ROLES as KEY_ROLES
from forge.errors import ForgeError
from forge.settings import Settings

if TYPE_CHECKING:
    from forge.keys import Keys

T = TypeVar("T")

ROLES = ("generation", "dispatcher", "projector", "cleanup", "scheduler")
REFUSED = 2

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of pictures and embedded servers [FORGE_DATA_DIR, or .forge]. While a `forge dev` runs "
    "on it, this command talks to the servers of that one.",
)


def main() -> None:
    """Run a command; what forge refuses is told on stderr, with exit status 2."""
    try:
        cli(prog_name="forge")
    except ForgeError as error:
        click.echo(f"forge: {error.detail}", err=True)
        sys.exit(REFUSED)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="forge")
def cli() -> None:
    """Pictures for a game, made by ComfyUI: queued fairly, never lost, stored once.

    \b
    Try it:           forge demo
    Develop with it:  forge dev
    Run it for real:  forge setup, then forge api and forge worker beside
                      your own NATS, Postgres and ComfyUI (forge settings)
    """


def dev_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of everything that starts a whole system."""
    for option in (
        click.option("--once", is_flag=True, help="Leave as soon as it is done, instead of serving on."),
        click.option(
            "--comfyui",
            "comfyui_urls",
            metavar="URL",
            multiple=True,
            help="A ComfyUI to draw with instead of the simulator; repeat it for fallbacks, preferred first.",
        ),
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path, file_okay=False),
            help="Where everything is kept; a second start there continues [FORGE_DATA_DIR, or .forge].",
        ),
        click.option(
            "--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one [FORGE_PORT, or 8600]."
        ),
        click.option("--host", help="Address to listen on [FORGE_HOST, or 127.0.0.1]."),
    ):
        command = option(command)
    return command


@cli.command()
@dev_options
def demo(once: bool, **options: Any) -> None:
    """Start everything, make a sample set, show where it is.

    NATS, Postgres and a ComfyUI simulator are embedded: nothing has to be installed. Portraits, busts, fate
    cards and icons are asked for over the HTTP API, as a game would, and checked byte for byte. It serves
    on until Ctrl-C; with --once it leaves, with exit status 0 only if every asset is stored, listed and
    readable.
    """
    from forge.demo import show

    sys.exit(show(_dev_environment(**options), once=once, report=_report))


@cli.command()
@dev_options
def dev(once: bool, **options: Any) -> None:
    """Run the whole system in one command, for development.

    Embedded NATS, Postgres and ComfyUI simulator, API and workers, each restarted when it dies. Servers named
    by FORGE_NATS_URL, FORGE_POSTGRES_DSN and FORGE_COMFYUI_URLS are used instead of embedded ones. Prints
    `forge ready at URL` when it serves; logs are in DATA_DIR/log. Without FORGE_API_KEYS, requests from this
    machine are the operator `dev`.

    With --once it leaves as soon as everything serves: a check of the installation.
    """
    from forge.dev import Dev, serve

    async def say_ready(system: Dev) -> int | None:
        click.echo(f"forge ready at {system.url}")
        return 0 if once else None

    sys.exit(serve(_dev_environment(**options), say_ready, _report))


@cli.command()
@data_dir_option
def setup(data_dir: Path | None) -> None:
    """Bring streams, consumers and tables to this version.

    Repeatable: what is right already stays untouched. A stream that cannot be changed into what
    nats/streams.json says is reported with the reason.
    """
    import asyncio

    from forge import bootstrap

    for line in asyncio.run(bootstrap.setup(_settings(data_dir))):
        click.echo(line)


@cli.command()
@data_dir_option
@click.option("--open-to-loopback", is_flag=True, hidden=True)
def api(data_dir: Path | None, open_to_loopback: bool) -> None:
    """Serve the REST API and the web UI on FORGE_HOST:FORGE_PORT.

    Any number may run beside each other. SIGTERM finishes open requests first; a second one ends at once.
    """
    from forge import bootstrap

    sys.exit(bootstrap.run_api(_settings(data_dir), open_to_loopback=open_to_loopback))


def _roles(_context: click.Context, _option: click.Parameter, text: str) -> frozenset[str]:
    roles = frozenset(role.strip() for role in text.split(",") if role.strip())
    if not roles or roles - set(ROLES):
        raise click.BadParameter(f"choose from {', '.join(ROLES)}")
    return roles


@cli.command()
@data_dir_option
@click.option(
    "--roles",
    default=",".join(ROLES),
    show_default=True,
    callback=_roles,
    help="What this process does, comma separated.",
)
def worker(data_dir: Path | None, roles: frozenset[str]) -> None:
    """Draw, dispatch and project.

    \b
    generation   has ComfyUI draw, and stores what comes out
    dispatcher   chooses what is drawn next
    projector    keeps the tables up to date with the log
    cleanup      removes what has expired
    scheduler    samples resources and starts what is due

    Any number of processes may run any roles; never more than three prompts are at ComfyUI. SIGTERM stops
    taking work and leaves running prompts for another worker to adopt; a second one ends at once.
    """
    from forge import bootstrap

    sys.exit(bootstrap.run_worker(_settings(data_dir), roles))


@cli.command()
@data_dir_option
@click.option("--dry-run", is_flag=True, help="Show what would go; nothing does.")
@click.option("--yes", is_flag=True, help="Also when it is so much that it waits for an operator.")
@click.option("--json", "as_json", is_flag=True, help="Say it as one JSON object.")
@click.option(
    "--reason",
    "reasons",
    multiple=True,
    type=click.Choice(["expired", "old", "evicted", "lost", "damaged", "orphaned", "temporary"]),
    help="Only for this reason; repeatable [all but evicted; old only with --older-than].",
)
@click.option("--older-than", type=click.IntRange(0), metavar="SECONDS", help="Only what is older than that.")
@click.option("--asset-type", help="Only assets of this type.")
def cleanup(
    data_dir: Path | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    reasons: tuple[str, ...],
    older_than: int | None,
    asset_type: str | None,
) -> None:
    """Let go what has expired or does not belong together: rows without file, files without row.

    Needs log, database and asset volume, not the API. Only what is shown goes, pinned assets never.
    Over 1000 files or a fifth of the library waits for --yes (exit status 1 without). Files of deleted assets
    follow after their grace, by a worker with the role cleanup.
    """
    from forge.cleaning import Asked, clean

    if "old" in reasons and older_than is None:
        raise click.UsageError("--reason old needs --older-than")
    asked = Asked(reasons=reasons, older_than=older_than, asset_type=asset_type, dry_run=dry_run, yes=yes)
    sys.exit(clean(_settings(data_dir), asked, as_json=as_json))


def _milliseconds(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    if not least.isdigit() or not (most or least).isdigit() or int(most or least) < int(least):
        raise click.BadParameter("give one number, or two as LEAST-MOST")
    return int(least), int(most or least)


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8188, show_default=True, help="0 takes a free one."
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where input, output and temp lie [a temporary directory].",
)
@click.option(
    "--render-ms",
    default="0",
    metavar="LEAST-MOST",
    callback=_milliseconds,
    help="How long a prompt takes, drawn anew for each [0].",
)
@click.option(
    "--version",
    "comfyui_version",
    type=click.Choice(["0.27.0", "0.3.64"]),
    default="0.27.0",
    show_default=True,
)
@click.option(
    "--fault", "faults", metavar="NAME[=VALUE]", multiple=True, help="A fault to start with; repeatable."
)
@click.option(
    "--record", type=click.Path(path_type=Path, dir_okay=False), help="JSON lines of all that happens."
)
@data_dir_option
def sim(
    host: str,
    port: int,
    output_dir: Path | None,
    render_ms: tuple[int, int],
    comfyui_version: Any,
    faults: tuple[str, ...],
    record: Path | None,
    data_dir: Path | None,
) -> None:
    """Run the ComfyUI simulator alone: the real protocol, drawn pictures, no model.

    It can be made to fail in every way a ComfyUI was seen to fail: with --fault, or while it runs under
    /simulator/.
    """
    from forge.comfyui import simulator

    if output_dir is None and data_dir is not None:
        output_dir = data_dir / "comfyui"
    simulator.run(
        simulator.SimulatorOptions(
            host=host,
            port=port,
            output_dir=output_dir,
            render_ms=render_ms,
            version=comfyui_version,
            record=record,
            faults=simulator.faults_from(faults),
        ),
        lambda url: click.echo(f"ComfyUI simulator ready at {url}"),
    )


@cli.group()
def keys() -> None:
    """Create, list and revoke API keys.

    Keys are events of the log: every API knows a new one, and refuses a revoked one, within moments. These
    commands talk to NATS alone. Keys of FORGE_API_KEYS are not among them.
    """


@keys.command("create")
@click.option("--role", type=click.Choice(KEY_ROLES), required=True, help="What it may do.")
@click.option("--user", required=True, help="Whom it speaks for: a player, a service or an operator.")
@click.option("--label", help="What it is for, in words.")
@data_dir_option
def create_key(role: str, user: str, label: str | None, data_dir: Path | None) -> None:
    """Create a key and print it: this once, for only its SHA-256 is kept.

    \b
    player    jobs and assets of its own
    service   acts for any player, named by X-Forge-User
    operator  everything
    """
    text, record = _on_the_log(
        data_dir, lambda keys: keys.create(role=role, user=user, label=label, actor=_actor())
    )
    click.echo(text)
    _report(f"this is key {record.meta.correlation}; it is not shown again")


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each key, a line each.")
@data_dir_option
def list_keys(as_json: bool, data_dir: Path | None) -> None:
    """List every key there ever was, oldest first."""
    import msgspec

    for key in _on_the_log(data_dir, lambda keys: keys.all()):
        told = {name: value for name, value in msgspec.structs.asdict(key).items() if name != "digest"}
        if as_json:
            click.echo(msgspec.json.encode(told).decode())
            continue
        state = f"revoked {key.revoked_at:%Y-%m-%d %H:%M} by {key.revoked_by}" if key.revoked_at else "good"
        made = f"created {key.created_at:%Y-%m-%d %H:%M} by {key.created_by}"
        click.echo("  ".join([key.id, f"{key.role}:{key.user_id}", key.label or "-", made, state]))


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
@data_dir_option
def revoke_key(key_id: str, data_dir: Path | None) -> None:
    """Revoke a key for ever; saying it again does no harm."""
    _on_the_log(data_dir, lambda keys: keys.revoke(key_id, actor=_actor()))
    _report(f"key {key_id} is revoked")


def _on_the_log(data_dir: Path | None, act: Callable[[Keys], Awaitable[T]]) -> T:
    """Do one thing with the keys of the log."""
    import asyncio

    from forge import bootstrap

    async def done() -> T:
        async with bootstrap.keys(_settings(data_dir)) as keys:
            return await act(keys)

    return asyncio.run(done())


def _actor() -> str:
    """Whose shell it is, for the log."""
    import pwd

    try:
        return f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:
        return f"cli:{os.getuid()}"


@cli.command()
@data_dir_option
def settings(data_dir: Path | None) -> None:
    """List every setting: variable, value, unit, meaning. Secrets are not shown."""
    from forge.settings import describe

    environ = _environment(data_dir)
    current = _settings(data_dir)
    click.echo("Settings are read from the environment once, at start.\n")
    for name, about in describe().items():
        given = bool(environ.get(about.variable, "").strip())
        value = "(hidden)" if about.secret and given else _shown(getattr(current, name))
        unit = f" {about.unit}" if about.unit and value else ""
        source = "" if given else "  (default)"
        click.echo(f"{about.variable}={value}{unit}{source}\n    {about.meaning}")
    click.echo("OTEL_*\n    tracing and metrics, as OpenTelemetry defines them")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={one}" for name, one in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _settings(data_dir: Path | None) -> Settings:
    from forge.settings import load

    return load(_environment(data_dir))


def _environment(data_dir: Path | None) -> dict[str, str]:
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
    return {**addresses, **environ, "FORGE_DATA_DIR": str(place)}


def _dev_environment(
    host: str | None, port: int | None, data_dir: Path | None, comfyui_urls: tuple[str, ...]
) -> dict[str, str]:
    """The variables of a whole system: what the command line says wins."""
    environ = _given()
    said = {"FORGE_HOST": host, "FORGE_PORT": port, "FORGE_COMFYUI_URLS": ",".join(comfyui_urls) or None}
    environ.update({name: str(value) for name, value in said.items() if value is not None})
    return {**environ, "FORGE_DATA_DIR": str(_place(data_dir))}


def _given() -> dict[str, str]:
    """The environment; a variable of forge's that is set to nothing counts as not set."""
    return {
        name: value for name, value in os.environ.items() if value.strip() or not name.startswith("FORGE_")
    }


def _place(data_dir: Path | None) -> Path:
    return (data_dir or Path(_given().get("FORGE_DATA_DIR", ".forge"))).expanduser().absolute()


def _report(line: str) -> None:
    click.echo(f"forge: {line}", err=True)
