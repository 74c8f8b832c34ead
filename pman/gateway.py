"""Accept, submit, watch, logs, remove: the only one that talks to a driver.

Three loops, each one engine call at a time, whatever the number of jobs:

- submit: what was accepted goes out in groups; what may have been sent before is looked for first.
- watch: one look a tick at all jobs that have not ended.
- remove: what was deleted is ended and removed.

A job is in the store before anything is sent, so each loop starts again after a crash from what the
store says. Blocking calls run in threads; the event loop never blocks.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import ParamSpec, TypeVar

from pman import request
from pman.drivers import Driver
from pman.errors import Conflict, EngineError, NotFound, Rejected
from pman.joblogs import JobLogs
from pman.jobs import Event, Job, JobState, Observation, Verdict
from pman.loops import LONGEST_PAUSE, Loop, Outage, Pauses
from pman.settings import Settings
from pman.store import Store
from pman.templates import Templates

log = logging.getLogger(__name__)

GROUP = 64
"""Jobs in one submit or removal, at the most: the rest go with the next one."""

P = ParamSpec("P")
T = TypeVar("T")


class Gateway:
    """The jobs of one engine, from the store to the driver and back."""

    def __init__(
        self, settings: Settings, store: Store, driver: Driver, templates: Templates
    ) -> None:
        self.settings = settings
        self.engine: str = settings.container_env
        self._store = store
        self._driver = driver
        self.templates = templates
        pause = settings.poll_interval
        self._submitting = Loop("submit", self._submit, pause)
        self._watching = Loop("watch", self._watch, pause)
        self._removing = Loop("remove", self._remove, pause)
        self._loops = (self._submitting, self._watching, self._removing)
        for loop in self._loops:
            loop.on_return = self._hurry
        self._pool = ThreadPoolExecutor(len(self._loops), thread_name_prefix="loop")
        # Reads wait for neither slow templates nor slow schedulers. One POST at a time is looked up
        # and added: two of the same job make one.
        self._accepts = ThreadPoolExecutor(1, thread_name_prefix="accept")
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="verdict")
        self._tasks: list[asyncio.Task[None]] = []
        self._sending: set[str] = set()
        self._missed: dict[str, float] = {}  # since when, in time.monotonic()
        self._submit_again = Pauses(pause)
        self._remove_again = Pauses(pause)
        self._logs = JobLogs(driver, store, settings.job_logs_tail, pause)

    async def start(self) -> None:
        """Go on where the last server stopped.

        Raises SourceError when there are no templates that could be used.
        """
        await asyncio.to_thread(self.templates.load)
        self.templates.watch()
        self._tasks = [asyncio.create_task(loop.run()) for loop in self._loops]

    async def stop(self) -> None:
        """End the loops; the jobs go on, and the next start finds them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._driver.close)
        await asyncio.to_thread(self._pool.shutdown)
        await asyncio.to_thread(self._asking.shutdown)
        await asyncio.to_thread(self._accepts.shutdown)
        await asyncio.to_thread(self.templates.close)
        await self._logs.close()
        self._store.close()

    @property
    def outage(self) -> Outage | None:
        """The longest one, if there is any."""
        outages = [loop.outage for loop in self._loops if loop.outage is not None]
        return min(outages, key=lambda outage: outage.since, default=None)

    def _hurry(self) -> None:
        for loop in self._loops:
            loop.hurry()

    # --- what the API asks for ---

    async def accept(self, body: bytes) -> Job:
        """The job that ``body`` asks for, new or known already.

        Raises RequestError and its kinds, and TemplateError.
        """
        job = await self._in(self._accepts, self._accept, body)
        if job.state is JobState.ACCEPTED:
            self._submitting.wake()
            self._removing.wake()
        return job

    async def preview(self, body: bytes) -> Job:
        """The job that ``body`` asks for as it would be sent; nothing is stored or sent.

        Raises RequestError and its kinds, and TemplateError.
        """
        return await self._in(self._accepts, self._preview, body)

    def _preview(self, body: bytes) -> Job:
        wanted = request.parse(body)
        return self._rendered(wanted, check=True)

    async def verdict(self, job: Job) -> Verdict:
        """What the scheduler says of a previewed job. Raises Unavailable."""
        return (await self._in(self._asking, self._driver.test, [job]))[job.name]

    def _rendered(self, wanted: request.JobRequest, check: bool = False) -> Job:
        spec = wanted.spec(self.settings)
        return Job(
            spec=spec,
            document=self.templates.render(spec, check),
            content=wanted.content,
            engine=self.engine,
            message="accepted",
            accepted_at=datetime.now(UTC),
        )

    def _accept(self, body: bytes) -> Job:
        wanted = request.parse(body)
        known = self._store.get(wanted.jid)
        if known is not None:
            if differing := _differing(known.content, wanted):
                raise Conflict(
                    f"there is a job {wanted.jid} already, and it differs in "
                    f"{', '.join(differing)}: use another jid, or DELETE that job first"
                )
            if known.state not in (JobState.FAILED, JobState.CANCELLED, JobState.LOST):
                return known
        return self._store.add(self._rendered(wanted))

    async def read(self, jid: str) -> tuple[Job, str]:
        """A job as it is known now, and its log's tail. Raises NotFound."""
        job = await self.get(jid)
        text = await self._logs.tail(job) if job.engine == self.engine else job.log or ""
        return self._told(job), text

    async def newest(
        self, limit: int, states: Sequence[JobState], auid: str | None
    ) -> tuple[list[Job], int]:
        """The jobs of ``Store.newest``, each as it is known now."""
        jobs, total = await asyncio.to_thread(self._store.newest, limit, states, auid)
        return [self._told(job) for job in jobs], total

    def _told(self, job: Job) -> Job:
        """The job as readers are told of it: during an outage its message says so."""
        if job.state.final:
            return job
        sent = job.state in (JobState.QUEUED, JobState.RUNNING)
        doubt: object = (self._watching if sent else self._submitting).outage
        if job.engine != self.engine:
            doubt = f"this server runs jobs on {self.engine}, and this one is on {job.engine}"
        if doubt is None:
            return job
        return replace(job, message=f"{doubt}; last known: {job.message}")

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
            self._removing.wake()

    async def removing(self) -> int:
        """How many deleted jobs are still to be removed from the engine."""
        return len(await asyncio.to_thread(self._store.removing))

    async def counts(self) -> dict[JobState, int]:
        return await asyncio.to_thread(self._store.counts)

    # --- the loops' steps: each says how long to wait, None: until it is woken ---

    async def _submit(self) -> float | None:
        waiting = await self._mine(JobState.ACCEPTED, JobState.SUBMITTING)
        self._submit_again.keep({job.name for job in waiting})
        due = [job for job in waiting if not self._submit_again.left(job.name)][:GROUP]
        if not due:
            return min((self._submit_again.left(job.name) for job in waiting), default=None)
        names = {job.name for job in due}
        self._sending |= names
        try:
            await self._send(due)
        finally:
            self._sending -= names
            self._removing.wake()
        return 0.0

    async def _send(self, due: Sequence[Job]) -> None:
        doubtful = [job for job in due if job.state is JobState.SUBMITTING]
        found: Mapping[str, str] = {}
        if doubtful:
            found = await self._call(self._driver.find, doubtful)
            known = [job for job in doubtful if job.name in found]
            await self._update([_queued(job, found[job.name]) for job in known])
        claimed = await asyncio.to_thread(
            self._store.claim, [job for job in due if job.name not in found]
        )
        if claimed:
            outcomes = await self._call(self._driver.submit, claimed)
            await self._update([self._outcome(job, outcomes[job.name]) for job in claimed])
        self._watching.wake()

    def _outcome(self, job: Job, outcome: str | EngineError) -> Job:
        if isinstance(outcome, str):
            return _queued(job, outcome)
        if isinstance(outcome, Rejected):
            return replace(
                job, state=JobState.FAILED, message=str(outcome), ended_at=datetime.now(UTC)
            )
        self._submit_again.again(job.name)
        return replace(job, message=f"waiting: {outcome}")

    async def _watch(self) -> float | None:
        jobs = await self._mine(JobState.QUEUED, JobState.RUNNING)
        if not jobs:
            return None
        began = time.monotonic()
        try:
            seen = await self._call(self._driver.observe, jobs)
        except EngineError:
            self._missed.clear()
            raise
        now_known = [self._seen(job, seen.get(job.name)) for job in jobs]
        await self._update([new for old, new in zip(jobs, now_known, strict=True) if new != old])
        await self._pace(began)
        return 0.0

    def _seen(self, job: Job, seen: Observation | None) -> Job:
        now = datetime.now(UTC)
        if seen is not None:
            self._missed.pop(job.name, None)
            return replace(
                job,
                state=seen.state,
                message=seen.message or job.message,
                engine_id=seen.engine_id or job.engine_id,
                started_at=seen.started_at or job.started_at,
                ended_at=(seen.ended_at or now) if seen.state.final else None,
                missing_since=None,
                notes={**job.notes, **seen.notes},
            )
        since = job.missing_since or now
        unseen = f"not seen on {self.engine} since {since.astimezone():%Y-%m-%d %H:%M:%S}"
        after = self.settings.lost_after
        # Only time in which the engine answered counts: no outage, no stop of pman, no new clock.
        first = self._missed.setdefault(job.name, time.monotonic())
        if after and time.monotonic() - first >= after:
            return replace(
                job,
                state=JobState.LOST,
                message=f"lost: {unseen}, and it left no trace of its end",
                missing_since=since,
                ended_at=now,
            )
        return replace(job, message=f"{unseen}; its last state stays", missing_since=since)

    async def _remove(self) -> float | None:
        deleted = [
            job
            for job in await asyncio.to_thread(self._store.removing)
            if job.engine == self.engine and job.name not in self._sending
        ]
        self._remove_again.keep({job.name for job in deleted})
        due = [job for job in deleted if not self._remove_again.left(job.name)][:GROUP]
        if not due:
            return min((self._remove_again.left(job.name) for job in deleted), default=None)
        sent = [job for job in due if job.state is not JobState.ACCEPTED]
        began = time.monotonic()
        stay = await self._call(self._driver.remove, sent) if sent else {}
        for name, reason in stay.items():
            pause = self._remove_again.again(name)
            # Some engines take a moment to end a job: that is no reason to look.
            level = logging.INFO if pause < LONGEST_PAUSE else logging.WARNING
            log.log(level, "%s is not removed yet: %s", name, reason)
        await asyncio.to_thread(self._store.forget, [job for job in due if job.name not in stay])
        await self._pace(began)
        return 0.0

    # --- what the loops share ---

    async def _call(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._in(self._pool, call, *args, **kwargs)

    @staticmethod
    async def _in(
        pool: ThreadPoolExecutor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: call(*args, **kwargs))

    async def _pace(self, began: float) -> None:
        """Until POLL_INTERVAL after ``began``: the engine is not asked more often."""
        await asyncio.sleep(max(0.0, began + self.settings.poll_interval - time.monotonic()))

    async def _mine(self, *states: JobState) -> list[Job]:
        jobs = await asyncio.to_thread(self._store.in_state, *states)
        return [job for job in jobs if job.engine == self.engine]

    async def _update(self, jobs: Sequence[Job]) -> None:
        for job in await asyncio.to_thread(self._store.update, jobs):
            log.info("%s: %s: %s", job.jid, job.state, job.message)


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
