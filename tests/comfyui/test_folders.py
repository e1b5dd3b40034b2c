"""What an attempt left in ComfyUI's folders goes, and nothing else does, whatever ComfyUI put there."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from forge.comfyui.folders import Folders, Left, shared

JOB = UUID("0199c0de-0000-7000-8000-00000000abcd")


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    root = tmp_path / "comfyui"
    for kind in ("output", "input", "temp"):
        (root / kind).mkdir(parents=True)
    return root


def drawn(comfyui: Path, job: str | UUID, attempt: str | int, kind: str = "output") -> Path:
    folder = comfyui / kind / "forge" / str(job) / str(attempt)
    folder.mkdir(parents=True)
    (folder / "picture_00001_.png").write_bytes(b"a picture")
    return folder


def test_an_attempt_goes_with_all_it_has_and_with_its_jobs_folder(comfyui: Path) -> None:
    (drawn(comfyui, JOB, 1) / "deeper").mkdir()
    drawn(comfyui, JOB, 1, "input")
    Folders(comfyui).remove(JOB, 1)
    assert os.listdir(comfyui / "output" / "forge") == []
    assert os.listdir(comfyui / "input" / "forge") == []


def test_other_attempts_and_other_peoples_files_stay(comfyui: Path) -> None:
    other, mine = drawn(comfyui, JOB, 2), drawn(comfyui, JOB, 1)
    somebodys = comfyui / "output" / "somebody.png"
    somebodys.touch()
    Folders(comfyui).remove(JOB, 1)
    assert (mine.exists(), other.exists(), somebodys.exists()) == (False, True, True)


def test_what_is_not_there_need_not_be_removed(comfyui: Path) -> None:
    Folders(comfyui).remove(JOB, 1)
    drawn(comfyui, JOB, 2)
    Folders(comfyui).remove(JOB, 1)
    assert Folders(comfyui).left() == [Left(JOB, 2)]


def test_only_attempts_of_jobs_are_found(comfyui: Path) -> None:
    drawn(comfyui, JOB, 3)
    drawn(comfyui, JOB, 12, "input")
    strange = ("0", "01", "-1", "1.0", "x", "²", "latest")
    for attempt in strange:
        drawn(comfyui, JOB, attempt)
    for job in (str(JOB).upper(), JOB.hex, f"{{{JOB}}}", "precious", "%2e%2e"):
        drawn(comfyui, job, 1)
    (comfyui / "output" / "forge" / str(uuid4())).touch()
    assert Folders(comfyui).left() == [Left(JOB, 3), Left(JOB, 12)]


@pytest.mark.parametrize("link", ["forge", "job", "attempt"])
def test_links_are_not_followed(link: str, comfyui: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "precious"
    inside = elsewhere / str(JOB) / "1"
    inside.mkdir(parents=True)
    (inside / "model").write_bytes(b"dear")
    ours = comfyui / "output" / "forge"
    place, target = {
        "forge": (ours, elsewhere),
        "job": (ours / str(JOB), elsewhere / str(JOB)),
        "attempt": (ours / str(JOB) / "1", inside),
    }[link]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)
    with pytest.raises(OSError):
        Folders(comfyui).remove(JOB, 1)
    assert (inside / "model").read_bytes() == b"dear"


def test_links_inside_an_attempt_go_and_what_they_name_stays(comfyui: Path, tmp_path: Path) -> None:
    precious = tmp_path / "model"
    precious.write_bytes(b"dear")
    (drawn(comfyui, JOB, 1) / "link.png").symlink_to(precious)
    Folders(comfyui).remove(JOB, 1)
    assert precious.exists()
    assert Folders(comfyui).left() == []


def test_one_folder_that_cannot_be_removed_does_not_save_the_other(comfyui: Path, tmp_path: Path) -> None:
    ours = comfyui / "output" / "forge" / str(JOB)
    ours.mkdir(parents=True)
    (ours / "1").symlink_to(tmp_path)
    given = drawn(comfyui, JOB, 1, "input")
    with pytest.raises(OSError):
        Folders(comfyui).remove(JOB, 1)
    assert not given.exists()


def test_no_descriptor_stays_open(comfyui: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for attempt in range(1, 20):
        drawn(comfyui, JOB, attempt)
        Folders(comfyui).remove(JOB, attempt)
        Folders(comfyui).left()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Folders(tmp_path / "nowhere").left()


def test_only_servers_with_a_directory_share_it(tmp_path: Path) -> None:
    found = shared(["http://gpu", "http://cpu"], [None, tmp_path])
    assert {url: folders.directory for url, folders in found.items()} == {"http://cpu": tmp_path}
    assert shared(["http://gpu"], []) == {}
