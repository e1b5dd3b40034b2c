"""Wait for a fact, never for time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def wait_until(
    fact: Callable[[], T | Awaitable[T]], timeout: float = 30.0, what: str = "", interval: float = 0.01
) -> T:
    """Ask `fact` until its answer is true, and return that answer.

    Args:
        fact: a function, plain or async.
        timeout: seconds; many, since they pass only where the test fails.
        what: the fact in words, for the failure.

    Raises:
        AssertionError: it never was; says what the last answer was.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = fact()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or fact}; last answer {answer!r}")
        await asyncio.sleep(interval)
