"""Ids that follow from names: the same for ever, and never the same for two names."""

from __future__ import annotations

from uuid import RFC_4122, UUID

from hypothesis import given
from hypothesis import strategies as st

from forge.domain.ids import asset_id, derived_id, keyed_job_id, new_id, prompt_id

names = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=3)


def test_derived_ids_never_change() -> None:
    # written down once: a changed value would lose every stored picture and every key
    assert asset_id("ab" * 32) == UUID("33e82985-c5dc-7633-9927-28bcf0e77b45")
    assert keyed_job_id("mei", "k1") == UUID("14db8fe7-409a-7181-b756-8dd3755b8b13")
    assert prompt_id(UUID(int=1), 2) == UUID("b9c28422-71ae-54a6-81c9-a0b950dd0142")


@given(names, names)
def test_two_names_never_share_an_id(one: list[str], other: list[str]) -> None:
    assert (derived_id("job", *one) == derived_id("job", *other)) == (one == other)
    assert derived_id("job", *one) != derived_id("asset", *one)


@given(names)
def test_every_id_a_client_sees_is_a_version_7(given_names: list[str]) -> None:
    for id_ in (derived_id("job", *given_names), new_id()):
        assert (id_.version, id_.variant) == (7, RFC_4122)


def test_fresh_ids_are_ordered_by_time() -> None:
    ids = [new_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert [id_.int >> 80 for id_ in ids] == sorted(id_.int >> 80 for id_ in ids)


@given(st.uuids(), st.uuids(), st.integers(1, 99), st.integers(1, 99))
def test_every_attempt_has_its_own_prompt(one: UUID, other: UUID, first: int, second: int) -> None:
    assert (prompt_id(one, first) == prompt_id(other, second)) == ((one, first) == (other, second))
