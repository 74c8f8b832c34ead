"""A step again and again, through outages: when it runs next, and since when it has not worked."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from pman.errors import Ambiguous, EngineError, StoreError, Unavailable

log = logging.getLogger(__name__)

LONGEST_PAUSE = 30.0
"""Seconds between two tries during an outage, at the most."""


@dataclass(frozen=True)
class Outage:
    since: datetime
    reason: str
    """For the operator."""
    summary: str
    """For the ChRIS user."""

    def __str__(self) -> str:
        return f"{self.summary} since {self.since.astimezone():%H:%M:%S}"


class Loop:
    """``step`` runs when it is woken and after the seconds that it asks for, never twice at a time.

    An EngineError is an outage: the pauses grow from ``pause`` seconds to LONGEST_PAUSE, and being
    woken does not shorten them; ``hurry`` does, for when another loop has seen the engine again.
    """

    def __init__(
        self, name: str, step: Callable[[], Awaitable[float | None]], pause: float
    ) -> None:
        self.name = name
        self.outage: Outage | None = None
        self.on_return: Callable[[], None] = lambda: None
        self._step = step
        self._pauses = Pauses(pause)
        self._woken = asyncio.Event()
        self._hurried = asyncio.Event()

    def wake(self) -> None:
        self._woken.set()

    def hurry(self) -> None:
        self._hurried.set()

    async def run(self) -> None:
        self.wake()
        while True:
            self._hurried.clear()
            try:
                wait = await self._step()
            except (Unavailable, Ambiguous) as error:
                self._away(error)
                await _wait(self._hurried, self._pauses.again(self.name))
            except StoreError as error:  # reads and POST tell of it too
                log.error("%s: %s", self.name, error)
                await _wait(self._hurried, self._pauses.again(self.name))
            except Exception:  # a defect must not end the loop: the other jobs need it
                log.exception("the step %s met an error that it does not know", self.name)
                await _wait(self._hurried, self._pauses.again(self.name))
            else:
                self._works()
                await _wait(self._woken, wait)

    def _away(self, error: EngineError) -> None:
        if self.outage is None:
            log.warning("%s: the engine is away: %s", self.name, error)
        since = self.outage.since if self.outage else datetime.now(UTC)
        self.outage = Outage(since, str(error), error.summary)

    def _works(self) -> None:
        self._pauses.over(self.name)
        if self.outage is not None:
            log.warning("%s: the engine is back, away since %s", self.name, self.outage.since)
            self.outage = None
            self.on_return()


class Pauses:
    """For each name when to try again: after ``first`` seconds, and twice as long each time."""

    def __init__(self, first: float) -> None:
        self._first = first
        self._next: dict[str, tuple[float, float]] = {}  # when, and the pause before it

    def again(self, name: str) -> float:
        """The seconds to wait after one more failure."""
        _, last = self._next.get(name, (0.0, self._first / 2))
        pause = min(LONGEST_PAUSE, 2 * last)
        self._next[name] = time.monotonic() + pause, pause
        return pause

    def left(self, name: str) -> float:
        """The seconds until ``name`` may be tried again; 0: now."""
        when, _ = self._next.get(name, (0.0, 0.0))
        return max(0.0, when - time.monotonic())

    def over(self, name: str) -> None:
        self._next.pop(name, None)

    def keep(self, names: set[str]) -> None:
        """Forget all but ``names``."""
        self._next = {name: pause for name, pause in self._next.items() if name in names}


async def _wait(event: asyncio.Event, seconds: float | None) -> None:
    """Until ``event``, or for ``seconds``; the event counts once."""
    # Not by wait_for: before Python 3.12 it loses a cancellation that comes with the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    event.clear()
