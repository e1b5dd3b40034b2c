"""The version after this one: a copy of forge with small changes of the kinds that versions bring."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from forge.topology import files

MOOD = "mood"
"""What the next version knows of a job more than this one: an event's field, and a column."""

_FACT = """    pictures: int = 1
    regenerates: Original | None = None
"""
_ADMITTED = "        regenerates=request.regenerates,\n    )\n"
_ROW = '            "batch_id": event.batch_id,\n            "ttl_seconds": event.ttl_seconds,\n'

CHANGES: Sequence[tuple[str, str, str]] = (
    # a further field of an event, which is written from the moment a file lies on the volume
    ("src/forge/events/jobs.py", _FACT, _FACT + '    mood: str = ""\n'),
    (
        "src/forge/admissions.py",
        _ADMITTED,
        _ADMITTED.replace("    )", '        mood="calm" if _moody() else "",\n    )')
        + '\n\ndef _moody() -> bool:\n    return (Path(os.environ["FORGE_DATA_DIR"]) / "mood").exists()\n',
    ),
    ("src/forge/admissions.py", "import asyncio\n", "import asyncio\nimport os\nfrom pathlib import Path\n"),
    # a changed projection, with a column of its own
    ("src/forge/projections/queue.py", 'Projection("queue", version=1', 'Projection("queue", version=2'),
    ("src/forge/projections/queue.py", _ROW, _ROW + '            "mood": event.mood or None,\n'),
    # a further field of an order
    ("src/forge/workers/orders.py", "    drawn_at: int = 0\n", '    drawn_at: int = 0\n    mood: str = ""\n'),
    (
        "src/forge/workers/dispatcher.py",
        "            reason=choice.reason,\n",
        '            reason=choice.reason,\n            mood="calm",\n',
    ),
    # a stream that is kept otherwise
    ("nats/streams.json", "2592000000000000,", "2678400000000000,"),
)


def newer(folder: Path) -> Path:
    """Make it in a folder of its own; its sources, to be found before those of this version."""
    for name in ("src", "migrations", "nats"):
        shutil.copytree(files() / name, folder / name)  # what is compiled and not changed stays so
    for name, before, after in CHANGES:
        path = folder / name
        text = path.read_text()
        assert text.count(before) == 1, f"{name} has {before!r} {text.count(before)} times"
        path.write_text(text.replace(before, after))
    number = len(list((folder / "migrations").glob("*.sql"))) + 1
    migration = folder / "migrations" / f"{number:04}_mood.sql"
    migration.write_text("alter table generation_queue add column mood text;\n")
    return folder / "src"
