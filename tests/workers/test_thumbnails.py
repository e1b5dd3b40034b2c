"""Thumbnails come when a job is over, and nothing waits for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import msgspec
import pytest

from forge.canonical import THUMBNAIL_WIDTHS
from forge.errors import StoreFailed
from forge.events.assets import AssetStored
from forge.images import Workshop
from waiting import wait_until
from workers.works import Works, hold_before

SMALL, WIDE = 64, 600


@pytest.fixture(autouse=True)
def size(works: Works) -> Callable[[int], None]:
    """Sets how wide the pictures are, from now on."""

    def width(pixels: int) -> None:
        swatch = works.workflows["swatch"]
        graph = copy.deepcopy(swatch.graph)
        graph["1"]["inputs"]["width"] = pixels
        works.workflows["swatch"] = msgspec.structs.replace(swatch, graph=graph)

    width(WIDE)
    return width


async def stored(works: Works, job: UUID) -> AssetStored:
    [event] = [e for e in await works.log() if isinstance(e, AssetStored) and e.job_id == job]
    return event


def there(works: Works, picture: AssetStored) -> bool:
    paths = [works.store.thumbnail_path(picture.content_hash, width) for width in THUMBNAIL_WIDTHS]
    return all(path.exists() for path in paths)


async def test_a_job_is_over_and_its_place_free_before_its_thumbnails_are_made(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = hold_before(monkeypatch, Workshop, "thumbnails")
    await works.start_worker()
    first, second = await works.submit(1), await works.submit(2)
    await making.occupied()
    for job in (first, second):
        await works.happened(job, "completed")
        await works.nothing_left(job)
    pictures = [await stored(works, job) for job in (first, second)]
    assert not any(there(works, picture) for picture in pictures)
    making.opened.set()
    await wait_until(lambda: all(there(works, picture) for picture in pictures), what="they are made")


async def test_a_small_picture_waits_for_somebody_to_ask(works: Works, size: Callable[[int], None]) -> None:
    await works.start_worker()
    size(SMALL)
    small = await works.submit(1)
    await works.happened(small, "completed")
    size(WIDE)
    wide = await works.submit(2)
    await works.happened(wide, "completed")
    picture = await stored(works, wide)
    await wait_until(lambda: there(works, picture), what="those of the later one are made")
    assert not there(works, await stored(works, small))


async def test_those_that_cannot_be_made_stop_neither_jobs_nor_the_next_ones(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = Workshop.thumbnails, list[Path]()

    async def once(self: Workshop, source: Path, folder: Path) -> dict[int, Path]:
        if not failed:
            failed.append(source)
            raise StoreFailed("on purpose")
        return await real(self, source, folder)

    monkeypatch.setattr(Workshop, "thumbnails", once)
    await works.start_worker()
    first = await works.submit(1)
    await works.happened(first, "completed")
    await wait_until(lambda: failed, what="the first ones were tried")
    second = await works.submit(2)
    await works.happened(second, "completed")
    picture = await stored(works, second)
    await wait_until(lambda: there(works, picture), what="the second's are made")
    assert not there(works, await stored(works, first))
