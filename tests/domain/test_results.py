"""Where a recipe was drawn last."""

from __future__ import annotations

from factories import Log, completed, job_id
from forge.domain.results import Results


def test_the_newest_completion_is_found() -> None:
    results, log = Results(), Log()
    for nth in (1, 2):
        results.apply(log.add(completed(job_id(nth), recipe="r")))
    assert results.find("r") == 2
    assert results.find("another") is None


def test_a_job_without_recipe_or_pictures_is_no_result() -> None:
    results, log = Results(), Log()
    results.apply(log.add(completed()))
    results.apply(log.add(completed(recipe="r", assets=[])))
    assert results.find("") is results.find("r") is None


def test_it_remembers_so_many_and_no_more() -> None:
    results, log = Results(remembered=2), Log()
    for recipe in ("a", "b", "a", "c"):
        results.apply(log.add(completed(recipe=recipe)))
    assert (results.find("a"), results.find("b"), results.find("c")) == (3, None, 4)
