"""The gateway's promises, with an engine whose answers are scripted."""

import asyncio
import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pman import request
from pman.errors import (
    Ambiguous,
    Conflict,
    EngineError,
    NotFound,
    Refusal,
    Rejected,
    RequestError,
    TemplateError,
    Unavailable,
)
from pman.gateway import GROUP, Gateway
from pman.joblogs import SETTLES, JobLogs
from pman.jobs import Finding, Job, JobState, Observation, Verdict
from pman.loops import LONGEST_PAUSE
from pman.rendering import Renderer
from pman.settings import Settings
from pman.store import Store
from pman.templates import Templates
from tests.conftest import job_body
from tests.full_disk import no_room_beyond
from tests.waiting import wait_until

SECONDS = 30
JID = "chris-jid-1"
QUEUED, RUNNING = Observation(JobState.QUEUED, "in line"), Observation(JobState.RUNNING, "runs")

Outcomes = Mapping[str, str | EngineError]
Submit = Callable[[Sequence[Job]], Outcomes]


class ScriptedDriver:
    """Takes every job and keeps it queued, but for what is scripted: the next answers of
    ``submit``, the errors of the other calls while they are set; a call waits for its gate."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.taken: dict[str, int] = {}
        self.observations: dict[str, Observation | None] = {}
        self.submits: deque[Submit] = deque()
        self.errors: dict[str, EngineError] = {}
        self.gates: dict[str, threading.Event] = {}
        self.text = "log\n"
        self.stuck: dict[str, str] = {}
        self.log_gate = threading.Event()
        self.log_gate.set()

    def _begin(self, call: str, jobs: Sequence[Job]) -> None:
        self.calls.append((call, [job.jid for job in jobs]))
        if call in self.gates:
            self.gates[call].wait(SECONDS)
        if call in self.errors:
            raise self.errors[call]

    def count(self, call: str) -> int:
        return sum(name == call for name, _ in self.calls)

    def take(self, jobs: Sequence[Job]) -> Outcomes:
        for job in jobs:
            self.taken[job.name] = self.taken.get(job.name, 0) + 1
        return {job.name: f"id-{job.name}" for job in jobs}

    def submit(self, jobs: Sequence[Job]) -> Outcomes:
        self._begin("submit", jobs)
        return self.submits.popleft()(jobs) if self.submits else self.take(jobs)

    def find(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        self._begin("find", jobs)
        return {job.name: f"id-{job.name}" for job in jobs if job.name in self.taken}

    def observe(self, jobs: Sequence[Job]) -> Mapping[str, Observation]:
        self._begin("observe", jobs)
        seen = {job.name: self.observations.get(job.jid, QUEUED) for job in jobs}
        return {name: observation for name, observation in seen.items() if observation}

    def test(self, jobs: Sequence[Job]) -> Mapping[str, Verdict]:
        self._begin("test", jobs)
        return {job.name: Verdict(True, "fits") for job in jobs}

    def check(self) -> Sequence[Finding]:
        return []

    def logs(self, job: Job, tail: int) -> str:
        self._begin("logs", [job])
        self.log_gate.wait(SECONDS)
        return self.text

    def remove(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        self._begin("remove", jobs)
        stay = {job.name: self.stuck[job.jid] for job in jobs if job.jid in self.stuck}
        for job in jobs:
            if job.name not in stay:
                self.taken.pop(job.name, None)
        return stay

    def close(self) -> None:
        self._begin("close", [])


def raising(error: EngineError) -> Submit:
    def answer(jobs: Sequence[Job]) -> Outcomes:
        raise error

    return answer


@pytest.fixture
def driver() -> ScriptedDriver:
    return ScriptedDriver()


@asynccontextmanager
async def running(settings: Settings, driver: ScriptedDriver) -> AsyncIterator[Gateway]:
    gateway = Gateway(settings, Store(settings.state_dir), driver, Templates(settings))
    try:
        await gateway.start()
        yield gateway
    finally:
        await gateway.stop()


@pytest.fixture
async def gateway(settings: Settings, driver: ScriptedDriver) -> AsyncIterator[Gateway]:
    async with running(settings, driver) as started:
        yield started


def body(**changes: Any) -> bytes:
    return json.dumps(job_body(**changes)).encode()


async def until(
    gateway: Gateway, reached: Callable[[Job], object], what: str, jid: str = JID
) -> Job:
    """The job as it is read once ``reached`` is true of it."""

    async def look() -> Job | None:
        job, _ = await gateway.read(jid)
        return job if reached(job) else None

    job = await wait_until(look, SECONDS, what)
    assert job is not None
    return job


async def in_state(gateway: Gateway, state: JobState, jid: str = JID) -> Job:
    return await until(gateway, lambda job: job.state is state, f"{jid} to be {state}", jid)


async def looks(driver: ScriptedDriver, call: str, more: int = 2) -> None:
    """Until the engine was asked ``more`` times from now on."""
    least = driver.count(call) + more

    async def enough() -> bool:
        return driver.count(call) >= least

    await wait_until(enough, SECONDS, f"{more} calls of {call}")


def made(settings: Settings, state: JobState, engine: str = "local", **changes: Any) -> Job:
    wanted = request.parse(body(**changes))
    spec = wanted.spec(settings)
    document = Renderer().render(spec, "sbatch", "bare")
    now = datetime.now(UTC)
    return Job(spec, document, wanted.content, engine, state=state, message="m", accepted_at=now)


async def store_has(settings: Settings, state: JobState, **changes: Any) -> Job:
    """A job that a server left in the store in this state when it crashed."""
    (job,) = left_behind(settings, [made(settings, state, **changes)])
    return job


def left_behind(settings: Settings, jobs: Sequence[Job], deleted: Sequence[Job] = ()) -> list[Job]:
    """``jobs`` are in the store, and ``deleted`` are on their way out."""
    store = Store(settings.state_dir)
    added = [store.add(job) for job in [*jobs, *deleted]]
    for job in deleted:
        store.mark_removed(job)
    store.close()
    return added


async def all_removed(gateway: Gateway, left: int = 0) -> None:
    async def gone() -> bool:
        return await gateway.removing() == left

    await wait_until(gone, SECONDS, f"the deleted jobs to be removed, but for {left}")


# --- POST ---


async def test_second_post_of_the_same_job_returns_the_existing_one(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    first = await gateway.accept(body())
    again = [
        await gateway.accept(body(**same)) for same in ({}, {"cpu_limit": 1000}, {"jid": f"/{JID}"})
    ]
    assert {job.name for job in again} == {first.name}
    await in_state(gateway, JobState.QUEUED)
    assert (await gateway.accept(body())).name == first.name
    assert driver.taken == {first.name: 1}


async def test_many_posts_at_once_of_the_same_job_make_one(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    jobs = await asyncio.gather(*(gateway.accept(body()) for _ in range(20)))
    await in_state(gateway, JobState.QUEUED)
    assert driver.taken == {jobs[0].name: 1}


async def test_a_post_with_other_fields_is_a_conflict_that_names_them(gateway: Gateway) -> None:
    first = await gateway.accept(body())
    with pytest.raises(Conflict, match=r"differs in args, memory_limit: use another jid"):
        await gateway.accept(body(args=["x"], memory_limit=201))
    assert (await gateway.get(JID)).name == first.name


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
async def test_a_job_that_failed_is_run_again(
    gateway: Gateway, driver: ScriptedDriver, state: JobState
) -> None:
    driver.observations[JID] = Observation(state, "why")
    first = await gateway.accept(body())
    await in_state(gateway, state)
    driver.observations[JID] = RUNNING
    second = await gateway.accept(body())
    assert (second.state, second.generation) == (JobState.ACCEPTED, 2)
    assert second.name != first.name
    await in_state(gateway, JobState.RUNNING)

    async def first_removed() -> bool:
        return driver.taken == {second.name: 1}

    await wait_until(first_removed, SECONDS, "the first run to be removed")


async def test_a_failed_job_is_not_run_again_with_other_fields(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    driver.observations[JID] = Observation(JobState.FAILED, "why")
    await gateway.accept(body())
    await in_state(gateway, JobState.FAILED)
    with pytest.raises(Conflict):
        await gateway.accept(body(args=["x"]))


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED])
async def test_a_job_that_has_not_failed_is_not_run_again(
    gateway: Gateway, driver: ScriptedDriver, state: JobState
) -> None:
    driver.observations[JID] = Observation(state, "so")
    first = await gateway.accept(body())
    await in_state(gateway, state)
    assert (await gateway.accept(body())).name == first.name


async def test_what_can_never_work_is_refused_and_nothing_is_kept(
    values: dict[str, Any], driver: ScriptedDriver
) -> None:
    async with running(Settings(**values), driver) as gateway:
        with pytest.raises(RequestError):
            await gateway.accept(body(input_dir=".pman/other"))
        with pytest.raises(NotFound):
            await gateway.read(JID)
        assert driver.count("submit") == 0


async def test_a_template_that_refuses_a_job_refuses_it_at_once(
    values: dict[str, Any], driver: ScriptedDriver, tmp_path: Any
) -> None:
    (tmp_path / "sbatch").mkdir()
    (tmp_path / "sbatch" / "bare.sbatch.j2").write_text(
        "#!/bin/sh\n{% if job.gpu_limit %}{{ fail('no GPUs here') }}{% endif %}"
    )
    async with running(Settings(**values, templates_dir=tmp_path), driver) as gateway:
        with pytest.raises(Refusal, match="no GPUs here"):
            await gateway.accept(body(gpu_limit=1))
        with pytest.raises(NotFound):
            await gateway.get(JID)


async def test_a_template_that_cannot_be_used_is_told_at_the_start(
    values: dict[str, Any], driver: ScriptedDriver
) -> None:
    with pytest.raises(TemplateError, match="no sbatch template 'nope"):
        async with running(Settings(**values | {"template": "nope"}), driver):
            pass


async def test_what_renders_ends_with_the_gateway(
    settings: Settings, driver: ScriptedDriver
) -> None:
    async with running(settings, driver) as gateway:
        assert gateway.templates._worker is not None
        process = gateway.templates._worker._process
    assert process.returncode is not None


# --- submit ---


async def test_a_slow_verdict_holds_up_no_job(gateway: Gateway, driver: ScriptedDriver) -> None:
    driver.gates["test"] = threading.Event()
    previewed = await gateway.preview(body())
    asked = asyncio.create_task(gateway.verdict(previewed))
    await looks(driver, "test", 1)
    await gateway.accept(body())
    await in_state(gateway, JobState.QUEUED)
    assert not asked.done()
    driver.gates["test"].set()
    assert (await asked).message == "fits"


async def test_many_jobs_go_out_in_groups(gateway: Gateway, driver: ScriptedDriver) -> None:
    gate = threading.Event()

    def hold(jobs: Sequence[Job]) -> Outcomes:
        gate.wait(SECONDS)
        return driver.take(jobs)

    driver.submits.append(hold)
    jids = [f"j{number}" for number in range(GROUP + 10)]
    await gateway.accept(body(jid="first"))
    await asyncio.gather(*(gateway.accept(body(jid=jid)) for jid in jids))
    gate.set()
    for jid in jids:
        await in_state(gateway, JobState.QUEUED, jid)
    assert driver.count("submit") <= 4
    assert max(len(sent) for call, sent in driver.calls if call == "submit") == GROUP
    assert set(driver.taken.values()) == {1}


async def test_a_refusal_is_final_and_its_words_reach_the_user(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    driver.submits.append(lambda jobs: {job.name: Rejected("no such partition") for job in jobs})
    await gateway.accept(body())
    job = await in_state(gateway, JobState.FAILED)
    assert job.message == "no such partition"
    assert job.ended_at
    assert driver.count("submit") == 1


@pytest.mark.parametrize("as_outcome", [True, False])
async def test_a_job_waits_for_an_engine_that_is_away_and_goes_out_later(
    gateway: Gateway, driver: ScriptedDriver, as_outcome: bool
) -> None:
    away = Unavailable("the queue is full")

    def refuse(jobs: Sequence[Job]) -> Outcomes:
        if not as_outcome:
            raise away
        return {job.name: away for job in jobs}

    driver.submits.extend([refuse] * 3)
    await gateway.accept(body())
    waiting = await until(gateway, lambda job: "the queue is full" in job.message, "the reason")
    assert waiting.state.chris == "notstarted"
    job = await in_state(gateway, JobState.QUEUED)
    assert driver.taken == {job.name: 1}
    assert "the queue is full" not in job.message


@pytest.mark.parametrize("as_outcome", [True, False])
@pytest.mark.parametrize("happened", [True, False])
async def test_after_doubt_a_job_is_looked_for_before_a_second_try(
    gateway: Gateway, driver: ScriptedDriver, happened: bool, as_outcome: bool
) -> None:
    def doubt(jobs: Sequence[Job]) -> Outcomes:
        if happened:
            driver.take(jobs)
        if not as_outcome:
            raise Ambiguous("the line was cut")
        return {job.name: Ambiguous("the line was cut") for job in jobs}

    driver.submits.append(doubt)
    await gateway.accept(body())
    job = await in_state(gateway, JobState.QUEUED)
    tries = [call for call, _ in driver.calls if call in {"submit", "find"}]
    assert tries == ["submit", "find"] if happened else ["submit", "find", "submit"]
    assert driver.taken == {job.name: 1}
    assert job.engine_id == f"id-{job.name}"


async def test_while_a_search_does_not_answer_nothing_is_submitted_again(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    driver.errors["find"] = Unavailable("no route")
    driver.submits.append(raising(Ambiguous("cut")))
    await gateway.accept(body())
    await looks(driver, "find", 3)
    assert driver.count("submit") == 1
    del driver.errors["find"]
    await in_state(gateway, JobState.QUEUED)
    assert set(driver.taken.values()) == {1}


async def test_one_job_in_trouble_does_not_hold_up_the_others(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    def only_good(jobs: Sequence[Job]) -> Outcomes:
        taken = driver.take([job for job in jobs if job.jid != "bad"])
        return {job.name: taken.get(job.name, Unavailable("not now")) for job in jobs}

    driver.submits.extend([only_good] * 1000)
    for jid in ("bad", "good1", "good2"):
        await gateway.accept(body(jid=jid))
    for jid in ("good1", "good2"):
        await in_state(gateway, JobState.QUEUED, jid)
    bad = await until(gateway, lambda job: "not now" in job.message, "the reason", "bad")
    assert bad.state.chris == "notstarted"


@pytest.mark.parametrize("taken", [True, False])
async def test_after_a_crash_a_job_that_was_being_sent_is_looked_for_first(
    settings: Settings, driver: ScriptedDriver, taken: bool
) -> None:
    left = await store_has(settings, JobState.SUBMITTING)
    if taken:
        driver.take([left])
    async with running(settings, driver) as gateway:
        await in_state(gateway, JobState.QUEUED)
    tries = [call for call, _ in driver.calls if call in {"submit", "find"}]
    assert tries == ["find"] if taken else ["find", "submit"]
    assert driver.taken == {left.name: 1}


@pytest.mark.parametrize("state", [JobState.ACCEPTED, JobState.QUEUED, JobState.RUNNING])
async def test_after_a_restart_every_job_goes_on(
    settings: Settings, driver: ScriptedDriver, state: JobState
) -> None:
    await store_has(settings, state)
    driver.observations[JID] = Observation(JobState.SUCCEEDED, "finished")
    async with running(settings, driver) as gateway:
        await in_state(gateway, JobState.SUCCEEDED)
    assert driver.count("submit") == (state is JobState.ACCEPTED)


async def test_a_defect_in_the_driver_does_not_end_the_loop(
    gateway: Gateway, driver: ScriptedDriver, caplog: pytest.LogCaptureFixture
) -> None:
    def defect(jobs: Sequence[Job]) -> Outcomes:
        raise KeyError("oops")

    driver.submits.append(defect)
    await gateway.accept(body())

    async def told() -> bool:
        return "oops" in caplog.text

    await wait_until(told, SECONDS, "the defect in the log")
    await gateway.accept(body(jid="next"))  # wakes the loop
    await in_state(gateway, JobState.QUEUED, "next")
    await in_state(gateway, JobState.QUEUED)


# --- watch ---


async def test_a_job_goes_its_way(gateway: Gateway, driver: ScriptedDriver) -> None:
    await gateway.accept(body())
    await until(gateway, lambda job: job.message == "in line", "the queue's words")
    start = datetime(2026, 1, 2, tzinfo=UTC)
    driver.observations[JID] = replace(RUNNING, started_at=start)
    assert (await in_state(gateway, JobState.RUNNING)).started_at == start
    end = start + timedelta(hours=1)
    driver.observations[JID] = Observation(JobState.FAILED, "out of memory", ended_at=end)
    job = await in_state(gateway, JobState.FAILED)
    assert (job.message, job.started_at, job.ended_at) == ("out of memory", start, end)
    history = [event.state for event in await gateway.history(job)]
    assert history == ["accepted", "submitting", "queued", "queued", "running", "failed"]


async def test_a_state_never_goes_backwards(gateway: Gateway, driver: ScriptedDriver) -> None:
    driver.observations[JID] = RUNNING
    await gateway.accept(body())
    await in_state(gateway, JobState.RUNNING)
    driver.observations[JID] = QUEUED
    await looks(driver, "observe")
    assert (await gateway.get(JID)).state is JobState.RUNNING


async def test_a_job_that_goes_on_under_another_id_is_followed(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    driver.observations[JID] = replace(RUNNING, engine_id="other")
    await gateway.accept(body())
    assert (await in_state(gateway, JobState.RUNNING)).engine_id == "other"


async def test_an_ended_job_is_looked_at_no_more(gateway: Gateway, driver: ScriptedDriver) -> None:
    driver.observations["over"] = Observation(JobState.SUCCEEDED, "finished")
    for jid in ("over", "other"):
        await gateway.accept(body(jid=jid))
    await in_state(gateway, JobState.SUCCEEDED, "over")
    await looks(driver, "observe", 1)
    await looks(driver, "observe")
    assert driver.calls[-1] == ("observe", ["other"])


async def test_one_look_is_for_all_jobs(gateway: Gateway, driver: ScriptedDriver) -> None:
    jids = {f"j{number}" for number in range(100)}
    for jid in jids:
        await gateway.accept(body(jid=jid))

    async def all_in_one() -> bool:
        return any(call == "observe" and {*seen} == jids for call, seen in driver.calls)

    await wait_until(all_in_one, SECONDS, "a look at all jobs at once")


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING])
async def test_a_job_that_is_not_seen_keeps_its_state_and_says_since_when(
    gateway: Gateway, driver: ScriptedDriver, state: JobState
) -> None:
    driver.observations[JID] = Observation(state, "before")
    await gateway.accept(body())
    await until(gateway, lambda job: job.message == "before", "the state before")
    driver.observations[JID] = None
    job = await until(gateway, lambda job: "not seen" in job.message, "the message")
    assert job.state is state
    assert re.search(r"not seen on local since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", job.message)
    await looks(driver, "observe")
    assert (await gateway.get(JID)).missing_since == job.missing_since
    driver.observations[JID] = RUNNING
    job = await until(gateway, lambda job: job.message == "runs", "the job to be seen again")
    assert job.missing_since is None


async def test_a_job_is_lost_only_after_lost_after(
    values: dict[str, Any], driver: ScriptedDriver
) -> None:
    driver.observations[JID] = None
    async with running(Settings(**values | {"lost_after": 0}), driver) as gateway:
        await gateway.accept(body())
        await until(gateway, lambda job: job.missing_since, "the job to be missed")
        await looks(driver, "observe", 3)
        assert (await gateway.get(JID)).state is JobState.QUEUED
    async with running(Settings(**values | {"lost_after": 1}), driver) as gateway:
        job = await in_state(gateway, JobState.LOST)
        assert job.state.chris == "undefined"
        assert job.missing_since
        assert job.ended_at
        assert job.ended_at - job.missing_since >= timedelta(seconds=1)
        assert "lost: not seen on local since" in job.message


# --- outages ---


async def test_an_outage_is_told_while_it_lasts_and_no_longer(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    driver.observations[JID] = RUNNING
    await gateway.accept(body())
    await in_state(gateway, JobState.RUNNING)
    driver.errors["observe"] = Unavailable("login node unreachable")
    job = await until(gateway, lambda job: "unreachable" in job.message, "the outage")
    assert job.state is JobState.RUNNING
    assert re.search(r"unreachable.* since \d\d:\d\d:\d\d.*last known: runs$", job.message)
    assert gateway.outage
    since = gateway.outage.since
    await looks(driver, "observe")
    assert gateway.outage.since == since
    del driver.errors["observe"]
    await until(gateway, lambda job: job.message == "runs", "the outage to be over")
    assert gateway.outage is None
    job = await gateway.get(JID)
    assert not any("unreachable" in event.message for event in await gateway.history(job))


async def test_the_end_of_a_job_is_told_without_the_outage(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    driver.observations[JID] = Observation(JobState.SUCCEEDED, "finished")
    await gateway.accept(body())
    await in_state(gateway, JobState.SUCCEEDED)
    driver.errors["observe"] = Unavailable("unreachable")
    await gateway.accept(body(jid="other"))
    await until(gateway, lambda job: "unreachable" in job.message, "the outage", "other")
    assert (await gateway.read(JID))[0].message == "finished"


async def test_during_an_outage_jobs_are_accepted_read_and_deleted(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    for call in ("submit", "find", "observe", "logs", "remove"):
        driver.errors[call] = Unavailable("unreachable")
    for jid in ("kept", "gone"):
        await gateway.accept(body(jid=jid))
        await until(gateway, lambda job: "unreachable" in job.message, "the outage", jid)
    await gateway.delete("gone")
    with pytest.raises(NotFound):
        await gateway.read("gone")
    driver.errors.clear()
    await in_state(gateway, JobState.QUEUED, "kept")
    assert set(driver.taken.values()) == {1}
    assert len(driver.taken) == 1


# --- delete ---


async def test_a_job_deleted_while_it_is_being_sent_is_removed_once_it_was_sent(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    begun, gate = threading.Event(), threading.Event()

    def hold(jobs: Sequence[Job]) -> Outcomes:
        begun.set()
        gate.wait(SECONDS)
        return driver.take(jobs)

    driver.submits.append(hold)
    await gateway.accept(body())
    await asyncio.to_thread(begun.wait, SECONDS)
    await gateway.delete(JID)
    with pytest.raises(NotFound):
        await gateway.read(JID)
    second = await gateway.accept(body(args=["other"]))
    assert driver.count("remove") == 0
    gate.set()
    await in_state(gateway, JobState.QUEUED)

    async def only_the_second() -> bool:
        return driver.taken == {second.name: 1}

    await wait_until(only_the_second, SECONDS, "the first job to be removed")


async def test_a_job_deleted_before_it_was_sent_never_is(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    begun, gate = threading.Event(), threading.Event()

    def hold(jobs: Sequence[Job]) -> Outcomes:
        begun.set()
        gate.wait(SECONDS)
        return driver.take(jobs)

    driver.submits.append(hold)
    await gateway.accept(body(jid="first"))
    await asyncio.to_thread(begun.wait, SECONDS)
    await gateway.accept(body(jid="deleted"))
    await gateway.delete("deleted")
    gate.set()
    await gateway.accept(body(jid="last"))
    await in_state(gateway, JobState.QUEUED, "last")
    assert not any("deleted" in jids for call, jids in driver.calls if call != "remove")


async def test_a_job_is_removed_once_the_engine_is_back_even_after_a_restart(
    settings: Settings, driver: ScriptedDriver
) -> None:
    async with running(settings, driver) as gateway:
        await gateway.accept(body())
        await in_state(gateway, JobState.QUEUED)
        driver.errors["remove"] = Unavailable("away")
        await gateway.delete(JID)
        await looks(driver, "remove")
    del driver.errors["remove"]
    async with running(settings, driver) as gateway:

        async def removed() -> bool:
            return not driver.taken

        await wait_until(removed, SECONDS, "the job to be removed")
        with pytest.raises(NotFound):
            await gateway.get(JID)


async def test_with_remove_jobs_no_a_delete_removes_nothing(
    values: dict[str, Any], driver: ScriptedDriver
) -> None:
    async with running(Settings(**values | {"remove_jobs": False}), driver) as gateway:
        await gateway.accept(body())
        await in_state(gateway, JobState.QUEUED)
        await gateway.delete(JID)
        await looks(driver, "observe")
        assert (await gateway.get(JID)).state is JobState.QUEUED
        assert driver.count("remove") == 0
        with pytest.raises(NotFound):
            await gateway.delete("other")


# --- logs ---


async def test_many_reads_at_once_read_the_log_once(
    values: dict[str, Any], driver: ScriptedDriver
) -> None:
    async with running(Settings(**values | {"poll_interval": 60}), driver) as gateway:
        await gateway.accept(body())
        await in_state(gateway, JobState.QUEUED)
        before = driver.count("logs")
        answers = await asyncio.gather(*(gateway.read(JID) for _ in range(20)))
        assert {text for _, text in answers} == {"log\n"}
        assert driver.count("logs") - before <= 1


async def test_a_log_that_cannot_be_read_now_is_the_last_that_could(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    await gateway.accept(body())
    await in_state(gateway, JobState.QUEUED)
    assert (await gateway.read(JID))[1] == "log\n"
    driver.errors["logs"] = Unavailable("away")
    before = driver.count("logs")

    async def tried() -> str:
        _, text = await gateway.read(JID)
        return text if driver.count("logs") > before else ""

    assert await wait_until(tried, SECONDS, "the log to be asked for") == "log\n"


async def test_the_log_of_a_job_that_ended_long_ago_is_kept(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    driver.observations[JID] = Observation(JobState.SUCCEEDED, "finished", ended_at=long_ago)
    await gateway.accept(body())
    await in_state(gateway, JobState.SUCCEEDED)
    assert (await gateway.read(JID))[1] == "log\n"
    driver.text = "the folder is gone"
    before = driver.count("logs")
    assert (await gateway.read(JID))[1] == "log\n"
    assert driver.count("logs") == before


async def test_a_job_of_another_engine_is_left_alone(
    values: dict[str, Any], driver: ScriptedDriver
) -> None:
    await store_has(Settings(**values), JobState.RUNNING)
    other = Settings(**values | {"container_env": "slurm"})
    async with running(other, driver) as gateway:
        await gateway.accept(body(jid="other"))
        await in_state(gateway, JobState.QUEUED, "other")
        await looks(driver, "observe")
        job, _ = await gateway.read(JID)
        assert job.state is JobState.RUNNING
        assert "this server runs jobs on slurm, and this one is on local" in job.message
    assert not any(JID in jids for _, jids in driver.calls)


# --- what one trouble does not spread to ---


@pytest.mark.parametrize(
    ("pause", "level"), [(LONGEST_PAUSE / 2, logging.INFO), (LONGEST_PAUSE, logging.WARNING)]
)
async def test_a_job_that_is_not_removed_for_long_is_a_warning(
    values: dict[str, Any],
    driver: ScriptedDriver,
    caplog: pytest.LogCaptureFixture,
    pause: float,
    level: int,
) -> None:
    caplog.set_level(logging.INFO)
    async with running(Settings(**values | {"poll_interval": pause}), driver) as gateway:
        await gateway.accept(body())
        await in_state(gateway, JobState.QUEUED)
        driver.stuck[JID] = "it is being aborted"
        await gateway.delete(JID)

        def told() -> list[int]:
            return [one.levelno for one in caplog.records if "not removed yet" in one.message]

        async def is_told() -> bool:
            return bool(told())

        await wait_until(is_told, SECONDS, "the job that stays in the log")
        assert told() == [level]


async def test_a_job_that_cannot_be_removed_holds_up_no_other(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    for jid in ("stuck", "free"):
        await gateway.accept(body(jid=jid))
        await in_state(gateway, JobState.QUEUED, jid)
    driver.stuck["stuck"] = "Operation not permitted"
    await gateway.delete("stuck")
    await gateway.delete("free")

    async def one_left() -> bool:
        return await gateway.removing() == 1

    await wait_until(one_left, SECONDS, "the free job to be removed")
    assert gateway.outage is None
    driver.stuck.clear()

    async def none_left() -> bool:
        return await gateway.removing() == 0

    await wait_until(none_left, SECONDS, "the stuck job to be removed at last")


async def test_a_log_that_hangs_is_waited_for_no_longer_than_patience(
    gateway: Gateway, driver: ScriptedDriver, tmp_path: Path
) -> None:
    await gateway.accept(body())
    job = await in_state(gateway, JobState.QUEUED)
    store = Store(tmp_path / "other")
    logs = JobLogs(driver, store, lines=10, fresh=0.1, patience=0.1)
    driver.log_gate.clear()
    try:
        assert await logs.tail(job) == ""
    finally:
        driver.log_gate.set()

    async def there() -> bool:
        return await logs.tail(job) == "log\n"

    await wait_until(there, SECONDS, "the log to be read at last")
    await logs.close()
    store.close()


async def test_a_log_that_cannot_be_kept_is_read_all_the_same(
    gateway: Gateway,
    driver: ScriptedDriver,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await gateway.accept(body())
    job = await in_state(gateway, JobState.QUEUED)
    long_ago = datetime.now(UTC) - 2 * SETTLES
    job = replace(job, state=JobState.SUCCEEDED, ended_at=long_ago)
    store = Store(tmp_path / "other")
    store.add(job)
    logs = JobLogs(driver, store, lines=10, fresh=SECONDS, patience=SECONDS)
    with no_room_beyond(0):
        assert await logs.tail(job) == "log\n"
    assert "is not kept yet: STATE_DIR" in caplog.text
    await logs.close()
    assert store.get(job.jid) == job
    store.close()


async def test_time_without_an_answer_does_not_make_a_job_lost(
    values: dict[str, Any], driver: ScriptedDriver
) -> None:
    driver.observations[JID] = None
    async with running(Settings(**values | {"lost_after": 1}), driver) as gateway:
        await gateway.accept(body())
        missed = await until(gateway, lambda job: job.missing_since, "the job to be missed")
        driver.errors["observe"] = Unavailable("login node unreachable")

        async def long_ago() -> bool:
            assert missed.missing_since
            return datetime.now(UTC) - missed.missing_since > timedelta(seconds=1.5)

        await wait_until(long_ago, SECONDS, "the outage to last")
        del driver.errors["observe"]
        back = datetime.now(UTC)
        lost = await in_state(gateway, JobState.LOST)
        assert lost.ended_at
        assert lost.ended_at - back >= timedelta(seconds=1)


async def test_an_outage_is_one_outage_whichever_call_fails(
    gateway: Gateway, driver: ScriptedDriver
) -> None:
    """Looking works, submitting does not: `since` stays, and running jobs are not concerned."""
    await gateway.accept(body(jid="sent"))
    await in_state(gateway, JobState.QUEUED, "sent")
    driver.errors["submit"] = Unavailable("the disk is full", "the disk is full")
    await gateway.accept(body(jid="waits"))
    first = await until(gateway, lambda job: "the disk is full" in job.message, "it", "waits")
    before = driver.count("submit")

    async def tried_again() -> bool:
        return driver.count("submit") > before

    await wait_until(tried_again, SECONDS, "another try")
    again, _ = await gateway.read("waits")
    since = first.message.partition(";")[0]
    assert again.message.startswith(since)
    sent, _ = await gateway.read("sent")
    assert "the disk is full" not in sent.message


# --- what runs again, and how often the engine is asked ---


async def test_a_lost_job_is_run_again(settings: Settings, driver: ScriptedDriver) -> None:
    first = await store_has(settings, JobState.LOST)
    driver.take([first])
    driver.observations[JID] = RUNNING
    async with running(settings, driver) as gateway:
        second = await gateway.accept(body())
        assert (second.state, second.generation) == (JobState.ACCEPTED, 2)
        assert second.name != first.name
        await in_state(gateway, JobState.RUNNING)
        await all_removed(gateway)
    assert driver.taken == {second.name: 1}


async def test_the_engine_is_looked_at_no_more_often_than_poll_interval(
    settings: Settings, gateway: Gateway, driver: ScriptedDriver
) -> None:
    await gateway.accept(body())
    await in_state(gateway, JobState.QUEUED)
    began, before = time.monotonic(), driver.count("observe")
    for number in range(5):  # each is sent, and wakes the watch
        await gateway.accept(body(jid=f"j{number}"))
        await in_state(gateway, JobState.QUEUED, f"j{number}")
    await looks(driver, "observe", 6)
    calls, elapsed = driver.count("observe") - before, time.monotonic() - began
    assert calls <= elapsed / settings.poll_interval + 2


async def test_the_end_of_one_outage_hurries_the_others(
    values: dict[str, Any], driver: ScriptedDriver
) -> None:
    settings = Settings(**values | {"poll_interval": 1})
    jobs = [made(settings, JobState.RUNNING, jid="runs"), made(settings, JobState.ACCEPTED)]
    left_behind(settings, jobs)
    for call in ("observe", "submit"):
        driver.errors[call] = Unavailable("away")
    async with running(settings, driver):
        await looks(driver, "observe", 1)
        driver.gates["observe"] = threading.Event()
        await looks(driver, "observe", 1)  # this one is held
        await looks(driver, "submit", 3 - driver.count("submit"))
        paused, tries = time.monotonic(), driver.count("submit")  # for 4 s, if not hurried
        del driver.errors["observe"]
        driver.gates["observe"].set()
        await looks(driver, "submit", 1 + tries - driver.count("submit"))
        assert time.monotonic() - paused < 3


# --- what is removed, and what never is ---


async def test_many_jobs_are_removed_in_groups(settings: Settings, driver: ScriptedDriver) -> None:
    jobs = [made(settings, JobState.RUNNING, jid=f"j{number}") for number in range(GROUP + 10)]
    left_behind(settings, [], deleted=jobs)
    driver.take(jobs)
    async with running(settings, driver) as gateway:
        await all_removed(gateway)
    assert not driver.taken
    assert [len(jids) for call, jids in driver.calls if call == "remove"] == [GROUP, 10]


async def test_what_belongs_to_another_engine_is_neither_sent_nor_removed(
    settings: Settings, driver: ScriptedDriver
) -> None:
    unsent = [
        made(settings, state, "slurm", jid=f"theirs-{state}")
        for state in (JobState.ACCEPTED, JobState.SUBMITTING, JobState.QUEUED)
    ]
    gone = [
        made(settings, state, "slurm", jid=f"deleted-{state}")
        for state in (JobState.ACCEPTED, JobState.SUBMITTING, JobState.RUNNING)
    ]
    left_behind(settings, unsent, deleted=gone)
    async with running(settings, driver) as gateway:
        for jid in (JID, "other"):
            await gateway.accept(body(jid=jid))
            await in_state(gateway, JobState.QUEUED, jid)
        await gateway.delete("other")
        await all_removed(gateway, left=len(gone))
        await looks(driver, "observe")
        for job in unsent:
            assert (await gateway.get(job.jid)).state is job.state
    assert {jid for _, jids in driver.calls for jid in jids} == {JID, "other"}


async def test_a_job_deleted_while_it_is_looked_for_is_removed_and_never_sent(
    settings: Settings, driver: ScriptedDriver
) -> None:
    await store_has(settings, JobState.SUBMITTING)
    driver.gates["find"] = threading.Event()
    async with running(settings, driver) as gateway:
        await looks(driver, "find", 1 - driver.count("find"))
        await gateway.delete(JID)
        driver.gates["find"].set()
        await all_removed(gateway)
        await gateway.accept(body(jid="next"))
        await in_state(gateway, JobState.QUEUED, "next")
    asked = [call for call in driver.calls if call[0] in {"find", "submit", "remove"}]
    assert asked == [("find", [JID]), ("remove", [JID]), ("submit", ["next"])]


async def test_a_deleted_job_that_may_have_been_sent_is_removed_from_the_engine(
    settings: Settings, driver: ScriptedDriver
) -> None:
    jobs = [made(settings, JobState.SUBMITTING), made(settings, JobState.ACCEPTED, jid="unsent")]
    left_behind(settings, [], deleted=jobs)
    driver.take(jobs[:1])
    async with running(settings, driver) as gateway:
        await all_removed(gateway)
    assert not driver.taken
    assert [call for call in driver.calls if call[0] != "close"] == [("remove", [JID])]


async def test_a_job_that_could_not_be_removed_is_not_forgotten(
    settings: Settings, driver: ScriptedDriver
) -> None:
    await store_has(settings, JobState.RUNNING)
    driver.stuck[JID] = "Operation not permitted"
    async with running(settings, driver) as gateway:
        await gateway.delete(JID)
        await looks(driver, "remove", 2)
        assert await gateway.removing() == 1
    driver.stuck.clear()
    before = driver.count("remove")
    async with running(settings, driver) as gateway:
        await all_removed(gateway)
    assert driver.count("remove") == before + 1
