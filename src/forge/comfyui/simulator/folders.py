"""The three folders of a ComfyUI: numbered files under output/ and temp/, uploads under input/."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from os.path import commonpath, normpath
from pathlib import Path

KINDS = ("output", "input", "temp")


class Folders:
    """`output/`, `input/` and `temp/` below one directory; temp/ starts empty."""

    def __init__(self, base: Path) -> None:
        self.base = base.resolve()
        self.wipe_temp()
        for kind in KINDS:
            self.path(kind).mkdir(parents=True, exist_ok=True)

    def path(self, kind: str) -> Path:
        return self.base / kind

    def wipe_temp(self) -> None:
        """Empty temp/, as every start of the server does."""
        shutil.rmtree(self.path("temp"), ignore_errors=True)
        self.path("temp").mkdir(parents=True, exist_ok=True)

    def numbered(self, kind: str, prefix: str, size: tuple[int, int]) -> tuple[Path, str, int]:
        """Folder, name and next free number for files of a `filename_prefix`.

        Raises:
            PermissionError: the prefix leads out of the folder.
        """
        root = str(self.path(kind))
        relative = normpath(_with_tokens(prefix, size))
        subfolder, _, name = relative.rpartition("/")
        folder = normpath(f"{root}/{subfolder}") if not relative.startswith("/") else subfolder or "/"
        shared = commonpath((root, folder))
        if shared != root:
            raise PermissionError(
                "**** ERROR: Saving image outside the output folder is not allowed.\n"
                f" full_output_folder: {folder}\n         output_dir: {root}\n         commonpath: {shared}"
            )
        Path(folder).mkdir(parents=True, exist_ok=True)
        return Path(folder), name, _highest(Path(folder), name) + 1

    def named_file(self, name: str) -> Path | None:
        """The file a LoadImage name means (`a.png`, `sub/a.png`, `a.png [temp]`), if it is there."""
        plain, kind = annotated(name, "input")
        path = Path(normpath(self.path(kind) / plain))
        inside = path.is_relative_to(self.path(kind))
        return path if inside and path.is_file() else None


def annotated(name: str, default: str) -> tuple[str, str]:
    """Split the folder off a name such as `x.png [output]`."""
    for kind in KINDS:
        if name.endswith(f"[{kind}]"):
            return name[: -len(kind) - 2].rstrip(), kind
    return name, default


def _with_tokens(prefix: str, size: tuple[int, int]) -> str:
    if "%" not in prefix:
        return prefix
    now = time.localtime()
    tokens: Mapping[str, str] = {
        "%width%": str(size[0]),
        "%height%": str(size[1]),
        "%year%": str(now.tm_year),
        "%month%": f"{now.tm_mon:02}",
        "%day%": f"{now.tm_mday:02}",
        "%hour%": f"{now.tm_hour:02}",
        "%minute%": f"{now.tm_min:02}",
        "%second%": f"{now.tm_sec:02}",
    }
    for token, text in tokens.items():
        prefix = prefix.replace(token, text)
    return prefix


def _highest(folder: Path, name: str) -> int:
    """The highest number among `name_00001_.png`-like files, 0 when there is none."""
    start = f"{name}_"
    numbers = [0]
    for path in folder.iterdir():
        if path.name.startswith(start):
            digits = path.name[len(start) :].split("_")[0]
            numbers.append(int(digits) if digits.isdecimal() else 0)
    return max(numbers)
