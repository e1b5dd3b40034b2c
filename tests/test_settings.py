"""Settings come from the environment once; what cannot be used is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.errors import SettingInvalid
from forge.settings import ApiKey, Settings, describe, load


def test_without_any_variable_every_setting_has_its_default() -> None:
    assert load({}) == Settings()


def test_a_variable_set_to_nothing_counts_as_not_set() -> None:
    assert load({"FORGE_PORT": " ", "FORGE_DISK_LIMIT_BYTES": ""}) == Settings()


def test_values_are_read_in_their_own_type() -> None:
    settings = load(
        {
            "FORGE_COMFYUI_URLS": "http://gpu:8188/, http://cpu:8188",
            "FORGE_COMFYUI_DIRS": ", /srv/cpu",
            "FORGE_COMFYUI_CANCEL_SECONDS": "2.5",
            "FORGE_DATA_DIR": "/srv/forge",
            "FORGE_PORT": "0",
            "FORGE_API_KEYS": "player:mei:a:b, operator:ops:s",
            "FORGE_DISK_WARN_RATIO": "0.5",
            "FORGE_DISK_LIMIT_BYTES": "1000000",
            "FORGE_TRUSTED_PROXIES": "10.0.0.0/8, 192.0.2.1, ::1",
            "FORGE_ALLOWED_ORIGINS": "https://Game.example/, http://localhost:5173",
            "FORGE_RATE_PER_IP": "2.5",
        }
    )
    assert settings.comfyui_urls == ("http://gpu:8188", "http://cpu:8188")
    assert settings.comfyui_dirs == (None, Path("/srv/cpu"))
    assert settings.comfyui_cancel_seconds == 2.5
    assert settings.data_dir == Path("/srv/forge")
    assert settings.assets_dir == Path("/srv/forge/assets")
    assert settings.port == 0
    assert settings.api_keys == (ApiKey("player", "mei", "a:b"), ApiKey("operator", "ops", "s"))
    assert settings.disk_warn_ratio == 0.5
    assert settings.disk_limit_bytes == 1_000_000
    assert [str(network) for network in settings.trusted_proxies] == ["10.0.0.0/8", "192.0.2.1/32", "::1/128"]
    assert settings.allowed_origins == ("https://game.example", "http://localhost:5173")
    assert settings.rate_per_ip == 2.5


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FORGE_PORT", "many"),
        ("FORGE_PORT", "65536"),
        ("FORGE_COMFYUI_URLS", "gpu:8188"),
        ("FORGE_COMFYUI_URLS", ","),
        ("FORGE_COMFYUI_DIRS", "/srv/gpu,/srv/cpu"),
        ("FORGE_COMFYUI_UNREACHABLE_SECONDS", "0"),
        ("FORGE_COMFYUI_CANCEL_SECONDS", "-1"),
        ("FORGE_COMFYUI_QUARANTINE_SECONDS", "0"),
        ("FORGE_ASSET_TTL_SECONDS", "0"),
        ("FORGE_ASSET_TTLS", "ui_icon"),
        ("FORGE_ASSET_TTLS", "ui_icon=0d"),
        ("FORGE_ASSET_TTLS", "=3d"),
        ("FORGE_ASSET_TTLS", "ui_icon=3w"),
        ("FORGE_ASSET_USE_EXTENDS_SECONDS", "-1"),
        ("FORGE_CLEANUP_GRACE_SECONDS", "inf"),
        ("FORGE_ORPHAN_GRACE_SECONDS", "-1"),
        ("FORGE_SCRUB_BYTES", "-1"),
        ("FORGE_DISK_TARGET_RATIO", "0"),
        ("FORGE_DISK_WARN_RATIO", "1.5"),
        ("FORGE_DISK_CLEAN_RATIO", "0.7"),
        ("FORGE_DISK_LIMIT_BYTES", "-1"),
        ("FORGE_DISK_RESERVE_BYTES", "-1"),
        ("FORGE_MEMORY_LIMIT_BYTES", "0"),
        ("FORGE_MEMORY_SHED_RATIO", "0"),
        ("FORGE_MEMORY_SHED_RATIO", "1.1"),
        ("FORGE_RATE_PER_HOUR", "-1"),
        ("FORGE_QUEUE_LIMIT", "0"),
        ("FORGE_RATE_PER_IP", "-1"),
        ("FORGE_RATE_PER_IP", "nan"),
        ("FORGE_LEAVE_SECONDS", "-1"),
        ("FORGE_SOCKETS", "0"),
        ("FORGE_SOCKETS_PER_USER", "0"),
        ("FORGE_TRUSTED_PROXIES", "proxy.example"),
        ("FORGE_TRUSTED_PROXIES", "10.0.0.0/33"),
        ("FORGE_ALLOWED_ORIGINS", "game.example"),
        ("FORGE_ALLOWED_ORIGINS", "https://game.example/play"),
        ("FORGE_ALLOWED_ORIGINS", "*"),
        ("FORGE_SCAN_SECONDS", "nan"),
        ("FORGE_SCAN_SECONDS", "0"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_with_its_name(variable: str, value: str) -> None:
    with pytest.raises(SettingInvalid, match=variable):
        load({variable: value})


def test_an_asset_type_may_have_a_life_of_its_own() -> None:
    settings = load({"FORGE_ASSET_TTLS": "ui_icon=30d, fate_card=90m, npc_bust=7"})
    types = ("ui_icon", "fate_card", "npc_bust", "character_portrait")
    assert [settings.ttl_of(type_) for type_ in types] == [30 * 86400, 5400, 7, 7 * 86400]


def test_a_clean_up_never_stops_above_the_warning() -> None:
    assert load({}).target_ratio == 0.8
    assert load({"FORGE_DISK_WARN_RATIO": "0.4"}).target_ratio == 0.4
    assert load({"FORGE_DISK_TARGET_RATIO": "0.3"}).target_ratio == 0.3


@pytest.mark.parametrize("keys", ["god:mei:hunter2", "player::hunter2", "player:mei", "hunter2"])
def test_a_bad_key_is_refused_without_showing_it(keys: str) -> None:
    with pytest.raises(SettingInvalid, match="FORGE_API_KEYS") as refused:
        load({"FORGE_API_KEYS": keys})
    assert "hunter2" not in str(refused.value)


def test_a_key_does_not_show_its_secret() -> None:
    assert "hunter2" not in repr(ApiKey("player", "mei", "hunter2"))


def test_every_setting_says_its_variable_and_meaning() -> None:
    described = describe()
    assert list(described) == list(Settings.__struct_fields__)
    assert all(about.variable.startswith("FORGE_") and about.meaning for about in described.values())
    assert len({about.variable for about in described.values()}) == len(described)


def test_a_secret_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "dsn"
    file.write_text("postgresql://forge:s3cret@postgres/forge\n")
    assert (
        load({"FORGE_POSTGRES_DSN_FILE": str(file)}).postgres_dsn
        == "postgresql://forge:s3cret@postgres/forge"
    )
    both = {"FORGE_POSTGRES_DSN_FILE": str(file), "FORGE_POSTGRES_DSN": "postgresql://here/forge"}
    assert load(both).postgres_dsn == "postgresql://here/forge"
    with pytest.raises(SettingInvalid, match="FORGE_API_KEYS_FILE"):
        load({"FORGE_API_KEYS_FILE": str(tmp_path / "none")})
    assert load({"FORGE_HOST_FILE": str(file)}).host == "127.0.0.1", "only secrets are read from files"
