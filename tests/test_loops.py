"""A loop's pauses: how they grow, what ends them early, and what does not."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pman.errors import Ambiguous, EngineError, StoreError, Unavailable
from pman.loops import LONGEST_PAUSE, Loop, Pauses
from tests.waiting import wait_for, wait_until

SECONDS = 30
AWAY = Unavailable("no route to the host", "unreachable")


class Steps:
    """A step that counts, and raises ``error`` while it is set."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.error: Exception | None = None

    async def __call__(self) -> float | None:
        self.times.append(time.monotonic())
        if self.error is not None:
            raise self.error
        return None

    async def reach(self, number: int, seconds: float = SECONDS) -> None:
        async def there() -> bool:
            return len(self.times) >= number

        await wait_until(there, seconds, f"{number} steps")


async def turns() -> None:
    """All that can run now has run: the steps here wait for nothing."""
    for _ in range(100):
        await asyncio.sleep(0)


@asynccontextmanager
async def running(loop: Loop) -> AsyncIterator[None]:
    task = asyncio.create_task(loop.run())
    try:
        await turns()
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def steps() -> Steps:
    return Steps()


# --- Pauses ---


def test_a_pause_doubles_up_to_the_longest() -> None:
    pauses = Pauses(1.0)
    assert [pauses.again("a") for _ in range(7)] == [1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE]
    assert pauses.again("b") == 1


def test_the_first_pause_is_no_longer_than_the_longest() -> None:
    assert Pauses(2 * LONGEST_PAUSE).again("a") == LONGEST_PAUSE


def test_what_is_left_of_a_pause_gets_less_until_it_is_over() -> None:
    pauses = Pauses(LONGEST_PAUSE)
    assert pauses.left("a") == 0
    pauses.again("a")
    assert LONGEST_PAUSE / 2 < pauses.left("a") <= LONGEST_PAUSE
    assert pauses.left("b") == 0
    short = Pauses(0.01)
    short.again("a")
    wait_for(lambda: short.left("a") == 0, SECONDS, "the pause to be over")
    assert short.again("a") == 0.02


def test_a_name_that_works_again_starts_anew() -> None:
    pauses = Pauses(1.0)
    for name in ("a", "b", "a", "b"):
        pauses.again(name)
    pauses.over("a")
    pauses.over("unknown")
    assert pauses.left("a") == 0
    assert (pauses.again("a"), pauses.again("b")) == (1, 4)


def test_only_the_names_that_are_kept_are_remembered() -> None:
    pauses = Pauses(1.0)
    for name in ("a", "b"):
        pauses.again(name)
    pauses.keep({"b", "c"})
    assert pauses.left("a") == 0
    assert pauses.left("b") > 0
    assert (pauses.again("a"), pauses.again("b"), pauses.again("c")) == (1, 2, 1)


# --- Loop ---


async def test_a_loop_that_asks_for_no_time_runs_when_it_is_woken(steps: Steps) -> None:
    loop = Loop("test", steps, LONGEST_PAUSE)
    async with running(loop):
        before = len(steps.times)
        await turns()
        assert len(steps.times) == before
        loop.wake()
        await turns()
        assert len(steps.times) == before + 1


@pytest.mark.parametrize("error", [AWAY, Ambiguous("the line was cut")])
async def test_in_an_outage_a_wake_does_not_shorten_the_pause_and_a_hurry_does(
    steps: Steps, error: EngineError
) -> None:
    steps.error = error
    loop = Loop("test", steps, LONGEST_PAUSE)
    async with running(loop):
        assert len(steps.times) == 1
        for _ in range(3):
            loop.wake()
            await turns()
        assert len(steps.times) == 1
        loop.hurry()
        await turns()
        assert len(steps.times) == 2
        await turns()
        assert len(steps.times) == 2


async def test_the_pauses_of_an_outage_grow(steps: Steps) -> None:
    steps.error = AWAY
    async with running(Loop("test", steps, 0.05)):
        await steps.reach(5)
    gaps = [after - before for before, after in zip(steps.times, steps.times[1:], strict=False)]
    for gap, least in zip(gaps, (0.05, 0.1, 0.2, 0.4), strict=False):
        assert gap >= 0.9 * least


async def test_after_an_outage_the_pauses_start_anew(steps: Steps) -> None:
    steps.error = AWAY
    loop = Loop("test", steps, 0.01)
    async with running(loop):
        for _ in range(15):  # the pause is the longest by now
            loop.hurry()
            await turns()
        assert loop.outage
        steps.error = None
        loop.hurry()
        await turns()
        assert loop.outage is None
        steps.error = AWAY
        loop.wake()
        await turns()
        assert loop.outage
        await steps.reach(len(steps.times) + 2, LONGEST_PAUSE / 3)


async def test_an_outage_is_told_from_its_first_error_to_its_end(steps: Steps) -> None:
    returns: list[int] = []
    loop = Loop("test", steps, LONGEST_PAUSE)
    loop.on_return = lambda: returns.append(len(steps.times))
    async with running(loop):
        assert loop.outage is None
        steps.error = AWAY
        loop.wake()
        await turns()
        first = loop.outage
        assert first
        assert (first.reason, first.summary) == ("no route to the host", "unreachable")
        steps.error = Unavailable("other")
        loop.hurry()
        await turns()
        assert loop.outage
        assert (loop.outage.since, loop.outage.reason) == (first.since, "other")
        assert returns == []
        steps.error = None
        before = len(steps.times)
        loop.hurry()
        await turns()
        assert loop.outage is None
        loop.wake()
        await turns()
        assert returns == [before + 1]


async def test_a_defect_pauses_the_loop_and_does_not_end_it(
    steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    steps.error = KeyError("oops")
    loop = Loop("test", steps, 0.01)
    async with running(loop):
        loop.wake()
        await turns()
        assert len(steps.times) == 1
        assert "oops" in caplog.text
        assert loop.outage is None
        steps.error = None
        loop.hurry()
        await turns()
        assert len(steps.times) > 1


async def test_a_store_that_cannot_be_written_is_a_line_and_no_outage_of_the_engine(
    steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    steps.error = StoreError("the disk is full")
    loop = Loop("test", steps, LONGEST_PAUSE)
    async with running(loop):
        loop.wake()
        await turns()
        assert len(steps.times) == 1
        assert [record.getMessage() for record in caplog.records] == ["test: the disk is full"]
        assert caplog.records[0].exc_info is None
        assert loop.outage is None
        steps.error = None
        loop.hurry()
        await turns()
        assert len(steps.times) > 1


@pytest.mark.parametrize("turn", range(8))
async def test_a_loop_ends_when_it_is_cancelled_at_any_turn(turn: int) -> None:
    async def step() -> float:
        return 1000.0

    task = asyncio.create_task(Loop("test", step, 1.0).run())
    for _ in range(turn):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=SECONDS)
    assert done == {task}
