"""forge with a leak: ``python -m benchmarks.leaking BYTES api|worker …`` keeps so many bytes of each job.

For :mod:`benchmarks.leak`, which has to find it. The bytes are random, so that every page of them is there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from forge.admissions import Admissions
from forge.cli import main
from forge.workers.generation import Generation

_kept: list[bytes] = []

Act = Callable[..., Awaitable[Any]]


def leaking(act: Act, size: int) -> Act:
    async def leaky(*given: Any, **named: Any) -> Any:
        _kept.append(os.urandom(size))
        return await act(*given, **named)

    return leaky


if __name__ == "__main__":
    size = int(sys.argv.pop(1))
    Admissions.submit = leaking(Admissions.submit, size)  # type: ignore[method-assign]  # planted
    Generation.handle = leaking(Generation.handle, size)  # type: ignore[method-assign]  # planted
    main()
