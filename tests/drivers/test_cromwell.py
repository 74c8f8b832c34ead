"""CromwellDriver with a scripted Cromwell, because none can be had here, and a real shell in which
squeue, sacct and scancel are stand-ins: what is asked and how often, and what is made of it."""

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pman.drivers import ENGINES, cromwell
from pman.drivers import cromwell_states as states
from pman.drivers.cromwell import BATCH, LOG_BYTES, METADATA, CromwellDriver, workflow_id
from pman.drivers.cromwell_api import LABEL, CromwellServer
from pman.errors import Ambiguous, EngineError, Rejected, SettingsError, Unavailable
from pman.exchange import Result
from pman.jobs import Document, Job, JobSpec, JobState, Observation
from pman.settings import Settings
from pman.shell import LIMIT, LocalShell
from tests.drivers.scripted_cromwell import (
    DESCRIBE,
    QUERY,
    VERSION,
    WORKFLOWS,
    Reply,
    Request,
    Scripted,
    fail,
    html,
    rejection,
)


@dataclass
class Workflow:
    status: str = "Submitted"
    label: str = ""
    shown: bool = True
    call: dict[str, Any] = field(default_factory=dict)
    failures: list[Any] = field(default_factory=list)
    metadata: Reply | None = None
    """What is answered instead."""
    abort: Reply | None = None


class Cromwell:
    """The answers of a Cromwell that has ``workflows``, by their ids."""

    def __init__(self) -> None:
        self.version = "92-abc1234"
        self.workflows: dict[str, Workflow] = {}
        self.submit: dict[str, Reply] = {}
        """What is answered to a submission instead, by the job's name."""

    def __call__(self, request: Request) -> Reply:
        answers = {
            VERSION: lambda: Reply(body={"cromwell": self.version}),
            WORKFLOWS: lambda: self._submitted(request.parts),
            QUERY: lambda: self._queried(request.json),
            DESCRIBE: lambda: Reply(body={"valid": False, "errors": ["line 3"]}),
        }
        if request.path in answers:
            return answers[request.path]()
        *_, id, what = request.path.split("/")
        known = self.workflows.get(id)
        return self._metadata(id, known) if what == "metadata" else self._aborted(id, known)

    def _submitted(self, parts: Mapping[str, bytes]) -> Reply:
        name = json.loads(parts["labels"])[LABEL]
        if name in self.submit:
            return self.submit[name]
        id = json.loads(parts.get("requestedWorkflowId", b"null")) or str(uuid.uuid4())
        if id in self.workflows:
            return fail(400, f"Requested workflow IDs are already in use: {id}")
        self.workflows[id] = Workflow(label=name)
        return Reply(201, {"id": id, "status": "Submitted"})

    def _queried(self, filters: list[dict[str, str]]) -> Reply:
        ids = {one["id"] for one in filters if "id" in one}
        labels = {one["labelor"].partition(":")[2] for one in filters if "labelor" in one}
        results = [
            {"id": id, "status": one.status, "labels": {LABEL: one.label}}
            for id, one in self.workflows.items()
            if one.shown and (id in ids or one.label in labels)
        ]
        return Reply(body={"results": results})

    @staticmethod
    def _aborted(id: str, known: Workflow | None) -> Reply:
        if known and known.abort:
            return known.abort
        if known is None or known.status in ("Succeeded", "Failed", "Aborted"):
            words = f"Couldn't abort {id} because no workflow with that ID is in progress"
            return fail(404, words, "error")
        begun = known.status in ("Running", "Aborting")
        known.status = "Aborting" if begun else "Aborted"
        return Reply(body={"id": id, "status": known.status})

    @staticmethod
    def _metadata(id: str, known: Workflow | None) -> Reply:
        if known is None or not known.shown:
            return fail(404, f"Unrecognized workflow ID: {id}")
        if known.metadata:
            return known.metadata
        calls = {"ChRISJob.plugin_instance": [known.call]} if known.call else {}
        return Reply(body={"id": id, "calls": calls, "failures": known.failures})


class Cluster(LocalShell):
    """This machine's bash, with stand-ins for Slurm's commands that answer with ``queue`` and
    ``account``: states by Slurm's ids."""

    where = "login.hpc.org"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.queue: dict[str, str] = {}
        self.account: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.nodes = "n1"
        self.squeue_code = 0
        self.sacct = self.scancel = "true"
        self.calls: list[tuple[str, ...]] = []
        self.closed = False

    def run(
        self,
        script: str,
        *args: str,
        stdin: bytes = b"",
        timeout: float = 30.0,
        limit: int = LIMIT,
        repeatable: bool = True,
    ) -> Result:
        self.calls.append(args)
        queue = "".join(
            "\x1f".join(
                (number, self.names.get(number, "x"), state, "None", "N/A", "N/A", self.nodes)
            )
            + "\n"
            for number, state in self.queue.items()
        )
        account = "".join(
            "\x1f".join((number, "cromwell", state, "None", "100", "200", "n1", "0:0")) + "\n"
            for number, state in self.account.items()
        )
        (self._folder / "queue").write_text(queue)
        (self._folder / "account").write_text(account)
        commands = (
            # The real one refuses all for one id that is no number, and a single id if the job of
            # it is forgotten.
            'squeue() { case "$*" in *--jobs=*[!0-9,]*" "*) echo Invalid >&2; return 1 ;; '
            f"*--jobs=*,* | *--name=*) ;; *) [ -s '{self._folder}/queue' ] || return 1 ;; esac; "
            f"cat '{self._folder}/queue'; return {self.squeue_code}; }}\n"
            f"sacct() {{ cat '{self._folder}/account'; {self.sacct}; }}\n"
            f"scancel() {{ echo \"$@\" >> '{self._folder}/cancelled'; {self.scancel}; }}\n"
        )
        return super().run(
            commands + script,
            *args,
            stdin=stdin,
            timeout=timeout,
            limit=limit,
            repeatable=repeatable,
        )

    def close(self) -> None:
        self.closed = True

    @property
    def cancelled(self) -> list[str]:
        file = self._folder / "cancelled"
        return file.read_text().split() if file.exists() else []


def job(number: int = 0, *, state: JobState = JobState.RUNNING, **notes: str) -> Job:
    """The job `jid.N`, whose workflow has the id that its name gives it."""
    name = f"jid.{number}"
    return Job(
        spec=JobSpec(
            jid="jid",
            name=name,
            auid="cube",
            type="ds",
            image="image",
            argv=("true",),
            env={},
            labels={"site": "hpc"},
            input_dir="/in",
            output_dir="/out",
            folder=f"/jobs/{name}",
            memory_limit=200,
        ),
        document=Document("version 1.0\n", "wdl", "chris"),
        content="{}",
        engine="cromwell",
        state=state,
        engine_id=workflow_id(name),
        notes=notes,
    )


@dataclass
class Site:
    server: Scripted
    cromwell: Cromwell
    cluster: Cluster
    driver: CromwellDriver
    executions: Path

    def workflow(self, job: Job, status: str, **more: Any) -> Workflow:
        self.cromwell.workflows[job.engine_id] = made = Workflow(status, job.name, **more)
        return made

    def folder(self, job: Job) -> Path:
        """Cromwell's folder of the job."""
        path = self.executions / job.name / "execution"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def call(self, job: Job, number: str, **more: Any) -> dict[str, Any]:
        files = {name: str(self.folder(job) / name) for name in ("stdout", "stderr")}
        return {"executionStatus": "Running", "jobId": number, **files, **more}

    def noted(self, number: int = 0, state: JobState = JobState.RUNNING) -> Job:
        """A job of which all is known that the metadata tell; on Slurm it is 70N."""
        plain = job(number, state=state)
        files = {name: str(self.folder(plain) / name) for name in ("stdout", "stderr")}
        return replace(plain, notes={"slurm": f"70{number}", **files})

    def look(self, *jobs: Job) -> Mapping[str, Observation]:
        """One look, counted from nothing."""
        self.server.requests.clear()
        self.cluster.calls.clear()
        return self.driver.observe(jobs)

    @property
    def asked(self) -> list[str]:
        """The workflows whose metadata were asked for."""
        paths = [request.path.split("/") for request in self.server.requests]
        return [path[-2] for path in paths if path[-1] == "metadata"]

    @property
    def aborted(self) -> list[str]:
        paths = [request.path.split("/") for request in self.server.requests]
        return [path[-2] for path in paths if path[-1] == "abort"]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    answers = Cromwell()
    with Scripted(answers) as server:
        cluster = Cluster(tmp_path)
        driver = CromwellDriver(CromwellServer(server.url), cluster, {}, asks_slurm=True)
        yield Site(server, answers, cluster, driver, tmp_path / "cromwell-executions")
        driver.close()


def without_slurm(site: Site) -> CromwellDriver:
    return CromwellDriver(CromwellServer(site.server.url), site.cluster, {}, asks_slurm=False)


# made by settings


def test_what_the_settings_say_reaches_it(
    site: Site, tmp_path: Path, clean_environment: None
) -> None:
    (tmp_path / "stdout").write_text("words\n")
    values: dict[str, Any] = {
        "container_env": "cromwell",
        "storebase": tmp_path,
        "timelimit_minutes": 60,
        "cromwell_url": site.server.url,
        "cromwell_paths": {"/theirs": str(tmp_path)},
        "cromwell_config": "/nowhere/cromwell.conf",
    }
    with closing(ENGINES["cromwell"].make(Settings(**values))) as driver:
        assert driver.logs(job(stdout="/theirs/stdout"), 10) == "words\n"
        told = {finding.text for finding in driver.check()}
    assert any(text.startswith("it is not asked: ") for text in told)
    assert any(text.startswith("/nowhere/cromwell.conf can't be read") for text in told)


def test_every_setting_that_it_lacks_is_named(tmp_path: Path, clean_environment: None) -> None:
    values: dict[str, Any] = {"container_env": "cromwell", "storebase": tmp_path}
    with pytest.raises(SettingsError) as caught:
        ENGINES["cromwell"].make(Settings(**values))
    names = [line.split()[0] for line in str(caught.value).splitlines()]
    assert names == ["CROMWELL_URL", "TIMELIMIT_MINUTES"]


# what a look costs


@pytest.mark.parametrize("count", [1, 100, 1000])
def test_a_look_at_jobs_that_run_is_a_query_for_500_and_one_command(site: Site, count: int) -> None:
    jobs = [job(number, slurm=f"70{number}", stdout="/x/stdout") for number in range(count)]
    for one in jobs:
        site.workflow(one, "Running")
        site.cluster.queue[one.notes["slurm"]] = "RUNNING"
    seen = site.look(*jobs)
    assert {found.message for found in seen.values()} == {"running on n1"}
    assert len(seen) == count
    assert [request.path for request in site.server.requests] == [QUERY] * -(-count // 500)
    assert len(site.cluster.calls) == 1


@pytest.mark.parametrize("count", [1, 100, 1000])
@pytest.mark.parametrize("status", ["Running", "Failed"])
def test_a_look_at_jobs_that_have_ended_is_bounded(site: Site, count: int, status: str) -> None:
    jobs = [job(number, slurm=f"70{number}", stdout="/x/stdout") for number in range(count)]
    for one in jobs:
        site.workflow(one, status)
    site.look(*jobs)
    queries = -(-count // 500)
    assert len(site.server.asked(QUERY)) == queries
    assert len(site.asked) <= METADATA
    assert len(site.server.requests) == queries + len(site.asked)
    assert len(site.cluster.calls) <= 1 + -(-count // BATCH)


@pytest.mark.parametrize("status", ["Submitted", "On Hold", "Succeeded"])
def test_where_cromwell_tells_all_nobody_else_is_asked(site: Site, status: str) -> None:
    jobs = [site.noted(number) for number in range(3)]
    for one in jobs:
        site.workflow(one, status)
    assert len(site.look(*jobs)) == 3
    assert len(site.server.requests) == 1
    assert not site.cluster.calls


def test_a_new_job_costs_one_question_for_its_metadata(site: Site) -> None:
    new = job()
    site.workflow(new, "Running", call=site.call(new, "700"))
    site.cluster.queue["700"] = "PENDING"
    seen = site.look(new)["jid.0"]
    assert site.asked == [new.engine_id]
    assert seen.notes == site.noted().notes
    site.look(replace(new, notes=seen.notes))
    assert site.asked == []


def test_where_slurm_is_not_asked_the_metadata_are_not_asked_for_its_id(site: Site) -> None:
    driver = without_slurm(site)
    known = job(stdout="/x/stdout")
    site.workflow(known, "Running")
    driver.observe([known])
    assert site.asked == []
    driver.close()


def test_what_left_nothing_yet_is_not_looked_for_on_the_disk(site: Site) -> None:
    new = job()
    site.workflow(new, "Failed")
    site.look(new)
    assert site.cluster.calls == [(cromwell.slurm_name(new.engine_id),)]


def test_what_has_ended_is_read_in_parts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cromwell, "BATCH", 1)
    jobs = [site.noted(number) for number in range(3)]
    for number, one in enumerate(jobs):
        site.workflow(one, "Failed")
        (site.folder(one) / "rc").write_text(f"{number + 3}\n")
    site.cluster.account |= {"700": "FAILED", "701": "FAILED", "702": "TIMEOUT"}
    seen = site.look(*jobs)
    assert [seen[one.name].message for one in jobs[:2]] == ["exit code 3", "exit code 4"]
    assert seen["jid.2"].message.startswith("time limit")
    assert len(site.cluster.calls) == 1 + len(jobs)


# metadata: fair, and never in the way of the others


def test_all_jobs_get_their_metadata_in_time(site: Site) -> None:
    jobs = [job(number) for number in range(2 * METADATA + 10)]
    for one in jobs:
        site.workflow(one, "Running")  # none has come to Slurm yet
    asked: set[str] = set()
    for _ in range(3):
        assert len(site.look(*jobs)) == len(jobs)
        asked |= set(site.asked)
    assert asked == {one.engine_id for one in jobs}


BROKEN = [html(500), fail(500, "None.get", "error"), Reply(200, "null"), fail(404, "Unrecognized")]


@pytest.mark.parametrize("reply", BROKEN, ids=["html", "500", "null", "404"])
@pytest.mark.parametrize("status", ["Running", "Failed"])
def test_metadata_that_cannot_be_read_hide_nobody(site: Site, reply: Reply, status: str) -> None:
    bad, good = job(0), job(1)
    site.workflow(bad, status, metadata=reply)
    site.workflow(good, "Running", call=site.call(good, "701"))
    site.cluster.queue["701"] = "RUNNING"
    seen = site.look(bad, good)
    assert seen["jid.1"].message == "running on n1"
    assert seen["jid.0"].state is JobState.RUNNING


def test_failed_jobs_whose_metadata_cannot_be_read_keep_no_other_waiting(site: Site) -> None:
    bad = [job(number) for number in range(METADATA)]
    good = job(METADATA)
    for one in bad:
        site.workflow(one, "Failed", metadata=html(500))
    site.workflow(good, "Failed", failures=[{"message": "the reason"}])
    seen: dict[str, str] = {}
    for _ in range(3):
        seen |= {name: one.message for name, one in site.look(*bad, good).items()}
    assert seen[good.name] == "failed in Cromwell: the reason"


def test_of_many_that_fail_at_once_each_gets_its_reason(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "LAGS", 1e-9)  # as if it took longer than that to ask for all
    jobs = {one.name: one for one in (job(number) for number in range(3 * METADATA))}
    for one in jobs.values():
        site.workflow(one, "Failed", failures=[{"message": f"the reason of {one.name}"}])
    ends: dict[str, str] = {}
    for _ in range(4):
        for name, seen in site.look(*jobs.values()).items():
            if seen.state.final:
                ends[name] = seen.message
                del jobs[name]
        if not jobs:
            break
    assert not jobs
    assert ends == {name: f"failed in Cromwell: the reason of {name}" for name in ends}


def test_a_quick_success_gets_its_notes_and_waits_for_nothing(site: Site) -> None:
    jobs = [job(number) for number in range(METADATA + 5)]
    for one in jobs:
        site.workflow(one, "Succeeded", call=site.call(one, "700"))
    seen = site.look(*jobs).values()
    assert {one.state for one in seen} == {JobState.SUCCEEDED}
    assert sum(one.notes.get("slurm") == "700" for one in seen) == METADATA


# notes


def test_notes_are_kept_when_the_metadata_have_less(site: Site) -> None:
    known = replace(job(), notes={"stdout": "/x/stdout"})
    site.workflow(known, "Running", call={"executionStatus": "QueuedInCromwell"})
    assert site.look(known)["jid.0"].notes == {"stdout": "/x/stdout"}
    site.workflow(known, "Running", call={"jobId": "700"})
    assert site.look(known)["jid.0"].notes == {"stdout": "/x/stdout", "slurm": "700"}


@pytest.mark.parametrize("status", ["Succeeded", "Aborted", "Failed", "Submitted", "Running"])
def test_notes_are_kept_in_every_status(site: Site, status: str) -> None:
    known = site.noted()
    site.workflow(known, status)
    assert site.look(known)["jid.0"].notes == known.notes


# what is seen


def ended(site: Site, text: str, **files: str) -> Observation:
    """A failed job that left ``text`` as its exit code, and these files."""
    known = site.noted()
    site.workflow(known, "Failed", failures=[{"message": "Cromwell's own words"}])
    site.cluster.queue["700"] = "COMPLETED"
    for name, words in {"rc": text, **files}.items():
        (site.folder(known) / name.replace("_", ".")).write_text(words)
    return site.look(known)["jid.0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3\n", "exit code 3"),
        ("3", "exit code 3"),
        ("137\n", "killed by signal 9 (SIGKILL)"),
        ("rubbish", "failed in Cromwell: Cromwell's own words"),
        ("", "failed in Cromwell: Cromwell's own words"),
        ("0\n", "failed in Cromwell: Cromwell's own words"),
    ],
)
def test_the_exit_code_is_read(site: Site, text: str, message: str) -> None:
    seen = ended(site, text)
    assert (seen.state, seen.message) == (JobState.FAILED, message)


@pytest.mark.parametrize("file", ["slurm_log", "stderr"])
def test_what_slurm_wrote_into_the_log_is_read(site: Site, file: str) -> None:
    lines = "the plugin\nslurmstepd: error: Detected 1 oom_kill event in StepId=7.batch.\n"
    assert ended(site, "137\n", **{file: lines}).message == "out of memory (asked for 200 MiB)"


def test_the_scripts_own_reason_is_read(site: Site) -> None:
    known = site.noted()
    (site.folder(known) / "pman-reason").write_text("/data/in is not there on n1\n")
    assert ended(site, "1\n").message == "/data/in is not there on n1"


def test_the_words_of_sbatch_are_read(site: Site) -> None:
    new = job()
    words = "sbatch: error: Batch job submission failed: Invalid qos specification\n"
    (site.folder(new) / "stderr.submit").write_text(words)
    site.workflow(new, "Failed", call=site.call(new, ""))
    assert site.look(new)["jid.0"].message == "refused by Slurm: Invalid qos specification"


@pytest.mark.parametrize("text", ["3\x1e", "\x1f3", "\x1e\x1e\x1e", "\x1f" * 9, "\xff\x00"])
def test_a_strange_exit_code_spoils_no_other_job(site: Site, text: str) -> None:
    bad, good = site.noted(0), site.noted(1)
    for one in (bad, good):
        site.workflow(one, "Failed")
    site.cluster.queue |= {"700": "COMPLETED", "701": "COMPLETED"}
    (site.folder(bad) / "rc").write_text(text)
    (site.folder(good) / "rc").write_text("3\n")
    assert site.look(bad, good)["jid.1"].message == "exit code 3"


@pytest.mark.parametrize("file", ["pman-reason", "stderr.submit", "slurm.log", "stderr"])
def test_control_characters_in_a_jobs_files_spoil_no_other_job(site: Site, file: str) -> None:
    bad, good = site.noted(0), site.noted(1)
    for one in (bad, good):
        site.workflow(one, "Failed")
        (site.folder(one) / "rc").write_text("3\n")
    site.cluster.queue |= {"700": "COMPLETED", "701": "COMPLETED"}
    forged = f"slurmstepd: error: \x1e{good.name}\x1f0 1\x1f\x1fforged\x1f\x1f\x1e\n"
    (site.folder(bad) / file).write_text(forged * 2)
    assert site.look(good, bad)["jid.1"].message == "exit code 3"


def test_an_id_that_is_none_of_slurms_spoils_no_other_job(site: Site) -> None:
    bad, good = job(0), site.noted(1)
    site.workflow(bad, "Running", call=site.call(bad, "pid 7"))
    site.workflow(good, "Running")
    site.cluster.queue["701"] = "RUNNING"
    assert site.look(bad, good)["jid.1"].message == "running on n1"


def test_while_squeue_is_away_states_stay(site: Site) -> None:
    running, queued = site.noted(0), site.noted(1, JobState.QUEUED)
    for one in (running, queued):
        site.workflow(one, "Running")
    site.cluster.squeue_code = 1
    seen = site.look(running, queued)
    assert [one.state for one in seen.values()] == [JobState.RUNNING, JobState.QUEUED]
    assert {one.message for one in seen.values()} == {
        "Cromwell says Running; squeue does not answer on login.hpc.org"
    }
    assert len(site.cluster.calls) == 1


def test_while_squeue_is_away_the_reason_is_waited_for(site: Site) -> None:
    known = site.noted()
    site.workflow(known, "Failed")
    site.cluster.squeue_code = 1
    words = "ended with an error; squeue does not answer on login.hpc.org"
    assert site.look(known)["jid.0"].message == words


@pytest.mark.parametrize(
    ("sacct", "message"),
    [
        ("return 1", "ended with an error; the accounting does not answer"),
        (
            "echo 'Slurm accounting storage is disabled'; return 1",
            "failed in Cromwell: it does not say why",
        ),
        ("exit 3", "ended with an error; the shared disk does not answer on login.hpc.org"),
    ],
    ids=["away", "none", "cut off"],
)
def test_a_site_without_an_answer_of_the_accounting(site: Site, sacct: str, message: str) -> None:
    known = site.noted()
    site.workflow(known, "Failed", call=site.call(known, "700"))
    site.cluster.queue["700"] = "COMPLETED"
    site.cluster.sacct = sacct
    assert site.look(known)["jid.0"].message == message


def test_one_that_slurm_has_forgotten_is_no_outage(site: Site) -> None:
    known = site.noted()
    site.workflow(known, "Running")
    assert site.look(known)["jid.0"].message.startswith(
        "Cromwell says Running, and Slurm does not show it"
    )


def test_what_cromwell_gave_up_while_squeue_is_away_has_not_ended(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "LAGS", 0.0)
    known = site.noted()
    failure = "Unable to determine that 700 is alive, and /x/rc does not exist."
    site.workflow(known, "Failed", failures=[{"message": failure}])
    site.cluster.squeue_code = 1
    assert site.look(known)["jid.0"].state is JobState.RUNNING
    site.cluster.squeue_code = 0
    site.cluster.queue["700"] = "RUNNING"
    assert site.look(known)["jid.0"].state is JobState.RUNNING


def test_what_slurm_killed_ends_though_cromwell_goes_on_calling_it_running(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "LAGS", 1e-9)
    known = site.noted()
    site.workflow(known, "Running")
    site.cluster.account["700"] = "NODE_FAIL"
    first, second = (site.look(known)["jid.0"] for _ in range(2))
    assert first.state is JobState.RUNNING
    assert (second.state, second.message) == (JobState.FAILED, "node failure: n1 went down")


def test_a_state_goes_not_back_when_slurm_queues_a_job_again(site: Site) -> None:
    known = site.noted()
    site.workflow(known, "Running")
    site.cluster.queue["700"] = "PENDING"
    seen = site.look(known)["jid.0"]
    assert seen.state is JobState.RUNNING
    assert seen.message.startswith("waiting: ")


def test_without_a_login_node_slurm_is_not_asked(site: Site) -> None:
    driver = without_slurm(site)
    running, failed = site.noted(0), site.noted(1)
    site.workflow(running, "Running")
    site.workflow(failed, "Failed")
    (site.folder(failed) / "rc").write_text("3\n")
    site.cluster.squeue_code = 1
    seen = driver.observe([running, failed])
    assert "which Cromwell does not tell" in seen["jid.0"].message
    assert seen["jid.1"].message == "exit code 3"
    assert [args[0] for args in site.cluster.calls] == [""]
    driver.close()


def test_without_a_login_node_a_forgotten_job_ends_by_its_exit_code(site: Site) -> None:
    driver = without_slurm(site)
    known = site.noted()
    (site.folder(known) / "rc").write_text("3\n")
    assert driver.observe([known])["jid.0"].message == "exit code 3"
    driver.close()


# forgotten, and not shown yet


def test_a_new_workflow_is_not_shown_yet(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    new = job(state=JobState.QUEUED)
    site.driver.submit([new])
    site.cromwell.workflows[new.engine_id].shown = False
    seen = site.look(new)["jid.0"]
    assert (seen.state, seen.message) == (
        JobState.QUEUED,
        "submitted; Cromwell does not show it yet",
    )
    monkeypatch.setattr(cromwell, "SHOWN_AFTER", 0.0)
    assert site.look(new) == {}


def test_what_cromwell_has_shown_is_not_new(site: Site) -> None:
    new = site.noted(state=JobState.QUEUED)
    site.driver.submit([new])
    del site.cromwell.workflows[new.engine_id]
    site.cluster.queue["700"] = "RUNNING"
    assert site.look(new)["jid.0"].message.endswith("Slurm's job 700")


def test_jobs_that_cromwell_has_forgotten(site: Site) -> None:
    jobs = [site.noted(number) for number in range(4)]
    site.cluster.queue["700"] = "RUNNING"
    (site.folder(jobs[1]) / "rc").write_text("0\n")
    (site.folder(jobs[2]) / "rc").write_text("7\n")
    seen = site.look(*jobs)
    assert {name: one.state for name, one in seen.items()} == {
        "jid.0": JobState.RUNNING,
        "jid.1": JobState.SUCCEEDED,
        "jid.2": JobState.FAILED,
    }
    assert seen["jid.0"].message.endswith("Slurm's job 700")
    assert seen["jid.2"].message == "exit code 7"


# paths


@pytest.mark.parametrize(
    ("paths", "path", "here"),
    [
        ({}, "/a/b/stdout", "/a/b/stdout"),
        ({"/a": "/mnt"}, "/a/b/stdout", "/mnt/b/stdout"),
        ({"/a": "/mnt"}, "/ab/stdout", "/ab/stdout"),
        ({"/a": "/mnt"}, "/x/a/stdout", "/x/a/stdout"),
        ({"/a/": "/mnt"}, "/a/b/stdout", "/mnt/b/stdout"),
        ({"/a": "/mnt/"}, "/a/b/stdout", "/mnt/b/stdout"),
        ({"/a/": "/mnt/"}, "/a/b/stdout", "/mnt/b/stdout"),
        ({"/a": "/one", "/a/b": "/two"}, "/a/b/stdout", "/two/stdout"),
        ({"/a/b": "/two", "/a": "/one"}, "/a/b/stdout", "/two/stdout"),
        ({"/a/b": "/two", "/a": "/one"}, "/a/bc/stdout", "/one/bc/stdout"),
        ({"/a": "/a/a"}, "/a/a/stdout", "/a/a/a/stdout"),
        ({"/": "/mnt"}, "/a/stdout", "/mnt/a/stdout"),
        ({"/a": "/"}, "/a/b/stdout", "/b/stdout"),
    ],
)
def test_cromwells_paths_are_mapped(
    site: Site, paths: Mapping[str, str], path: str, here: str
) -> None:
    driver = CromwellDriver(CromwellServer(site.server.url), site.cluster, paths, asks_slurm=True)
    known = job(slurm="700", stdout=path, stderr=path)
    site.workflow(known, "Failed")
    driver.observe([known])
    assert site.cluster.calls[-1][1:] == ("jid.0", here.removesuffix("/stdout"))
    with pytest.raises(Unavailable):
        driver.logs(known, 10)
    assert site.cluster.calls[-1][:2] == (here, here)
    driver.close()


# logs


def test_logs_are_stdout_and_stderr(site: Site) -> None:
    known = site.noted()
    (site.folder(known) / "stdout").write_text("one\ntwo\nthree")
    (site.folder(known) / "stderr").write_text("four\n")
    (site.folder(known) / "slurm.log").write_text("not asked for\n")
    assert site.driver.logs(known, 10) == "one\ntwo\nthree\nfour\n"
    assert site.driver.logs(known, 2) == "three\nfour\n"
    assert not site.server.requests


def test_logs_are_the_ends_of_both_however_long_a_line_is(site: Site) -> None:
    known = site.noted()
    for name in ("stdout", "stderr"):
        (site.folder(known) / name).write_text("x" * 4 * cromwell.LOG_BYTES + f" end of {name}")
    log = site.driver.logs(known, 10)
    assert re.findall("end of .*", log) == ["end of stdout", "end of stderr"]
    assert len(log) <= cromwell.LOG_BYTES


def test_logs_of_what_never_began_are_those_of_slurm(site: Site) -> None:
    new = job(state=JobState.FAILED)
    site.workflow(new, "Failed", call=site.call(new, ""))
    (site.folder(new) / "stderr.submit").write_text("sbatch: error: no\n")
    assert site.driver.logs(new, 10) == "sbatch: error: no\n"
    assert site.asked == [new.engine_id]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_job_cannot_have_other_files_shown_as_its_log(
    site: Site, tmp_path: Path, name: str, kind: str
) -> None:
    known = site.noted()
    (tmp_path / "pman.env").write_text("API_TOKEN=secret\n")
    file = site.folder(known) / name
    if kind == "link":
        file.symlink_to(tmp_path / "pman.env")
    else:
        os.mkfifo(file)
    assert site.driver.logs(known, 10) == ""


@pytest.mark.parametrize("name", ["rc", "pman-reason", "stderr.submit", "slurm.log"])
def test_a_job_cannot_have_other_files_shown_as_its_reason(
    site: Site, tmp_path: Path, name: str
) -> None:
    known = site.noted()
    (tmp_path / "pman.env").write_text("7\nslurmstepd: error: API_TOKEN=secret oom-kill\n")
    (site.folder(known) / name).symlink_to(tmp_path / "pman.env")
    site.workflow(known, "Failed", failures=[{"message": "Cromwell's own words"}])
    site.cluster.queue["700"] = "COMPLETED"
    assert site.look(known)["jid.0"].message == "failed in Cromwell: Cromwell's own words"


@pytest.mark.parametrize("size", [0, 1, LOG_BYTES // 2, LOG_BYTES])
def test_of_a_long_log_the_end_is_read(site: Site, size: int) -> None:
    known = site.noted()
    (site.folder(known) / "stdout").write_text(f"{'x' * size}\nlast\n")
    text = site.driver.logs(known, 10)
    assert text.endswith("x\nlast\n" if size else "\nlast\n")
    assert len(text) == min(size + len("\nlast\n"), LOG_BYTES // 2 - 1)


def test_a_log_that_cannot_be_there_yet_costs_no_call(site: Site) -> None:
    assert site.driver.logs(job(state=JobState.QUEUED), 10) == ""
    assert site.server.requests == []


def test_the_log_of_what_cromwell_has_forgotten_is_not_empty(site: Site) -> None:
    with pytest.raises(Unavailable, match="Cromwell has forgotten jid, and where its log is"):
        site.driver.logs(job(state=JobState.SUCCEEDED), 10)


def laid_out(site: Site, one: Job) -> Path:
    """Cromwell's own folder of a job, as it lays them out, with a log in it."""
    folder = site.executions / "ChRISJob" / one.engine_id / "call-plugin_instance" / "execution"
    folder.mkdir(parents=True)
    (folder / "stdout").write_text(f"said {one.name}\n")
    return folder


def test_where_one_job_has_its_files_tells_where_the_others_have_theirs(site: Site) -> None:
    other, quick = job(0), job(1, state=JobState.SUCCEEDED)
    files = {"stdout": str(laid_out(site, other) / "stdout"), "slurm": "700"}
    laid_out(site, quick)
    site.workflow(other, "Running")
    site.look(replace(other, notes=files))
    assert site.driver.logs(quick, 10) == "said jid.1\n"


@pytest.mark.parametrize("asks_slurm", [True, False])
def test_what_was_forgotten_before_it_was_noted_is_found(site: Site, asks_slurm: bool) -> None:
    """By Slurm's name of it, and by Cromwell's folder of it."""
    driver = site.driver if asks_slurm else without_slurm(site)
    other, lost, never = job(0), job(1), job(2)
    files = {"stdout": str(laid_out(site, other) / "stdout"), "slurm": "700"}
    (laid_out(site, lost) / "rc").write_text("6\n")
    site.cluster.queue = {"700": "RUNNING", "701": "FAILED"}
    site.cluster.names = {"701": cromwell.slurm_name(lost.engine_id)}
    site.workflow(other, "Running")
    seen = driver.observe([replace(other, notes=files), lost, never])
    assert (seen["jid.1"].state, seen["jid.1"].message) == (JobState.FAILED, "exit code 6")
    assert seen["jid.1"].notes["stdout"].endswith("/execution/stdout")
    assert seen["jid.1"].notes.get("slurm") == ("701" if asks_slurm else None)
    assert "jid.2" not in seen


def test_a_forgotten_job_that_was_not_noted_is_cancelled(site: Site) -> None:
    lost = job()
    site.cluster.queue = {"701": "RUNNING"}
    site.cluster.names = {"701": cromwell.slurm_name(lost.engine_id)}
    assert "701 has not ended yet" in site.driver.remove([lost])["jid.0"]
    assert site.cluster.cancelled == ["701"]


def test_what_was_not_noted_is_not_lost_while_slurm_cannot_be_asked(site: Site) -> None:
    """For LOST_AFTER only time counts in which everybody answers."""
    site.cluster.squeue_code = 1
    seen = site.look(job())["jid.0"]
    assert seen.state is JobState.RUNNING
    assert "squeue does not answer" in seen.message
    with pytest.raises(Unavailable):
        site.driver.remove([job()])


def test_without_slurm_a_forgotten_job_is_never_called_lost(site: Site) -> None:
    known = site.noted()
    seen = without_slurm(site).observe([known])["jid.0"]
    assert seen.state is JobState.RUNNING
    assert "only its exit code can tell its end" in seen.message


def test_an_id_that_slurm_gave_to_another_job_is_not_followed(site: Site) -> None:
    known = site.noted()
    site.cluster.queue = {"700": "RUNNING"}
    site.cluster.names = {"700": "cromwell_01234567_plugin_instance"}
    assert site.look(known) == {}
    assert site.driver.remove([known]) == {}
    assert site.cluster.cancelled == []


def test_a_job_that_sbatch_took_without_saying_so_is_followed(site: Site) -> None:
    new = job(state=JobState.QUEUED)
    site.workflow(new, "Failed", call=site.call(new, ""))
    (site.folder(new) / "stderr.submit").write_text("sbatch: error: Socket timed out\n")
    assert site.look(new)["jid.0"].state is JobState.QUEUED
    site.cluster.queue = {"701": "RUNNING"}
    site.cluster.names = {"701": cromwell.slurm_name(new.engine_id)}
    seen = site.look(new)["jid.0"]
    assert (seen.state, seen.notes["slurm"]) == (JobState.QUEUED, "701")


def test_a_job_that_slurm_keeps_a_row_of_and_refused_is_refused(site: Site) -> None:
    new = job(state=JobState.QUEUED)
    site.workflow(new, "Failed", call=site.call(new, ""))
    (site.folder(new) / "stderr.submit").write_text("sbatch: error: No such node\n")
    site.cluster.queue = {"701": "FAILED"}
    site.cluster.nodes = ""
    site.cluster.names = {"701": cromwell.slurm_name(new.engine_id)}
    assert site.look(new)["jid.0"].message == "refused by Slurm: No such node"


def test_requests_that_hang_hold_up_neither_a_look_nor_a_removal(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cromwell, "ROUND_SECONDS", 0.0)
    jobs = [job(number, state=JobState.QUEUED) for number in range(20)]
    for one in jobs:
        site.workflow(one, "Running", metadata=html(504), abort=html(504))
    site.look(*jobs)
    assert len(site.asked) <= 1
    site.server.requests.clear()
    assert {*site.driver.remove(jobs)} == {one.name for one in jobs}
    assert len(site.aborted) <= 1


def test_a_link_in_the_place_of_the_folder_is_not_followed(site: Site, tmp_path: Path) -> None:
    known = site.noted()
    folder = site.folder(known)
    folder.rmdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "stdout").write_text("somebody else's\n")
    (tmp_path / "other" / "rc").write_text("3\n")
    folder.symlink_to(tmp_path / "other")
    with pytest.raises(Unavailable, match="is not there"):
        site.driver.logs(known, 10)
    assert site.look(known) == {}


@pytest.mark.parametrize(("known", "text"), [("stdout", "words\n"), ("stderr", "")])
def test_logs_with_half_of_the_metadata(site: Site, known: str, text: str) -> None:
    new = job(state=JobState.FAILED)
    call = site.call(new, "700")
    (site.folder(new) / known).write_text("words\n")
    site.workflow(new, "Running", call={known: call[known]})
    assert site.driver.logs(new, 10) == text


# submit and find


def test_jobs_are_submitted_in_their_order(site: Site) -> None:
    jobs = [job(number) for number in (2, 0, 1)]
    outcomes = site.driver.submit(jobs)
    assert outcomes == {one.name: one.engine_id for one in jobs}
    labels = [json.loads(one.parts["labels"]) for one in site.server.asked(WORKFLOWS)]
    assert labels == [{"site": "hpc", LABEL: one.name} for one in jobs]
    assert site.driver.submit(jobs) == outcomes  # they run once


def test_no_label_of_a_job_takes_the_place_of_the_one_it_is_found_by(site: Site) -> None:
    one = job()
    one = replace(one, spec=replace(one.spec, labels={LABEL: "other"}))
    site.driver.submit([one])
    assert site.driver.find([one]) == {one.name: one.engine_id}


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (html(502), Ambiguous),
        (html(429), Unavailable),
        (fail(400, "db - no connection"), Ambiguous),
    ],
)
def test_after_an_outage_the_rest_is_not_tried(
    site: Site, reply: Reply, kind: type[EngineError]
) -> None:
    jobs = [job(number) for number in range(4)]
    site.cromwell.submit["jid.1"] = reply
    outcomes = site.driver.submit(jobs)
    assert outcomes["jid.0"] == jobs[0].engine_id
    assert type(outcomes["jid.1"]) is kind
    assert [type(outcomes[f"jid.{number}"]) for number in (2, 3)] == [Unavailable, Unavailable]
    summaries = {one.summary for one in outcomes.values() if isinstance(one, EngineError)}
    assert len(summaries) == 1
    assert len(site.server.asked(WORKFLOWS)) == 2


def test_one_that_cannot_be_submitted_keeps_no_other(site: Site) -> None:
    jobs = [job(number) for number in range(3)]
    site.cromwell.submit["jid.0"] = fail(500, "an error that this document causes")
    site.driver.submit(jobs)
    outcomes = site.driver.submit(jobs)
    assert isinstance(outcomes["jid.0"], Ambiguous)
    assert [outcomes[one.name] for one in jobs[1:]] == [one.engine_id for one in jobs[1:]]


def test_a_refusal_is_about_one_job(site: Site) -> None:
    jobs = [job(number) for number in range(3)]
    site.cromwell.submit["jid.1"] = fail(400, "Error(s): Invalid label")
    outcomes = site.driver.submit(jobs)
    assert type(outcomes["jid.1"]) is Rejected
    assert outcomes["jid.2"] == jobs[2].engine_id


def test_what_was_submitted_is_found_by_its_label(site: Site) -> None:
    jobs = [job(number) for number in range(3)]
    site.driver.submit(jobs[:2])
    site.server.requests.clear()
    assert site.driver.find(jobs) == {one.name: one.engine_id for one in jobs[:2]}
    assert len(site.server.requests) == 1


def test_an_old_version_is_waited_for(site: Site) -> None:
    site.cromwell.version = "74-1234567"
    (id,) = site.driver.submit([job()]).values()
    site.cromwell.workflows[str(id)].shown = False

    def shows_later(request: Request) -> Reply:
        reply = site.cromwell(request)
        if request.path == QUERY:
            site.cromwell.workflows[str(id)].shown = True
        return reply

    site.server.answers = shows_later
    (shown,) = site.driver.submit([job(1)]).values()
    assert site.driver.find([job(), job(1)]) == {"jid.0": id, "jid.1": shown}
    assert len(site.server.asked(QUERY)) == 2


def test_an_old_version_is_not_waited_for_for_ever(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cromwell, "SHOWN_AT_LAST", 0.5)
    site.cromwell.version = "74-1234567"
    assert site.driver.find([job()]) == {}
    assert 1 < len(site.server.asked(QUERY)) < 10


def test_an_old_version_runs_a_job_twice_if_it_is_asked_to(site: Site) -> None:
    """Why it is looked for by its label first."""
    site.cromwell.version = "74-1234567"
    first, second = (site.driver.submit([job()])["jid.0"] for _ in range(2))
    assert first != second


# remove


def test_what_is_aborted_stays_until_it_is(site: Site) -> None:
    known = site.noted()
    flow = site.workflow(known, "Running")
    site.cluster.queue["700"] = "RUNNING"
    for _ in range(2):
        assert site.driver.remove([known]) == {"jid.0": "Cromwell is aborting it"}
        assert flow.status == "Aborting"
    flow.status, site.cluster.queue["700"] = "Aborted", "CANCELLED"
    assert site.driver.remove([known]) == {}
    assert not site.cluster.cancelled


@pytest.mark.parametrize("status", ["Submitted", "On Hold"])
def test_what_has_not_begun_is_gone_at_once(site: Site, status: str) -> None:
    known = job()
    flow = site.workflow(known, status)
    assert site.driver.remove([known]) == {}
    assert flow.status == "Aborted"


def test_what_is_not_shown_yet_is_aborted(site: Site) -> None:
    known = job()
    flow = site.workflow(known, "Submitted", shown=False)
    assert site.driver.remove([known]) == {}
    assert flow.status == "Aborted"


def test_what_cromwell_does_not_know_is_gone(site: Site) -> None:
    assert site.driver.remove([job()]) == {}
    assert site.aborted == [job().engine_id]


@pytest.mark.parametrize("status", ["Succeeded", "Failed", "Aborted"])
def test_what_has_ended_is_not_aborted(site: Site, status: str) -> None:
    site.workflow(job(), status)
    assert site.driver.remove([job()]) == {}
    assert not site.aborted


@pytest.mark.parametrize("state", [state for state in JobState if state.final])
def test_of_a_job_that_has_ended_nothing_is_asked(site: Site, state: JobState) -> None:
    assert site.driver.remove([replace(site.noted(), state=state)]) == {}
    assert not site.server.requests
    assert not site.cluster.calls


@pytest.mark.parametrize("status", ["Aborted", "Failed", None])
@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "COMPLETING"])
def test_what_is_left_on_slurm_is_cancelled(site: Site, status: str | None, state: str) -> None:
    known, other = site.noted(0), site.noted(1)
    for one in (known, other):
        if status:
            site.workflow(one, status)
    site.cluster.queue |= {"700": state, "701": "CANCELLED"}
    stay = site.driver.remove([known, other])
    assert stay == {"jid.0": "Slurm's job 700 has not ended yet"}
    assert site.cluster.cancelled == ["700"]
    site.cluster.queue["700"] = "CANCELLED"
    assert site.driver.remove([known, other]) == {}


def test_what_is_left_on_slurm_is_found_by_the_metadata(site: Site) -> None:
    known = job()
    site.workflow(known, "Aborted", call={"jobId": "700"})
    site.cluster.queue["700"] = "RUNNING"
    assert [*site.driver.remove([known])] == ["jid.0"]
    assert site.cluster.cancelled == ["700"]


def test_why_a_job_is_not_cancelled_is_told(site: Site) -> None:
    known = site.noted()
    site.cluster.queue["700"] = "RUNNING"
    site.cluster.scancel = "echo 'scancel: error: Access denied' >&2; return 1"
    (why,) = site.driver.remove([known]).values()
    assert why.endswith("has not ended yet: scancel: error: Access denied")


@pytest.mark.parametrize("version", ["92", "74"])
def test_a_job_that_may_have_been_submitted_is_aborted(site: Site, version: str) -> None:
    site.cromwell.version = version
    known = job(state=JobState.SUBMITTING)
    (id,) = site.driver.submit([known]).values()
    assert isinstance(id, str)
    assert site.driver.remove([replace(known, engine_id="")]) == {}
    assert site.cromwell.workflows[id].status == "Aborted"


@pytest.mark.parametrize(("version", "may_be_there"), [("92", [job().engine_id]), ("74", [])])
def test_a_job_that_was_not_submitted_is_gone(
    site: Site, monkeypatch: pytest.MonkeyPatch, version: str, may_be_there: list[str]
) -> None:
    monkeypatch.setattr(cromwell, "SHOWN_AT_LAST", 0.0)
    site.cromwell.version = version
    known = job(1)
    site.workflow(known, "Running")
    assert [*site.driver.remove([replace(job(), engine_id=""), known])] == [known.name]
    assert site.aborted == [*may_be_there, known.engine_id]


def test_one_that_cannot_be_aborted_keeps_no_other(site: Site) -> None:
    bad, good = job(0), job(1)
    words = f"Unable to update workflow store to abort {bad.engine_id}"
    site.workflow(bad, "Submitted", abort=fail(500, words, "error"))
    flow = site.workflow(good, "Submitted")
    assert [*site.driver.remove([bad, good])] == ["jid.0"]
    assert flow.status == "Aborted"


def test_one_whose_metadata_cannot_be_read_keeps_no_other_from_its_end(site: Site) -> None:
    bad, good = job(0), site.noted(1)
    site.workflow(bad, "Aborted", metadata=html(500))
    site.workflow(good, "Aborted")
    site.cluster.queue["701"] = "RUNNING"
    assert {*site.driver.remove([bad, good])} == {"jid.0", "jid.1"}
    assert site.cluster.cancelled == ["701"]


def test_a_job_whose_removal_is_in_doubt_is_not_gone(site: Site) -> None:
    known = site.noted()
    site.server.answers = lambda request: rejection(404, "The requested resource is not found.")
    with pytest.raises(Unavailable):
        site.driver.remove([known])


def test_what_it_holds_is_let_go_of(site: Site) -> None:
    site.driver.close()
    assert site.cluster.closed


# the parser


def test_what_cromwells_parser_says(site: Site) -> None:
    verdict = site.driver.test([job()])["jid.0"]
    assert not verdict.accepted
    assert verdict.message == "Cromwell's parser says: line 3"
