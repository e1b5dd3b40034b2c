"""What is lent as drawn by a recipe was drawn by it, also while workers and APIs differ in version."""

from __future__ import annotations

import pytest

from factories import request
from forge.events.jobs import JobCompleted
from workers.works import Works

RECIPE = "5" * 64


@pytest.mark.fault("C1")
@pytest.mark.parametrize("same", [True, False], ids=["same version", "another version"])
async def test_only_what_the_version_asked_for_has_drawn_is_lent(works: Works, same: bool) -> None:
    version = works.workflows["swatch"].version if same else "of another day"
    asked = request(
        job_type="swatch",
        asset_type="ui_icon",
        params={"color": 1},
        workflow_version=version,
        recipe=RECIPE,
    )
    [loaded] = await works.admissions.submit("mei", [asked], actor="mei")
    await works.start_dispatcher()
    await works.start_worker()
    await works.happened(loaded.job.id, "completed")
    done = (await works.load(loaded.job.id)).facts[-1].event
    assert isinstance(done, JobCompleted)
    assert done.recipe == (RECIPE if same else "")
