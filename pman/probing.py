"""The jobs of `pman check`: those that the engine is only asked about, and those of `deep`, which
run and are removed again."""

import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from pman import findings
from pman.drivers import Driver
from pman.errors import EngineError, Refusal
from pman.jobs import Finding, Job, JobState, Severity
from pman.samples import Sample
from pman.settings import Settings
from pman.templates import plain_spec, probe_by, render_by
from pman.worker import Worker

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR

PROBES = 8
"""Test jobs of `deep`, at the most."""

TEST_SECONDS = 180.0
"""How long the jobs of `deep` may take, waiting included."""

REMOVAL_SECONDS = 45.0
"""How long their removal may take: Cromwell ends jobs up to 30 s after it was told to."""


# --- what the engine says of documents ---


def sample_jobs(settings: Settings, worker: Worker) -> Mapping[str, tuple[Sample, Job]]:
    """Jobs that are only asked about, by their names: a plain one, and one for each rule."""
    found = {}
    for number, sample in enumerate(worker.samples(plain_spec(settings))):
        if sample.extreme:
            continue
        spec = replace(sample.spec, name=f"{sample.spec.name}-{number}")
        try:
            document = render_by(worker, settings, spec, sample.template)
        except Refusal:  # it is meant not to be sent
            continue
        job = Job(spec, document, content="", engine=settings.container_env)
        found[job.name] = sample, job
    return found


_REFUSED = {
    "slurm": "compare SITE_FILE with `sinfo -s` and `sacctmgr show associations`",
    "cromwell": "mend the template, or the values in SITE_FILE that it takes",
}
"""What to do when an engine refuses a document that it is only asked about."""


def of_verdicts(driver: Driver, jobs: Mapping[str, tuple[Sample, Job]]) -> Iterator[Finding]:
    """What the engine says of a plain job, and of one for each rule of SITE_FILE."""
    try:
        verdicts = driver.test([job for _, job in jobs.values()])
    except EngineError as error:
        yield Finding(WARNING, "verdict", f"it could not be asked for: {error}", "try again")
        return
    for name, (sample, job) in jobs.items():
        verdict = verdicts[name]
        if not verdict.accepted:
            text = f"{sample.what} is refused: {verdict.message}"
            yield Finding(ERROR, "verdict", text, _REFUSED.get(job.engine, ""))
        for warning in verdict.warnings:
            yield Finding(WARNING, "verdict", f"{sample.what} is accepted, and {warning}")
        if verdict.accepted and not verdict.warnings:
            yield Finding(OK, "verdict", f"{sample.what} is accepted: {verdict.message}")


# --- test jobs ---


def probes(settings: Settings, worker: Worker) -> list[Job]:
    """Jobs of one minute that look at their nodes: a plain one, and one for each rule of SITE_FILE.

    They do all that the site's templates do but `run`.
    """
    storebase = str(settings.storage)
    plain = replace(plain_spec(settings), time_limit=1)
    jobs = []
    for sample in worker.samples(plain):
        if sample.extreme:
            continue
        jid = f"pman-check-rule-{sample.rule}" if sample.rule else "pman-check"
        name = f"{jid}.{plain.name.rpartition('.')[2]}"
        spec = replace(
            sample.spec,
            jid=jid,
            name=name,
            folder=str(settings.jobs_folder / name),
            input_dir=storebase,
            output_dir=storebase,
        )
        try:
            document = probe_by(worker, settings, replace(sample, spec=spec))
        except Refusal:  # such jobs are meant not to be sent
            continue
        jobs.append(Job(spec, document, content="", engine=settings.container_env))
    return jobs[:PROBES]


def run(
    driver: Driver,
    jobs: Sequence[Job],
    poll_interval: float,
    stopped: threading.Event,
    within: float = TEST_SECONDS,
) -> Iterator[Finding]:
    """Run the jobs of `probe` for real, all at once, and remove them, however this ends.

    What does not end ``within`` seconds, or before ``stopped`` is set, is told as it is by then.
    """
    if stopped.is_set() or not jobs:
        return
    left: list[Finding] = []
    last = {job.name: job for job in jobs}
    try:
        yield from _ends(driver, last, poll_interval, stopped, within)
    finally:
        left = _remove(driver, last, poll_interval, min(within, REMOVAL_SECONDS))
    yield from left


def _ends(
    driver: Driver,
    last: dict[str, Job],
    poll_interval: float,
    stopped: threading.Event,
    within: float,
) -> Iterator[Finding]:
    """Keeps in ``last``, by their names, how the jobs were seen last."""
    began = time.time()
    sent = [replace(job, accepted_at=datetime.now(UTC)) for job in last.values()]
    try:
        outcomes = driver.submit(sent)
    except EngineError as error:
        outcomes = {job.name: error for job in sent}
    going = {}
    for job in sent:
        outcome = outcomes[job.name]
        if isinstance(outcome, str):
            going[job.name] = replace(job, state=JobState.QUEUED, engine_id=outcome)
        else:
            yield Finding(ERROR, job.jid, f"not submitted: {outcome}", _remedy(str(outcome)))
    last |= going
    doubt = ""
    while going and time.time() - began < within and not stopped.wait(poll_interval):
        try:
            seen = driver.observe([*going.values()])
            doubt = ""
        except EngineError as error:
            doubt = str(error)
            continue
        for name, observation in seen.items():
            going[name] = last[name] = job = replace(
                going[name],
                state=observation.state,
                message=observation.message,
                engine_id=observation.engine_id or going[name].engine_id,
                started_at=observation.started_at or going[name].started_at,
                notes=observation.notes,
            )
            if job.state.final:
                yield from of_end(job, _log(driver, going.pop(name)), began, time.time())
    for job in going.values():
        why = "stopped" if stopped.is_set() else f"not at its end after {within:g} s"
        text = f"{why}: {doubt or job.message or 'not seen yet'}"
        yield Finding(WARNING, job.jid, text, "" if stopped.is_set() else _remedy(text))


def _log(driver: Driver, job: Job) -> str:
    try:
        return driver.logs(job, 20)
    except EngineError as error:
        return str(error)


def of_end(job: Job, log: str, began: float, ended: float) -> Iterator[Finding]:
    """What an ended job of `probe` tells of its node; it ran between these two of our times."""
    facts = dict(re.findall(r"^(node|clock|bash|writable|scratch|free)=(.*)$", log, re.M))
    if job.state is not JobState.SUCCEEDED:
        lines = [line for line in log.splitlines() if line.strip() and job.message not in line]
        last = "; ".join(lines[-3:])
        text = f"{job.message}; its log ends with: {last}" if last else job.message
        yield Finding(ERROR, job.jid, text, _remedy(job.message))
        return
    if not facts:
        text = "it ran, and did not look at its node: does the template extend base?"
        yield Finding(WARNING, job.jid, text, "see docs/templates.md")
        return
    yield Finding(OK, job.jid, f"ran on {facts['node']} with bash {facts['bash']}")
    yield from of_node(facts, job.spec.output_dir, began, ended)


def of_node(
    facts: Mapping[str, str], storebase: str, began: float, ended: float
) -> Iterator[Finding]:
    node = facts["node"]
    if facts["writable"] == "yes":
        yield Finding(OK, "STOREBASE", f"{storebase} can be written on {node}")
    else:
        text = f"{storebase} can't be written on {node}: {facts['writable']}"
        yield Finding(ERROR, "STOREBASE", text, f"have it mounted read-write on {node}")
    clock = float(facts["clock"])
    yield findings.clock(node, clock - began, clock - ended)
    if facts["free"].isdecimal():
        what = f"{facts['scratch']} on {node}"
        yield findings.space(int(facts["free"]), "scratch folder", what)


_REMEDIES = (
    (
        "is not mounted at /share/",
        "compare `submit-docker` of Cromwell's configuration with docs/cromwell.md",
    ),
    (
        "the (in|out)put folder",
        "have STOREBASE mounted there, or leave such nodes out: `constraint` or "
        "`directives` in SITE_FILE",
    ),
    ("is not on the node", "install it there, or load it by `setup` in SITE_FILE"),
    ("scratch folder", "TMPDIR of the nodes must be a folder that the account can write"),
    ("refused by Slurm", _REFUSED["slurm"]),
    ("failed in Cromwell", "see Cromwell's own log, and docs/cromwell.md"),
    ("will not start unless", "compare SITE_FILE with `scontrol show partition`"),
    (
        "Cromwell has not started it",
        "see new-workflow-poll-rate and max-workflow-launch-count in Cromwell's configuration",
    ),
    ("waiting: ", "try again when the cluster is less busy, or see `squeue --start`"),
)
"""What to do, by what a test job's message holds; the first pattern that fits."""


def _remedy(message: str) -> str:
    return next((remedy for words, remedy in _REMEDIES if re.search(words, message)), "")


_BY_HAND = {
    "slurm": "scancel --name={job.name}; rm -r {job.spec.folder}",
    "cromwell": "abort the workflow with the label org.chrisproject.pman.name={job.name} (POST "
    "CROMWELL_URL/api/workflows/v1/ID/abort), and scancel its Slurm job",
    "local": "rm -r {job.spec.folder}",
}
"""How to end and remove a job by hand."""


def _remove(
    driver: Driver, jobs: Mapping[str, Job], poll_interval: float, within: float
) -> list[Finding]:
    """What of the jobs is left, after ``within`` seconds."""
    until = time.monotonic() + within
    stay: Mapping[str, str] = dict.fromkeys(jobs, "")
    while True:
        try:
            stay = driver.remove([jobs[name] for name in stay])
        except EngineError as error:
            stay = dict.fromkeys(stay, str(error))
        if not stay or time.monotonic() > until:
            break
        time.sleep(poll_interval)
    return [
        Finding(
            WARNING,
            jobs[name].jid,
            f"it could not be removed: {why}",
            _BY_HAND[jobs[name].engine].format(job=jobs[name]),
        )
        for name, why in stay.items()
    ]
