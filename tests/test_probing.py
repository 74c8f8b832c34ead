"""The jobs of `pman check`: what is sent, what engines say of it, and test jobs on engines that
don't behave. Those that run on this machine are in test_check.py."""

import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pman import probing
from pman.drivers.local import LocalDriver
from pman.errors import Ambiguous, EngineError, Unavailable
from pman.jobs import Finding, Job, JobSpec, JobState, Observation, Severity, Verdict
from pman.samples import Sample
from pman.settings import Settings
from pman.sources import Sources
from pman.worker import Worker

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR


def slurm(tmp_path: Path, **values: Any) -> Settings:
    return Settings(**{"container_env": "slurm", "storebase": tmp_path, **values})


def worst(findings: Iterable[Finding]) -> Finding:
    return max(findings, key=lambda finding: (OK, WARNING, ERROR).index(finding.severity))


class Engine(LocalDriver):
    """An engine that does as it is told, and keeps what it was asked to remove."""

    def __init__(self, **answers: Any) -> None:
        super().__init__()
        self.answers = answers
        self.removed: list[str] = []

    def _answer(self, call: str, jobs: Sequence[Job]) -> Any:
        answer = self.answers.get(call)
        if isinstance(answer, EngineError):
            raise answer
        return {job.name: answer for job in jobs} if answer is not None else {}

    def test(self, jobs: Sequence[Job]) -> Mapping[str, Verdict]:
        answer = self.answers["test"]
        if isinstance(answer, EngineError):
            raise answer
        return {job.name: answer[job.name] for job in jobs}

    def submit(self, jobs: Sequence[Job]) -> Mapping[str, str | EngineError]:
        return self._answer("submit", jobs) or {job.name: "17" for job in jobs}

    def observe(self, jobs: Sequence[Job]) -> Mapping[str, Observation]:
        answer: Mapping[str, Observation] = self._answer("observe", jobs)
        return answer

    def logs(self, job: Job, tail: int) -> str:
        log = self._answer("logs", [job])
        return str(log.get(job.name, ""))

    def remove(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        self.removed += [job.name for job in jobs]
        answer: Mapping[str, str] = self._answer("remove", jobs)
        return answer


# --- what test jobs are ---


RUNTIMES = ["apptainer", "bare", "charliecloud", "podman", "pyxis", "sarus", "shifter"]


@pytest.mark.parametrize("template", RUNTIMES)
def test_the_probe_is_the_sites_template_but_for_what_it_runs(
    clean_environment: None, tmp_path: Path, template: str
) -> None:
    settings = slurm(tmp_path, template=template)
    site = "setup: module load it\nimages: {'*': /i.sif}\npartition: debug\n"
    with Worker(Sources(site=site)) as worker:
        (job,) = probing.probes(settings, worker)
        sent = worker.render(job.spec, "sbatch", template).text
    before, runs = sent.split("\nrun() {\n")
    assert job.document.text.startswith(before)
    assert runs.split("\n}\n")[-1] == job.document.text.split("\n}\n")[-1]
    assert "--time=0-00:01:00" in before
    assert "/share/outgoing" not in job.document.text
    subprocess.run(["bash", "-n"], input=job.document.text, text=True, check=True)


def test_each_rule_of_site_file_has_a_probe_of_its_own(
    clean_environment: None, tmp_path: Path
) -> None:
    rules = (
        "rules:\n- {match: {gpu: true}, set: {partition: gpu}}\n"
        "- {match: {auid: x}, template: podman}\n"
        "- {match: {type: fs}, template: mine}\n"
    )
    own = {"sbatch/mine.sbatch.j2": "{{ fail('no fs here') }}"}
    with Worker(Sources(own, rules)) as worker:
        plain, gpu, podman = probing.probes(slurm(tmp_path), worker)
    assert [job.jid for job in (plain, gpu, podman)] == [
        "pman-check",
        "pman-check-rule-1",
        "pman-check-rule-2",
    ]
    assert len({job.name for job in (plain, gpu, podman)}) == 3
    assert "--partition=gpu\n" in gpu.document.text
    assert "runtime=(podman)" in podman.document.text


def test_the_probes_are_bounded(clean_environment: None, tmp_path: Path) -> None:
    rules = "rules:\n" + "- {match: {gpu: true}, set: {partition: gpu}}\n" * probing.PROBES
    with Worker(Sources(site=rules)) as worker:
        assert len(probing.probes(slurm(tmp_path), worker)) == probing.PROBES


def test_a_probe_is_of_its_rules_template_though_a_later_rule_fits_it_too(
    clean_environment: None, tmp_path: Path
) -> None:
    rules = "- {match: {gpu: true}, template: podman}\n- {match: {type: ds}, template: bare}\n"
    with Worker(Sources(site=f"rules:\n{rules}")) as worker:
        _, gpu, _ = probing.probes(slurm(tmp_path), worker)
    assert "runtime=(podman)" in gpu.document.text


# --- what the engine says of documents ---


RULES = (
    "rules:\n- {match: {gpu: true}, template: podman}\n"
    "- {match: {type: fs}, template: mine}\n- {match: {type: ds}, template: bare}\n"
)


@pytest.fixture
def asked(clean_environment: None, tmp_path: Path) -> Iterator[Mapping[str, tuple[Sample, Job]]]:
    own = {"sbatch/mine.sbatch.j2": "{{ fail('no fs here') }}"}
    with Worker(Sources(own, RULES)) as worker:
        yield probing.sample_jobs(slurm(tmp_path), worker)


def test_each_sample_is_asked_about_as_its_rule_would_send_it(
    asked: Mapping[str, tuple[Sample, Job]],
) -> None:
    """But for the rule whose jobs the template refuses: they are not sent."""
    assert [(sample.rule, job.document.template) for sample, job in asked.values()] == [
        (0, "bare"),
        (1, "podman"),
        (3, "bare"),
    ]
    for name, (_, job) in asked.items():
        assert f"#SBATCH --job-name={name}\n" in job.document.text


def test_what_the_scheduler_says_of_each(asked: Mapping[str, tuple[Sample, Job]]) -> None:
    plain, gpu, late = asked
    verdicts = {
        plain: Verdict(accepted=True, message="it would start"),
        gpu: Verdict(accepted=False, message="refused by Slurm: no such partition"),
        late: Verdict(accepted=True, message="yes", warnings=("it waits", "it is dear")),
    }
    found = list(probing.of_verdicts(Engine(test=verdicts), asked))
    assert [(finding.severity, finding.text) for finding in found] == [
        (OK, "a plain job is accepted: it would start"),
        (
            ERROR,
            "a job that fits rule 1 of SITE_FILE (line 2) is refused: refused by Slurm: no such "
            "partition",
        ),
        (WARNING, "a job that fits rule 3 of SITE_FILE (line 4) is accepted, and it waits"),
        (WARNING, "a job that fits rule 3 of SITE_FILE (line 4) is accepted, and it is dear"),
    ]
    assert "sinfo" in found[1].remedy


def test_a_scheduler_that_cannot_be_asked_is_a_warning(
    asked: Mapping[str, tuple[Sample, Job]],
) -> None:
    (finding,) = probing.of_verdicts(Engine(test=Unavailable("slurmctld is away")), asked)
    assert finding.severity is WARNING
    assert finding.text == "it could not be asked for: slurmctld is away"


# --- test jobs, on engines that don't behave ---


@pytest.fixture
def job(settings: Settings) -> Job:
    with Worker(Sources()) as worker:
        (probe,) = probing.probes(settings, worker)
    return probe


def run(engine: Engine, *jobs: Job, within: float = 0.2) -> list[Finding]:
    found = list(probing.run(engine, jobs, 0.01, threading.Event(), within))
    assert {*engine.removed} == {job.name for job in jobs}
    return found


def test_a_job_that_waits_says_for_what(job: Job) -> None:
    waits = Observation(JobState.QUEUED, "waiting: Resources (for free nodes)")
    (finding,) = run(Engine(observe=waits), job)
    assert finding.severity is WARNING
    assert finding.text == "not at its end after 0.2 s: waiting: Resources (for free nodes)"
    assert "squeue --start" in finding.remedy


@pytest.mark.parametrize(
    ("answers", "severity", "words"),
    [
        ({"submit": Unavailable("no way")}, ERROR, "not submitted: no way"),
        ({"submit": Ambiguous("cut off")}, ERROR, "not submitted: cut off"),
        ({"observe": Unavailable("squeue is away")}, WARNING, "0.2 s: squeue is away"),
        ({}, WARNING, "0.2 s: not seen yet"),
        (
            {"observe": Observation(JobState.FAILED, "out"), "logs": Unavailable("disk away")},
            ERROR,
            "out; its log ends with: disk away",
        ),
    ],
)
def test_engines_in_trouble(
    job: Job, answers: dict[str, Any], severity: Severity, words: str
) -> None:
    (finding,) = run(Engine(**answers), job)
    assert finding.severity is severity
    assert words in finding.text


@pytest.mark.parametrize("answer", ["busy", Unavailable("busy")])
@pytest.mark.parametrize(
    ("engine", "remedy"),
    [
        ("slurm", "scancel --name={job.name}; rm -r {job.spec.folder}"),
        ("local", "rm -r {job.spec.folder}"),
        (
            "cromwell",
            "abort the workflow with the label org.chrisproject.pman.name={job.name} (POST "
            "CROMWELL_URL/api/workflows/v1/ID/abort), and scancel its Slurm job",
        ),
    ],
)
def test_what_cannot_be_removed_is_told_with_the_way_to_do_it(
    job: Job, answer: Any, engine: str, remedy: str
) -> None:
    *_, finding = run(Engine(remove=answer), replace(job, engine=engine))
    assert (finding.severity, finding.text) == (WARNING, "it could not be removed: busy")
    assert finding.remedy == remedy.format(job=job)


def test_what_takes_its_time_to_go_is_removed_again_until_it_is_gone(job: Job) -> None:
    class Slow(Engine):
        def remove(self, jobs: Sequence[Job]) -> Mapping[str, str]:
            self.removed += [job.name for job in jobs]
            return {job.name: "it is being aborted" for job in jobs if len(self.removed) < 3}

    engine = Slow(observe=Observation(JobState.FAILED, "out"))
    found = probing.run(engine, [job], 0.01, threading.Event())
    assert [finding.text for finding in found] == ["out"]
    assert engine.removed == [job.name] * 3


def test_a_driver_gets_back_what_it_noted_and_how_it_saw_the_job_last(job: Job) -> None:
    class Noting(Engine):
        def observe(self, jobs: Sequence[Job]) -> Mapping[str, Observation]:
            (job,) = jobs
            looks = str(len(job.notes.get("looks", "")))
            state = JobState.FAILED if looks == "2" else JobState.RUNNING
            return {job.name: Observation(state, looks, notes={"looks": "x" * (int(looks) + 1)})}

        def logs(self, job: Job, tail: int) -> str:
            return f"read with {job.notes}"

        def remove(self, jobs: Sequence[Job]) -> Mapping[str, str]:
            self.left = [(job.state, job.engine_id, job.notes) for job in jobs]
            return {}

    engine = Noting()
    (finding,) = probing.run(engine, [job], 0.01, threading.Event(), within=5)
    assert finding.text == "2; its log ends with: read with {'looks': 'xxx'}"
    assert engine.left == [(JobState.FAILED, "17", {"looks": "xxx"})]


def test_what_was_sent_and_never_seen_is_removed_by_its_id(job: Job) -> None:
    class Watching(Engine):
        def remove(self, jobs: Sequence[Job]) -> Mapping[str, str]:
            self.left = [(job.state, job.engine_id) for job in jobs]
            return {}

    engine = Watching()
    assert len(list(probing.run(engine, [job], 0.01, threading.Event(), within=0))) == 1
    assert engine.left == [(JobState.QUEUED, "17")]


def test_several_jobs_go_out_together_and_each_is_told(job: Job) -> None:
    other = replace(job, spec=replace(job.spec, jid="other", name="other.1"))
    failed = Observation(JobState.FAILED, "exit code 3")
    found = run(Engine(observe=failed), job, other)
    assert [finding.subject for finding in found] == [job.jid, "other"]


def test_nothing_is_begun_once_it_was_stopped(job: Job) -> None:
    stopped = threading.Event()
    stopped.set()
    engine = Engine()
    assert list(probing.run(engine, [job], 0.01, stopped)) == []
    assert engine.removed == []


def test_jobs_are_removed_when_nobody_listens_any_more(job: Job) -> None:
    engine = Engine(observe=Observation(JobState.FAILED, "out"))
    findings = probing.run(engine, [job], 0.01, threading.Event())
    next(findings)
    del findings
    assert engine.removed == [job.name]


# --- what a node tells ---

LOG = "noise\nnode=n1\nclock=1000\nbash=5.2\nwritable=yes\nscratch=/tmp\nfree=4194304\n"


@pytest.fixture
def ended(spec: JobSpec, job: Job) -> Job:
    return replace(job, spec=spec, state=JobState.SUCCEEDED)


@pytest.fixture
def spec(job: Job) -> JobSpec:
    return replace(job.spec, output_dir="/data")


def test_a_node_where_all_is_well(ended: Job) -> None:
    found = list(probing.of_end(ended, LOG, 990, 1003))
    assert [(finding.severity, finding.subject) for finding in found] == [
        (OK, "pman-check"),
        (OK, "STOREBASE"),
        (OK, "clock"),
        (OK, "scratch folder"),
    ]


@pytest.mark.parametrize(
    ("line", "severity", "words"),
    [
        ("clock=1060", WARNING, "that of n1 is 57 s ahead of"),
        ("clock=900", WARNING, "that of n1 is 90 s behind"),
        ("writable=mktemp: Read-only file system", ERROR, "/data can't be written on n1: mktemp"),
        ("free=1000", WARNING, "/tmp on n1 has 1 MiB free"),
        ("free=0", ERROR, "/tmp on n1 has 0 MiB free"),
    ],
)
def test_what_is_wrong_with_a_node(ended: Job, line: str, severity: Severity, words: str) -> None:
    found = worst(probing.of_end(ended, f"{LOG}{line}\n", 990, 1003))
    assert found.severity is severity
    assert words in found.text
    assert found.remedy
