"""`pman check`: each thing that jobs need, looked at, and a finding for it.

It changes nothing, but for a file made and removed again in a folder that must be writable; and
`deep` runs jobs, which it removes.
"""

import difflib
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pman import findings
from pman.drivers import ENGINES, Driver
from pman.errors import EngineError, Refusal, SettingsError, SiteError, SourceError
from pman.jobs import Finding, Job, JobState, Severity
from pman.languages import LANGUAGES
from pman.samples import Sample
from pman.settings import Settings, load
from pman.sources import Sources, read
from pman.templates import plain_spec, probe_by, render_by, tried_out
from pman.worker import Worker

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR

TEST_SECONDS = 180.0
"""How long the jobs of `deep` may take, waiting included."""

DATABASE_SPACE = 100 << 10
"""KiB of free space that pman's database needs."""

_ENV_FILE = Path(".env")

_REMOTE = re.compile(r"nfs\d?|lustre|gpfs|beegfs|ceph|cifs|smb3|afs|9p|fuse\..*")
"""Types of file systems (/proc/self/mounts) on which SQLite's locks can't be trusted."""


def check(deep: bool, stopped: threading.Event) -> Iterator[Finding]:
    """Every finding, as soon as it is there; with ``deep`` those of test jobs too.

    Once ``stopped`` is set, no test job is begun, and those that run are removed.
    """
    yield from misspelt()
    try:
        settings = load()
    except SettingsError as error:
        for line in str(error).splitlines():
            yield Finding(ERROR, "settings", line, "docs/settings.md has every setting")
        return
    yield from of_settings(settings)
    yield from of_state_dir(settings.state_dir)
    with ExitStack() as until_the_end:
        worker: Worker | None = None
        try:
            sources = read(settings.templates_dir, settings.site_file)
            worker = until_the_end.enter_context(tried_out(sources, settings))
            yield from of_templates(settings, sources, worker)
        except SourceError as error:
            yield from of_error(error)
        try:
            driver = until_the_end.enter_context(
                closing(ENGINES[settings.container_env].make(settings))
            )
        except SettingsError as error:
            yield Finding(ERROR, "settings", str(error))
            return
        broken = yield from _telling(driver.check())
        if worker is not None and not broken:
            broken = yield from _telling(of_verdicts(driver, sample_jobs(settings, worker)))
            if deep and not broken:
                jobs = probes(settings, worker)
                yield from run(driver, jobs, settings.poll_interval, stopped)
                return
        if deep:
            yield Finding(WARNING, "test jobs", "not run: there are errors", "mend those first")


def _telling(findings: Iterable[Finding]) -> Generator[Finding, None, bool]:
    """All of ``findings``; returns whether there was an error among them."""
    broken = False
    for finding in findings:
        yield finding
        broken = broken or finding.severity is ERROR
    return broken


# --- settings ---


def misspelt() -> Iterator[Finding]:
    """Names in the environment and in ``.env`` that are nearly a setting's. No values: they may be
    secrets."""
    known = {name.upper() for name in Settings.model_fields}
    places = {"the environment": os.environ, str(_ENV_FILE): _names(_ENV_FILE)}
    for place, names in places.items():
        for name in names:
            near = difflib.get_close_matches(name.upper(), known, 1, cutoff=0.82)
            if near and name.upper() not in known:
                yield Finding(
                    WARNING,
                    "settings",
                    f"{name} in {place} is no setting",
                    f"did you mean {near[0]}?",
                )


def _names(file: Path) -> list[str]:
    """The variables that a file of the form of ``.env`` sets."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return []
    return re.findall(r"^\s*(?:export\s+)?(\w+)\s*=", text, re.M)


def of_settings(settings: Settings) -> Iterator[Finding]:
    """Settings that can be, and will hardly be meant."""
    yield Finding(OK, "settings", f"they can be read: jobs run on {settings.container_env}")
    yield from _secrets(settings)
    if settings.container_env == "slurm":
        yield from _slurm(settings)
    if 0 < settings.lost_after < (least := max(60, 5 * settings.poll_interval)):
        yield Finding(
            WARNING,
            "LOST_AFTER",
            f"{settings.lost_after} s: a job can be called lost while the accounting or the shared "
            "disk lags behind",
            f"set it to {least:g} or more; 3600 is the default",
        )


def _secrets(settings: Settings) -> Iterator[Finding]:
    key = settings.ssh_key_file
    if settings.ssh_host and key is not None:
        if not os.access(key, os.R_OK):
            text = f"{key} is not there, or this user can't read it"
            yield Finding(ERROR, "SSH_KEY_FILE", text, "run `pman check` as the user of pman")
        elif _open_to_others(key):
            yield Finding(WARNING, "SSH_KEY_FILE", f"others can read {key}", f"chmod 600 {key}")
    if "API_TOKEN" in map(str.upper, _names(_ENV_FILE)) and _open_to_others(_ENV_FILE):
        text = f"others can read {_ENV_FILE.absolute()}, where it is set"
        yield Finding(WARNING, "API_TOKEN", text, f"chmod 600 {_ENV_FILE.absolute()}")


def _open_to_others(file: Path) -> bool:
    return bool(file.stat().st_mode & 0o077)


def _slurm(settings: Settings) -> Iterator[Finding]:
    unused = sorted(
        name.upper() for name in settings.model_fields_set if re.match("ssh_(?!host)", name)
    )
    if unused and not settings.ssh_host:
        yield Finding(
            WARNING,
            "SSH_HOST",
            f"it is empty, so Slurm's commands run on this machine and {', '.join(unused)} "
            f"{'has' if len(unused) == 1 else 'have'} no effect",
            "set SSH_HOST, or leave the others out",
        )
    if settings.poll_interval < 1:
        yield Finding(
            WARNING,
            "POLL_INTERVAL",
            f"{settings.poll_interval:g} s: sites ban a gateway that asks Slurm so often",
            "set it to 2 or more",
        )
    if settings.timelimit_minutes is None:
        yield Finding(
            OK,
            "TIMELIMIT_MINUTES",
            "not set: each job has the time limit that its partition gives by default",
        )


# --- STATE_DIR ---


def of_state_dir(folder: Path) -> Iterator[Finding]:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    mend = "set STATE_DIR to a folder of pman's user on a local disk"
    if not there.is_dir():
        yield Finding(ERROR, "STATE_DIR", f"{folder} can't be used: {there} is no folder", mend)
        return
    if not os.access(there, os.W_OK | os.X_OK):
        text = f"{there} can't be written by this user"
        yield Finding(ERROR, "STATE_DIR", text, f"run `pman check` as the user of pman; {mend}")
        return
    state = "is in use by a running pman" if in_use(folder) else "can be used"
    yield Finding(OK, "STATE_DIR", f"{folder} {state}")
    free = shutil.disk_usage(there).free >> 10
    yield findings.space(free, "STATE_DIR", "its disk", least=DATABASE_SPACE)
    kind = file_system(there, Path("/proc/self/mounts").read_text())
    if _REMOTE.fullmatch(kind):
        text = f"{folder} is on a network disk ({kind}), where SQLite's locks are not safe"
        yield Finding(WARNING, "STATE_DIR", text, "set it to a folder on a local disk")


def in_use(folder: Path) -> bool:
    """Whether a server runs on this STATE_DIR. The lock is held for no longer than the question."""
    try:
        with (folder / "lock").open() as claim:
            fcntl.flock(claim, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system of ``path``, by the text of /proc/self/mounts (fstab(5))."""
    kinds = {}
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split(" ")
        kinds[Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))] = kind
    real = path.resolve()
    return next((kinds[folder] for folder in (real, *real.parents) if folder in kinds), "")


# --- templates and SITE_FILE ---


def of_error(error: SourceError) -> Iterator[Finding]:
    """What is wrong with templates or SITE_FILE, each thing for itself."""
    remedy = "mend it there; a running pman goes on with the last good ones until then"
    if isinstance(error, SiteError):
        for problem in error.problems:
            yield Finding(ERROR, "SITE_FILE", str(problem), remedy)
    else:
        yield Finding(ERROR, "templates", str(error), remedy)


def of_templates(settings: Settings, sources: Sources, worker: Worker) -> Iterator[Finding]:
    """Templates and SITE_FILE that could be used."""
    for warning in worker.warnings:
        yield Finding(WARNING, "SITE_FILE", warning)
    folders = {language.folder for language in LANGUAGES.values()}
    for path in sources.templates:
        if path.partition("/")[0] not in folders:
            text = f"{path} is in no folder that templates are looked for in"
            yield Finding(WARNING, "templates", text, f"move it to {' or '.join(folders)}/")
    plain = worker.samples(plain_spec(settings))[0].spec
    document = render_by(worker, settings, plain)
    own = len(sources.templates)
    yield Finding(
        OK,
        "templates",
        f"{document.template} renders jobs of every kind; templates of the site's own: {own}",
    )
    if plain.shm_size and document == render_by(worker, settings, replace(plain, shm_size=None)):
        text = f"it has no effect: the template {document.template} does not use it"
        yield Finding(WARNING, "SHM_SIZE", text, "leave it out, or use the template podman")


# --- what the scheduler says ---


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


def of_verdicts(driver: Driver, jobs: Mapping[str, tuple[Sample, Job]]) -> Iterator[Finding]:
    """What the scheduler says of a plain job, and of one for each rule of SITE_FILE."""
    try:
        verdicts = driver.test([job for _, job in jobs.values()])
    except EngineError as error:
        yield Finding(WARNING, "verdict", f"the scheduler can't be asked: {error}", "try again")
        return
    for name, (sample, _) in jobs.items():
        verdict = verdicts[name]
        if not verdict.accepted:
            text = f"{sample.what} is refused: {verdict.message}"
            yield Finding(ERROR, "verdict", text, _remedy("refused by Slurm"))
        for warning in verdict.warnings:
            yield Finding(WARNING, "verdict", f"{sample.what} is accepted, and {warning}")
        if verdict.accepted and not verdict.warnings:
            yield Finding(OK, "verdict", f"{sample.what} is accepted: {verdict.message}")


# --- test jobs ---

PROBES = 8
"""Test jobs of `deep`, at the most."""


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
    try:
        yield from _ends(driver, jobs, poll_interval, stopped, within)
    finally:
        left = _remove(driver, jobs)
    yield from left


def _ends(
    driver: Driver,
    jobs: Sequence[Job],
    poll_interval: float,
    stopped: threading.Event,
    within: float,
) -> Iterator[Finding]:
    began = time.time()
    sent = [replace(job, accepted_at=datetime.now(UTC)) for job in jobs]
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
    doubt = ""
    while going and time.time() - began < within and not stopped.wait(poll_interval):
        try:
            seen = driver.observe([*going.values()])
            doubt = ""
        except EngineError as error:
            doubt = str(error)
            continue
        for name, observation in seen.items():
            going[name] = job = replace(
                going[name],
                state=observation.state,
                message=observation.message,
                engine_id=observation.engine_id or going[name].engine_id,
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
        "the (in|out)put folder",
        "have STOREBASE mounted there, or leave such nodes out: `constraint` or "
        "`directives` in SITE_FILE",
    ),
    ("is not on the node", "install it there, or load it by `setup` in SITE_FILE"),
    ("scratch folder", "TMPDIR of the nodes must be a folder that the account can write"),
    ("refused by Slurm", "compare SITE_FILE with `sinfo -s` and `sacctmgr show associations`"),
    ("will not start unless", "compare SITE_FILE with `scontrol show partition`"),
    ("waiting: ", "try again when the cluster is less busy, or see `squeue --start`"),
)
"""What to do, by what a test job's message holds; the first pattern that fits."""


def _remedy(message: str) -> str:
    return next((remedy for words, remedy in _REMEDIES if re.search(words, message)), "")


def _remove(driver: Driver, jobs: Iterable[Job]) -> list[Finding]:
    """What of the jobs is left."""
    known = {job.name: job for job in jobs}
    try:
        stay = driver.remove([*known.values()])
    except EngineError as error:
        stay = dict.fromkeys(known, str(error))
    return [
        Finding(
            WARNING,
            known[name].jid,
            f"it could not be removed: {why}",
            f"scancel --name={name}; rm -r {known[name].spec.folder}",
        )
        for name, why in stay.items()
    ]
