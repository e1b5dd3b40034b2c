"""Settings: one frozen struct, read from the environment once.

The hard limits (L1-L4) are constants in :mod:`forge.domain.limits`, not settings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints
from urllib.parse import urlsplit

import msgspec

from forge.domain.keys import MAX_TEXT, ROLES
from forge.errors import SettingInvalid


class ApiKey(msgspec.Struct, frozen=True):
    """One bootstrap key: who it speaks for and with which rights."""

    role: str
    user: str
    secret: str

    def __repr__(self) -> str:
        return f"ApiKey({self.role}:{self.user}:…)"


class Setting(msgspec.Struct, frozen=True):
    """What `forge settings` says about one variable."""

    variable: str
    meaning: str
    unit: str = ""
    secret: bool = False


_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an operator may set; every field names its variable, meaning and unit."""

    nats_url: Annotated[
        str, Setting("FORGE_NATS_URL", "where the event log lives; of a cluster all servers, comma separated")
    ] = "nats://127.0.0.1:4222"
    nats_replicas: Annotated[
        int | None,
        Setting(
            "FORGE_NATS_REPLICAS",
            "copies of every stream that `forge setup` makes: 3 in a cluster of three; default: as it is",
        ),
    ] = None
    nats_passwords_dir: Annotated[
        Path | None,
        Setting(
            "FORGE_NATS_PASSWORDS_DIR",
            "directory with the password of each NATS user, in files operator, api, worker, projector, "
            "cleanup; default: connect as no user",
        ),
    ] = None
    postgres_dsn: Annotated[str, Setting("FORGE_POSTGRES_DSN", "where the tables live", secret=True)] = (
        "postgresql://postgres@127.0.0.1:5432/forge"
    )
    comfyui_urls: Annotated[
        tuple[str, ...], Setting("FORGE_COMFYUI_URLS", "ComfyUI servers, comma separated, preferred first")
    ] = ("http://127.0.0.1:8188",)
    comfyui_dirs: Annotated[
        tuple[Path | None, ...],
        Setting(
            "FORGE_COMFYUI_DIRS",
            "for each of the servers the directory of its output and input, where forge removes what it had "
            "drawn; comma separated, empty where it is not shared",
        ),
    ] = ()
    comfyui_unreachable_seconds: Annotated[
        float,
        Setting(
            "FORGE_COMFYUI_UNREACHABLE_SECONDS",
            "how long a ComfyUI may give no answer before the jobs it has are tried elsewhere",
            "s",
        ),
    ] = 30.0
    comfyui_cancel_seconds: Annotated[
        float,
        Setting(
            "FORGE_COMFYUI_CANCEL_SECONDS",
            "how long a stopped prompt may go on, its place held, before its ComfyUI counts as wedged",
            "s",
        ),
    ] = 60.0
    comfyui_quarantine_seconds: Annotated[
        float,
        Setting(
            "FORGE_COMFYUI_QUARANTINE_SECONDS",
            "how long a wedged ComfyUI that neither restarts nor executes anything is not tried again",
            "s",
        ),
    ] = 900.0
    data_dir: Annotated[
        Path, Setting("FORGE_DATA_DIR", "where pictures and embedded servers keep their files")
    ] = Path(".forge")
    host: Annotated[str, Setting("FORGE_HOST", "address the API listens on")] = "127.0.0.1"
    port: Annotated[int, Setting("FORGE_PORT", "port the API listens on; 0 takes a free one")] = 8600
    leave_seconds: Annotated[
        float,
        Setting(
            "FORGE_LEAVE_SECONDS",
            "how long an API that is told to stop serves on with /readyz 503, for a load balancer to notice; "
            "0: there is none",
            "s",
        ),
    ] = 0.0
    worker_port: Annotated[
        int | None,
        Setting(
            "FORGE_WORKER_PORT",
            "port on FORGE_HOST where a worker answers /livez, /readyz and /metrics; 0 takes a free one; "
            "none by default",
        ),
    ] = None
    workflows_dir: Annotated[
        Path | None, Setting("FORGE_WORKFLOWS_DIR", "your own job types, two files each; none by default")
    ] = None
    models: Annotated[
        dict[str, str],
        Setting(
            "FORGE_MODELS",
            "model files of job types: checkpoint=a.safetensors,ui_icon.lora=b.safetensors@0.7",
        ),
    ] = {}
    api_keys: Annotated[
        tuple[ApiKey, ...], Setting("FORGE_API_KEYS", "bootstrap keys as role:user:secret,…", secret=True)
    ] = ()
    asset_ttl_seconds: Annotated[
        int,
        Setting("FORGE_ASSET_TTL_SECONDS", "how long an asset lives unless the request says otherwise", "s"),
    ] = 7 * 86400
    asset_ttls: Annotated[
        dict[str, int],
        Setting(
            "FORGE_ASSET_TTLS", "the same for single asset types: ui_icon=30d,fate_card=12h (d, h, m, s)"
        ),
    ] = {}
    asset_use_extends_seconds: Annotated[
        int,
        Setting(
            "FORGE_ASSET_USE_EXTENDS_SECONDS",
            "how long an asset lives after its last use at least; 0: no matter",
            "s",
        ),
    ] = 0
    cleanup_grace_seconds: Annotated[
        float,
        Setting("FORGE_CLEANUP_GRACE_SECONDS", "how long the file of a deleted asset stays at least", "s"),
    ] = 20.0
    orphan_grace_seconds: Annotated[
        float,
        Setting("FORGE_ORPHAN_GRACE_SECONDS", "how old a file nobody refers to is before it goes", "s"),
    ] = 3600.0
    scrub_bytes: Annotated[
        int,
        Setting("FORGE_SCRUB_BYTES", "stored bytes each scan compares with their hash; 0: none", "bytes"),
    ] = 64 * 1024 * 1024
    disk_target_ratio: Annotated[
        float,
        Setting(
            "FORGE_DISK_TARGET_RATIO",
            "part of the asset volume a clean-up leaves in use, at most FORGE_DISK_WARN_RATIO",
            "0-1",
        ),
    ] = 0.8
    disk_warn_ratio: Annotated[
        float,
        Setting("FORGE_DISK_WARN_RATIO", "part of the asset volume in use that raises a warning", "0-1"),
    ] = 0.8
    disk_clean_ratio: Annotated[
        float,
        Setting("FORGE_DISK_CLEAN_RATIO", "part of the asset volume in use that starts a clean-up", "0-1"),
    ] = 0.9
    disk_limit_bytes: Annotated[
        int | None,
        Setting(
            "FORGE_DISK_LIMIT_BYTES",
            "treat the asset volume as this large; default: the real volume",
            "bytes",
        ),
    ] = None
    trusted_proxies: Annotated[
        tuple[IPv4Network | IPv6Network, ...],
        Setting(
            "FORGE_TRUSTED_PROXIES",
            "addresses or networks, comma separated, whose X-Forwarded-For is believed; none by default",
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        Setting(
            "FORGE_ALLOWED_ORIGINS",
            "web origins whose pages may open sockets, comma separated, besides forge's own",
        ),
    ] = ()
    rate_per_ip: Annotated[
        float | None,
        Setting(
            "FORGE_RATE_PER_IP",
            "requests from one address (IPv6: /64), 5 s of it at once; 0 is no limit; "
            "default: 200, and no limit for this machine itself",
            "requests/s",
        ),
    ] = None
    sockets: Annotated[
        int, Setting("FORGE_SOCKETS", "event sockets open at once, in each API process", "sockets")
    ] = 1000
    sockets_per_user: Annotated[
        int, Setting("FORGE_SOCKETS_PER_USER", "of which one user may have", "sockets")
    ] = 4
    disk_reserve_bytes: Annotated[
        int | None,
        Setting(
            "FORGE_DISK_RESERVE_BYTES",
            "free bytes below which the asset volume is full; default: 64 MiB, at most 5 % of the volume",
            "bytes",
        ),
    ] = None
    memory_limit_bytes: Annotated[
        int,
        Setting("FORGE_MEMORY_LIMIT_BYTES", "resident memory one process of forge may come to use", "bytes"),
    ] = 1024**3
    memory_shed_ratio: Annotated[
        float,
        Setting(
            "FORGE_MEMORY_SHED_RATIO",
            "part of the memory of process, container or machine in use from which on no work is taken",
            "0-1",
        ),
    ] = 0.9
    rate_per_hour: Annotated[
        int,
        Setting(
            "FORGE_RATE_PER_HOUR", "generations a user may ask for in an hour; 0 for any number", "jobs/h"
        ),
    ] = 20
    queue_limit: Annotated[
        int, Setting("FORGE_QUEUE_LIMIT", "waiting jobs in all before forge answers 503", "jobs")
    ] = 10_000
    snapshot_events: Annotated[
        int,
        Setting(
            "FORGE_SNAPSHOT_EVENTS",
            "after how many events an API or a dispatcher keeps what it knows, to start sooner; 0: never",
            "events",
        ),
    ] = 20_000
    access_flush_seconds: Annotated[
        float,
        Setting("FORGE_ACCESS_FLUSH_SECONDS", "how often an API writes down which assets were fetched", "s"),
    ] = 10.0
    scan_seconds: Annotated[
        float, Setting("FORGE_SCAN_SECONDS", "how often the scheduler samples and scans", "s")
    ] = 60.0
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        Setting("FORGE_LOG_LEVEL", "the least that a log line of `forge api` and `forge worker` tells of"),
    ] = "INFO"

    def ttl_of(self, asset_type: str) -> int:
        """How long an asset of this type lives unless the request says otherwise, in seconds."""
        return self.asset_ttls.get(asset_type, self.asset_ttl_seconds)

    @property
    def target_ratio(self) -> float:
        """Down to where a clean-up goes: never above the line that raises a warning."""
        return min(self.disk_target_ratio, self.disk_warn_ratio)

    @property
    def assets_dir(self) -> Path:
        return self.data_dir / "assets"


def describe() -> dict[str, Setting]:
    """Field name → its :class:`Setting`, in the order of declaration."""
    hints = get_type_hints(Settings, include_extras=True)
    return {
        name: next(a for a in get_args(hints[name]) if isinstance(a, Setting))
        for name in Settings.__struct_fields__
    }


def opened(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a secret that a file holds stands in its variable.

    ``FORGE_POSTGRES_DSN_FILE`` names the file of ``FORGE_POSTGRES_DSN``, which wins where both are set.

    Raises:
        SettingInvalid: the file cannot be read.
    """
    found = dict(environ)
    for setting in describe().values():
        variable = f"{setting.variable}_FILE"
        file = environ.get(variable, "").strip()
        if setting.secret and file and not environ.get(setting.variable, "").strip():
            try:
                found[setting.variable] = Path(file).expanduser().read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SettingInvalid(f"{variable}={file}: {error}") from None
    return found


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings.

    Raises:
        SettingInvalid: names the variable and the value that cannot be used.
    """
    environ = opened(environ)
    values: dict[str, Any] = {}
    hints = get_type_hints(Settings)
    for name, setting in describe().items():
        raw = environ.get(setting.variable, "").strip()
        if raw:
            try:
                values[name] = _parse(name, raw, hints[name])
            except (ValueError, msgspec.ValidationError) as error:
                shown = "…" if setting.secret else repr(raw)
                raise SettingInvalid(f"{setting.variable}={shown}: {error}") from None
    settings = Settings(**values)
    _check(settings)
    return settings


def _parse(name: str, raw: str, kind: Any) -> Any:
    if name == "comfyui_urls":
        return tuple(_url(u.strip()) for u in raw.split(",") if u.strip())
    if name == "comfyui_dirs":
        return tuple(Path(d.strip()).expanduser().absolute() if d.strip() else None for d in raw.split(","))
    if name == "api_keys":
        return tuple(_api_key(k.strip()) for k in raw.split(",") if k.strip())
    if name == "trusted_proxies":
        return tuple(ip_network(n.strip(), strict=False) for n in raw.split(",") if n.strip())
    if name == "allowed_origins":
        return tuple(_origin(o.strip()) for o in raw.split(",") if o.strip())
    if name == "asset_ttls":
        return dict(_asset_ttl(t.strip()) for t in raw.split(",") if t.strip())
    if name == "models":
        return dict(_model(m.strip()) for m in raw.split(",") if m.strip())
    if name == "log_level":
        raw = raw.upper()
    if kind in (Path, Path | None):
        return Path(raw).expanduser().absolute()
    return msgspec.convert(raw, kind, strict=False)


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError(f"{text!r} is not an http:// or https:// address")
    return text.rstrip("/")


def _origin(text: str) -> str:
    found = urlsplit(_url(text))
    if not found.hostname or text.rstrip("/") != f"{found.scheme}://{found.netloc}":
        raise ValueError(f"{text!r} is not an origin like https://game.example")
    return text.rstrip("/").lower()


def _model(text: str) -> tuple[str, str]:
    slot, equals, file = (part.strip() for part in text.partition("="))
    if not slot or not equals:
        raise ValueError(f"{text!r} is not SLOT=FILE; an empty FILE takes a default away")
    return slot, file


def _asset_ttl(text: str) -> tuple[str, int]:
    asset_type, _, ttl = (part.strip() for part in text.partition("="))
    number, unit = (ttl[:-1], ttl[-1]) if ttl[-1:] in _SECONDS else (ttl, "s")
    if not asset_type or not number.isdecimal() or int(number) == 0:
        raise ValueError(f"{text!r} is not TYPE=TIME; a time is like 30d, 12h, 90m or 3600")
    return asset_type, int(number) * _SECONDS[unit]


def _api_key(text: str) -> ApiKey:
    role, _, rest = text.partition(":")
    user, _, secret = rest.partition(":")
    if role not in ROLES or not user or not secret:
        raise ValueError(f"each key is role:user:secret with a role of {', '.join(ROLES)}")
    if len(secret) > MAX_TEXT:
        raise ValueError(f"a key's secret has at most {MAX_TEXT} characters")
    return ApiKey(role, user, secret)


def _check(s: Settings) -> None:
    bounds = {
        "nats_replicas": s.nats_replicas in (None, 1, 3, 5),
        "port": 0 <= s.port <= 65535,
        "asset_ttl_seconds": s.asset_ttl_seconds > 0,
        "asset_use_extends_seconds": s.asset_use_extends_seconds >= 0,
        "cleanup_grace_seconds": 0 <= s.cleanup_grace_seconds < math.inf,
        "orphan_grace_seconds": 0 <= s.orphan_grace_seconds < math.inf,
        "scrub_bytes": s.scrub_bytes >= 0,
        "disk_target_ratio": 0 < s.disk_target_ratio <= 1,
        "disk_warn_ratio": 0 < s.disk_warn_ratio <= 1,
        "disk_clean_ratio": s.disk_warn_ratio <= s.disk_clean_ratio <= 1,
        "rate_per_hour": s.rate_per_hour >= 0,
        "rate_per_ip": s.rate_per_ip is None or 0 <= s.rate_per_ip <= 1_000_000,
        "leave_seconds": 0 <= s.leave_seconds <= 300,
        "sockets": s.sockets > 0,
        "sockets_per_user": s.sockets_per_user > 0,
        "queue_limit": s.queue_limit > 0,
        "scan_seconds": s.scan_seconds > 0,
        "snapshot_events": s.snapshot_events >= 0,
        "access_flush_seconds": 0.1 <= s.access_flush_seconds <= 3600,
        "disk_limit_bytes": s.disk_limit_bytes is None or s.disk_limit_bytes > 0,
        "disk_reserve_bytes": s.disk_reserve_bytes is None or s.disk_reserve_bytes >= 0,
        "memory_limit_bytes": s.memory_limit_bytes > 0,
        "memory_shed_ratio": 0.1 <= s.memory_shed_ratio <= 1,
        "comfyui_urls": len(s.comfyui_urls) > 0,
        "comfyui_dirs": len(s.comfyui_dirs) in (0, len(s.comfyui_urls)),
        "comfyui_unreachable_seconds": s.comfyui_unreachable_seconds > 0,
        "comfyui_cancel_seconds": s.comfyui_cancel_seconds > 0,
        "comfyui_quarantine_seconds": s.comfyui_quarantine_seconds > 0,
    }
    for name, fine in bounds.items():
        if not fine:
            raise SettingInvalid(f"{describe()[name].variable}={getattr(s, name)!r}: out of range")
