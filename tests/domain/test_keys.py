"""Which keys open the door, as their events tell it."""

from __future__ import annotations

import pytest

from factories import KEY, Log, key_created, key_revoked, submitted
from forge.domain.keys import Keyring, created, has_form, is_id
from forge.errors import Invalid

SECRET = "5a" * 32
TEXT, CREATED = created(KEY, SECRET, "service", "shop", "for the shop")


def ring(*events: object) -> Keyring:
    log, made = Log(), Keyring()
    for event in events:
        made.apply(log.add(event))  # type: ignore[arg-type]
    return made


def test_a_key_opens_the_door_until_it_is_revoked() -> None:
    key = ring(CREATED).find(TEXT)
    assert key is not None
    assert (key.id, key.role, key.user_id, key.label) == (KEY, "service", "shop", "for the shop")
    assert ring(CREATED).good(KEY)
    revoked = ring(CREATED, key_revoked())
    assert (revoked.find(TEXT), revoked.good(KEY)) == (None, False)


def test_the_event_does_not_hold_the_key() -> None:
    assert SECRET not in str(CREATED)
    assert f"forge_{KEY}_{SECRET}" == TEXT


@pytest.mark.parametrize(
    "text",
    [
        "",
        KEY,
        f"forge_{KEY}_{SECRET[:-1]}b",
        f"forge_{KEY}_{SECRET}0",
        f"forge_{KEY[:-1]}6_{SECRET}",
        f"Forge_{KEY}_{SECRET}",
        f"forge_{KEY}_{SECRET}\n",
        f"forge_{KEY}_",
        "forge_" * 20,
        "\udcff",
    ],
)
def test_anything_else_opens_nothing(text: str) -> None:
    assert ring(CREATED).find(text) is None


def test_a_revoked_key_stays_revoked_whatever_comes() -> None:
    folded = ring(CREATED, key_revoked(), CREATED, key_created(), key_revoked())
    assert folded.find(TEXT) is None
    assert (folded.keys[KEY].seq, folded.keys[KEY].revoked_by) == (2, "test")


def test_an_id_that_comes_again_changes_no_key() -> None:
    folded = ring(CREATED, key_created(role="operator"), key_revoked("0" * 16), submitted())
    assert [key.role for key in folded.keys.values()] == ["service"]
    assert folded.find(TEXT) is not None


@pytest.mark.parametrize(
    ("role", "user", "label", "fields"),
    [
        ("king", "mei", None, {"role"}),
        ("player", "", None, {"user"}),
        ("player", "a\nb", "", {"user", "label"}),
        ("player", " mei", "x" * 129, {"user", "label"}),
        ("player", "me\u200bi", "\u202etxt", {"user", "label"}),
        ("", "\ud800", None, {"role", "user"}),
    ],
)
def test_what_nobody_can_be_is_refused_by_name(
    role: str, user: str, label: str | None, fields: set[str]
) -> None:
    with pytest.raises(Invalid) as refused:
        created(KEY, SECRET, role, user, label)
    assert {error.field for error in refused.value.errors} == fields


def test_names_may_be_written_in_any_script() -> None:
    assert created(KEY, SECRET, "player", "梅 王", "梅's phone")[1].user_id == "梅 王"


def test_form_and_id_are_told_by_their_pattern() -> None:
    assert has_form(TEXT)
    assert not has_form("mei-secret")
    assert is_id(KEY)
    assert not is_id(f"{KEY}\n")
