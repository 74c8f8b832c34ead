"""Wait for a condition instead of sleeping for a guessed time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    condition: Callable[[], T | None], timeout: float, what: str, every: float = 0.01
) -> T:
    """Call `condition` until its answer is true and return that answer.

    `timeout` and `every` are in seconds. The error names `what` was waited for and the last
    answer, so that a failed test tells what it saw.
    """
    end = time.monotonic() + timeout
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() >= end:
            raise TimeoutError(f"waited {timeout:g} s for {what}; last answer: {answer!r}")
        time.sleep(every)


async def wait_until(
    condition: Callable[[], Awaitable[T]], seconds: float, what: str, every: float = 0.02
) -> T:
    """`wait_for` for a condition that must be awaited."""
    end = time.monotonic() + seconds
    while True:
        answer = await condition()
        if answer:
            return answer
        if time.monotonic() >= end:
            raise TimeoutError(f"waited {seconds:g} s for {what}; last answer: {answer!r}")
        await asyncio.sleep(every)
