"""Accept, submit, watch, logs, remove: the only one that talks to a driver.

Three loops, each one engine call at a time, whatever the number of jobs:

- submit: what was accepted goes out in groups; what may have been sent before is looked for first.
- watch: one look a tick at all jobs that have not ended.
- remove: what was deleted is ended and removed.

A job is in the store before anything is sent, so each loop starts again after a crash from what the
store says. Blocking calls run in threads; the event loop never blocks.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import ParamSpec, TypeVar

from pman import request
from pman.drivers import ENGINES, Driver
from pman.errors import (
    Ambiguous,
    Conflict,
    EngineError,
    NotFound,
    Rejected,
    SettingsError,
    TemplateError,
    Unavailable,
)
from pman.jobs import Document, Event, Job, JobSpec, JobState, Observation
from pman.rendering import Renderer
from pman.settings import Settings
from pman.store import Store

log = logging.getLogger(__name__)

GROUP = 64
"""Jobs in one submit, at the most: the rest go out with the next one."""

LOG_THREADS = 5
"""Logs read at a time, at the most: with the three loops, 8 engine calls at a time. The loops have
threads of their own, so that slow readings of logs never hold them up."""

LONGEST_PAUSE = 30.0
"""Seconds between two tries during an outage, at the most."""

LOG_SETTLES = timedelta(seconds=60)
"""How long after its end a job's log may still grow: a shared disk shows writes late."""

LOGS_CACHED = 128

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Outage:
    since: datetime
    reason: str
    """For the operator."""
    summary: str
    """For the ChRIS user."""

    def __str__(self) -> str:
        return f"{self.summary} since {self.since.astimezone():%H:%M:%S}"


@dataclass(frozen=True)
class _CachedLog:
    text: str
    read_at: float
    whole: bool
    """Read after the job had ended."""


def render(settings: Settings, renderer: Renderer, spec: JobSpec, template: str = "") -> Document:
    """The document that the engine of CONTAINER_ENV is sent for ``spec``. Raises TemplateError."""
    name = settings.container_env
    engine = ENGINES[name]
    chosen = template or settings.template.get(name) or settings.template.get("") or engine.template
    return renderer.render(spec, engine.language, chosen)


class Gateway:
    """The jobs of one engine, from the store to the driver and back."""

    def __init__(
        self, settings: Settings, store: Store, driver: Driver, renderer: Renderer
    ) -> None:
        self.settings = settings
        self.engine: str = settings.container_env
        self.outage: Outage | None = None
        self._store = store
        self._driver = driver
        self._renderer = renderer
        self._accepting = threading.Lock()
        self._loop_pool = ThreadPoolExecutor(3, thread_name_prefix="loop")
        self._log_pool = ThreadPoolExecutor(LOG_THREADS, thread_name_prefix="log")
        self._to_submit = asyncio.Event()
        self._to_watch = asyncio.Event()
        self._to_remove = asyncio.Event()
        self._sending: set[str] = set()
        self._later: dict[str, tuple[float, float]] = {}  # name: no try before, the last pause
        self._logs: dict[str, _CachedLog] = {}
        self._log_locks: dict[str, asyncio.Lock] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Go on where the last server stopped.

        Raises SettingsError when the settings and the template don't go together.
        """
        self._try_template()
        self._tasks = [
            asyncio.create_task(self._forever(step, woken))
            for step, woken in (
                (self._submit, self._to_submit),
                (self._watch, self._to_watch),
                (self._remove, self._to_remove),
            )
        ]
        self._wake()

    async def stop(self) -> None:
        """End the loops; the jobs go on, and the next start finds them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._driver.close)
        self._loop_pool.shutdown(wait=True)
        self._log_pool.shutdown(wait=True)
        self._store.close()

    def _try_template(self) -> None:
        wanted = request.JobRequest(
            jid="sample",
            args=[],
            auid="sample",
            number_of_workers=1,
            cpu_limit=1000,
            memory_limit=200,
            gpu_limit=0,
            image=self._renderer.site.sample_image(),
            entrypoint=["true"],
            type="ds",
            input_dir="in",
            output_dir="out",
        )
        spec = wanted.spec(self.settings)
        try:
            render(self.settings, self._renderer, spec)
        except TemplateError as error:
            raise SettingsError(f"the template can't be used as it is set up: {error}") from None

    # --- what the API asks for ---

    async def accept(self, body: bytes) -> Job:
        """The job that ``body`` asks for, new or known already.

        Raises RequestError and its kinds, and TemplateError.
        """
        job = await asyncio.to_thread(self._accept, body)
        if job.state is JobState.ACCEPTED:
            self._to_submit.set()
            self._to_remove.set()
        return job

    def _accept(self, body: bytes) -> Job:
        wanted = request.parse(body)
        with self._accepting:
            known = self._store.get(wanted.jid)
            if known is not None:
                if differing := _differing(known.content, wanted):
                    raise Conflict(
                        f"there is a job {wanted.jid} already, and it differs in "
                        f"{', '.join(differing)}: use another jid, or DELETE that job first"
                    )
                if known.state not in (JobState.FAILED, JobState.CANCELLED, JobState.LOST):
                    return known
            spec = wanted.spec(self.settings)
            return self._store.add(
                Job(
                    spec=spec,
                    document=render(self.settings, self._renderer, spec),
                    content=wanted.content,
                    engine=self.engine,
                    message="accepted",
                    accepted_at=datetime.now(UTC),
                )
            )

    async def read(self, jid: str) -> tuple[Job, str]:
        """A job as it is known now, and its log's tail. Raises NotFound."""
        job = await self.get(jid)
        text = await self._log(job)
        if not job.state.final:
            if job.engine != self.engine:
                word = f"this server runs jobs on {self.engine}, and this one is on {job.engine}"
                job = replace(job, message=f"{word}; last known: {job.message}")
            elif self.outage is not None:
                job = replace(job, message=f"{self.outage}; last known: {job.message}")
        return job, text

    async def get(self, jid: str) -> Job:
        job = await asyncio.to_thread(self._store.get, jid)
        if job is None:
            raise NotFound(f"there is no job {jid}")
        return job

    async def history(self, job: Job) -> list[Event]:
        return await asyncio.to_thread(self._store.history, job)

    async def delete(self, jid: str) -> None:
        """Remove a job; with REMOVE_JOBS=no nothing is removed. Raises NotFound."""
        job = await self.get(jid)
        if self.settings.remove_jobs:
            await asyncio.to_thread(self._store.mark_removed, job)
            self._to_remove.set()

    async def removing(self) -> int:
        """How many deleted jobs are still to be removed from the engine."""
        return len(await asyncio.to_thread(self._store.removing))

    async def counts(self) -> dict[JobState, int]:
        return await asyncio.to_thread(self._store.counts)

    async def _log(self, job: Job) -> str:
        if job.log is not None:
            return job.log
        cached = self._logs.get(job.name)
        if not job.engine_id or job.engine != self.engine:
            return cached.text if cached else ""
        async with self._log_locks.setdefault(job.name, asyncio.Lock()):
            cached = self._logs.get(job.name)
            fresh = cached and time.monotonic() - cached.read_at < self.settings.poll_interval
            if cached and fresh and cached.whole == job.state.final:
                return cached.text
            try:
                text = await asyncio.get_running_loop().run_in_executor(
                    self._log_pool, self._driver.logs, job, self.settings.job_logs_tail
                )
            except EngineError as error:
                log.info("the log of %s can't be read now: %s", job.jid, error)
                return cached.text if cached else ""
        if job.ended_at is not None and datetime.now(UTC) - job.ended_at > LOG_SETTLES:
            await asyncio.to_thread(self._store.keep_log, job, text)
        self._logs.pop(job.name, None)
        self._logs[job.name] = _CachedLog(text, time.monotonic(), job.state.final)
        while len(self._logs) > LOGS_CACHED:
            oldest = next(iter(self._logs))
            del self._logs[oldest]
            self._log_locks.pop(oldest, None)
        return text

    # --- the loops ---

    async def _forever(
        self, step: Callable[[], Awaitable[float | None]], woken: asyncio.Event
    ) -> None:
        """``step`` again and again; it says how long to wait, None: until it is woken."""
        failures = 0
        while True:
            try:
                wait = await step()
                failures = 0
            except (Unavailable, Ambiguous) as error:
                self._away(error)
                wait = min(LONGEST_PAUSE, self.settings.poll_interval * 2**failures)
                failures = min(failures + 1, 10)
            except Exception:  # a defect must not end the loop: the other jobs need it
                log.exception("the loop %s met an error that it does not know", step)
                wait = LONGEST_PAUSE
            if wait is None:
                await woken.wait()
            elif failures:
                await asyncio.sleep(wait)
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), wait)
            woken.clear()

    async def _submit(self) -> float | None:
        now = time.monotonic()
        waiting = await self._mine(JobState.ACCEPTED, JobState.SUBMITTING)
        names = {job.name for job in waiting}
        self._later = {name: later for name, later in self._later.items() if name in names}
        due = [job for job in waiting if self._not_before(job) <= now][:GROUP]
        if not due:
            return min(map(self._not_before, waiting)) - now if waiting else None
        names = {job.name for job in due}
        self._sending |= names
        try:
            await self._send(due)
        finally:
            self._sending -= names
            self._to_remove.set()
        return 0.0

    async def _send(self, due: Sequence[Job]) -> None:
        doubtful = [job for job in due if job.state is JobState.SUBMITTING]
        found: Mapping[str, str] = {}
        if doubtful:
            found = await self._call(self._driver.find, doubtful)
            self._back()
            known = [job for job in doubtful if job.name in found]
            await self._update([_queued(job, found[job.name]) for job in known])
        claimed = await asyncio.to_thread(
            self._store.claim, [job for job in due if job.name not in found]
        )
        if claimed:
            outcomes = await self._call(self._driver.submit, claimed)
            await self._update([self._outcome(job, outcomes[job.name]) for job in claimed])
            if any(isinstance(outcome, str) for outcome in outcomes.values()):
                self._back()
        self._to_watch.set()

    def _outcome(self, job: Job, outcome: str | EngineError) -> Job:
        if isinstance(outcome, str):
            self._later.pop(job.name, None)
            return _queued(job, outcome)
        if isinstance(outcome, Rejected):
            return replace(
                job, state=JobState.FAILED, message=str(outcome), ended_at=datetime.now(UTC)
            )
        _, last = self._later.get(job.name, (0.0, self.settings.poll_interval / 2))
        pause = min(LONGEST_PAUSE, 2 * last)
        self._later[job.name] = time.monotonic() + pause, pause
        return replace(job, message=f"waiting: {outcome}")

    def _not_before(self, job: Job) -> float:
        return self._later.get(job.name, (0.0, 0.0))[0]

    async def _watch(self) -> float | None:
        jobs = await self._mine(JobState.QUEUED, JobState.RUNNING)
        if not jobs:
            return None
        began = time.monotonic()
        seen = await self._call(self._driver.observe, jobs)
        self._back()
        await self._update([self._seen(job, seen.get(job.name)) for job in jobs])
        await asyncio.sleep(max(0.0, began + self.settings.poll_interval - time.monotonic()))
        return 0.0

    def _seen(self, job: Job, seen: Observation | None) -> Job:
        now = datetime.now(UTC)
        if seen is not None:
            return replace(
                job,
                state=seen.state,
                message=seen.message or job.message,
                engine_id=seen.engine_id or job.engine_id,
                started_at=seen.started_at or job.started_at,
                ended_at=(seen.ended_at or now) if seen.state.final else None,
                missing_since=None,
            )
        since = job.missing_since or now
        unseen = f"not seen on {self.engine} since {since.astimezone():%Y-%m-%d %H:%M:%S}"
        after = self.settings.lost_after
        if after and (now - since).total_seconds() >= after:
            return replace(
                job,
                state=JobState.LOST,
                message=f"lost: {unseen}, and it left no trace of its end",
                missing_since=since,
                ended_at=now,
            )
        return replace(job, message=f"{unseen}; its last state stays", missing_since=since)

    async def _remove(self) -> float | None:
        jobs = [
            job
            for job in await asyncio.to_thread(self._store.removing)
            if job.engine == self.engine and job.name not in self._sending
        ][:GROUP]
        if not jobs:
            return None
        if sent := [job for job in jobs if job.state is not JobState.ACCEPTED]:
            await self._call(self._driver.remove, sent)
            self._back()
        await asyncio.to_thread(self._store.forget, jobs)
        return 0.0

    # --- what the loops share ---

    async def _call(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._loop_pool, lambda: call(*args, **kwargs)
        )

    async def _mine(self, *states: JobState) -> list[Job]:
        jobs = await asyncio.to_thread(self._store.in_state, *states)
        return [job for job in jobs if job.engine == self.engine]

    async def _update(self, jobs: Sequence[Job]) -> None:
        for job in await asyncio.to_thread(self._store.update, jobs):
            log.info("%s: %s: %s", job.jid, job.state, job.message)

    def _away(self, error: EngineError) -> None:
        if self.outage is None:
            log.warning("the engine is away: %s", error)
        since = self.outage.since if self.outage else datetime.now(UTC)
        self.outage = Outage(since, str(error), error.summary)

    def _back(self) -> None:
        if self.outage is not None:
            log.warning("the engine is back; it was away since %s", self.outage.since)
            self.outage = None
            self._wake()

    def _wake(self) -> None:
        for event in (self._to_submit, self._to_watch, self._to_remove):
            event.set()


def _queued(job: Job, engine_id: str) -> Job:
    return replace(job, state=JobState.QUEUED, engine_id=engine_id, message="submitted")


def _differing(content: str, wanted: request.JobRequest) -> list[str]:
    """The fields in which a request differs from the one that a job was accepted with."""
    if content == wanted.content:
        return []
    known = request.JobRequest.model_validate_json(content)
    return [
        name
        for name in request.JobRequest.model_fields
        if getattr(known, name) != getattr(wanted, name)
    ]
