"""The logs' tails for readers: read off the engine at most once in a while, and never for long."""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pman.drivers import Driver
from pman.errors import EngineError, StoreError
from pman.jobs import Job
from pman.store import Store

log = logging.getLogger(__name__)

THREADS = 5
"""Logs read at a time, at the most. With the gateway's three loops that is 8 engine calls at a
time; the loops have threads of their own, so that slow readings never hold them up."""

LONGEST_WAIT = 10.0
"""Seconds that a reader waits for a log, at the most; then it gets what was read last."""

SETTLES = timedelta(seconds=60)
"""How long after its end a job's log may still grow: a shared disk shows writes late."""

CACHED = 128


@dataclass(frozen=True)
class _Tail:
    text: str
    read_at: float
    whole: bool
    """Read after the job had ended."""


class JobLogs:
    """The last ``lines`` lines of each log; a tail that was read counts for ``fresh`` seconds, and
    nobody waits for longer than ``patience`` seconds."""

    def __init__(
        self,
        driver: Driver,
        store: Store,
        lines: int,
        fresh: float,
        patience: float = LONGEST_WAIT,
    ) -> None:
        self._driver = driver
        self._store = store
        self._lines = lines
        self._fresh = fresh
        self._patience = patience
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="log")
        self._tails: dict[str, _Tail] = {}
        self._readings: dict[tuple[str, bool], asyncio.Task[None]] = {}

    async def close(self) -> None:
        for reading in self._readings.values():
            reading.cancel()
        await asyncio.to_thread(self._pool.shutdown)

    async def tail(self, job: Job) -> str:
        """What ``job`` has written, as far as it can be read now."""
        if job.log is not None:
            return job.log
        ended = job.state.final
        known = self._tails.get(job.name)
        fresh = known and known.whole == ended and time.monotonic() - known.read_at < self._fresh
        if job.engine_id and not fresh:
            key = job.name, ended
            if key not in self._readings:
                self._readings[key] = asyncio.create_task(self._read(job))
                self._readings[key].add_done_callback(lambda _: self._readings.pop(key, None))
            await asyncio.wait({self._readings[key]}, timeout=self._patience)
            known = self._tails.get(job.name)
        return known.text if known else ""

    async def _read(self, job: Job) -> None:
        try:
            text = await asyncio.get_running_loop().run_in_executor(
                self._pool, self._driver.logs, job, self._lines
            )
        except EngineError as error:
            log.info("the log of %s can't be read now: %s", job.jid, error)
            return
        except Exception:
            log.exception("the log of %s can't be read", job.jid)
            return
        if job.ended_at is not None and datetime.now(UTC) - job.ended_at > SETTLES:
            try:
                await asyncio.to_thread(self._store.keep_log, job, text)
            except StoreError as error:
                log.warning("the log of %s is not kept yet: %s", job.jid, error)
        self._tails.pop(job.name, None)  # the newest goes last
        self._tails[job.name] = _Tail(text, time.monotonic(), job.state.final)
        while len(self._tails) > CACHED:
            del self._tails[next(iter(self._tails))]
