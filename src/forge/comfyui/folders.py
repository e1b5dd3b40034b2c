"""The folders of a ComfyUI, where forge shares them: removing what one attempt left there, and nothing else.

::

    DIR/output/forge/<job>/<attempt>/    what the attempt drew
    DIR/input/forge/<job>/<attempt>/     what was uploaded for it

ComfyUI itself never deletes either. Names are opened one by one from DIR on and links are never followed: a
ComfyUI that was taken over cannot make forge delete anything elsewhere. `temp/` is emptied when ComfyUI
starts, and forge's prompts write nothing there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

KINDS = ("output", "input")

_OURS = "forge"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Left(NamedTuple):
    """The folder of one attempt that is still there."""

    job_id: UUID
    attempt: int


class Folders:
    """The `output` and `input` below one directory. Every method blocks: call it in a thread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def remove(self, job_id: UUID, attempt: int) -> None:
        """Remove what is there of an attempt, and its job's folder when nothing else is in it.

        Raises:
            OSError: something of it cannot be removed.
        """
        failure: OSError | None = None
        for kind in KINDS:
            try:
                self._remove(kind, str(job_id), str(attempt))
            except OSError as error:
                failure = error
        if failure is not None:
            raise failure

    def left(self) -> list[Left]:
        """The attempts of which there is a folder; whatever has another name is none of forge's.

        Raises:
            OSError: the directory cannot be read.
        """
        found: set[Left] = set()
        for kind in KINDS:
            with self._opened(kind, _OURS) as ours:
                if ours is not None:
                    found.update(_attempts(ours))
        return sorted(found)

    def _remove(self, kind: str, job: str, attempt: str) -> None:
        with self._opened(kind, _OURS, job) as folder:
            if folder is None:
                return
            with suppress(FileNotFoundError):
                shutil.rmtree(attempt, dir_fd=folder)
        with self._opened(kind, _OURS) as ours, suppress(OSError):  # not empty: another attempt's is in it
            if ours is not None:
                os.rmdir(job, dir_fd=ours)

    @contextmanager
    def _opened(self, *names: str) -> Iterator[int | None]:
        """A descriptor of a folder below the directory; None where there is no such folder.

        Raises:
            OSError: it is a link, or may not be opened.
        """
        descriptor: int | None = os.open(
            self.directory, _FOLDER & ~os.O_NOFOLLOW
        )  # its place is the operator's
        try:
            for name in names:
                assert descriptor is not None
                try:
                    inner = os.open(name, _FOLDER, dir_fd=descriptor)
                except FileNotFoundError:
                    inner = None
                os.close(descriptor)
                descriptor = inner
                if descriptor is None:
                    break
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)


def shared(urls: Sequence[str], directories: Sequence[Path | None]) -> dict[str, Folders]:
    """Server → its folders, for the servers whose directory is known."""
    return {
        url: Folders(directory)
        for url, directory in zip(urls, directories, strict=False)
        if directory is not None
    }


def _attempts(ours: int) -> Iterator[Left]:
    for name in os.listdir(ours):
        job_id = _job(name)
        if job_id is None:
            continue
        try:
            folder = os.open(name, _FOLDER, dir_fd=ours)
        except OSError:  # a link, a file, gone meanwhile
            continue
        try:
            attempts = [int(n) for n in os.listdir(folder) if n.isascii() and n.isdecimal() and n[0] != "0"]
        finally:
            os.close(folder)
        yield from (Left(job_id, attempt) for attempt in attempts)


def _job(name: str) -> UUID | None:
    try:
        job_id = UUID(name)
    except ValueError:
        return None
    return job_id if str(job_id) == name else None
