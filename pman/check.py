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
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from pman import findings, probing
from pman.drivers import ENGINES
from pman.errors import SettingsError, SiteError, SourceError
from pman.jobs import Finding, Severity
from pman.languages import LANGUAGES
from pman.settings import Settings, load
from pman.sources import Sources, read
from pman.templates import plain_spec, render_by, tried_out
from pman.worker import Worker

OK, WARNING, ERROR = Severity.OK, Severity.WARNING, Severity.ERROR

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
        yield from _of_settings_error(error)
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
            yield from _of_settings_error(error)
            return
        broken = yield from _telling(driver.check())
        if worker is not None and not broken:
            verdicts = probing.of_verdicts(driver, probing.sample_jobs(settings, worker))
            broken = yield from _telling(verdicts)
            if deep and not broken:
                jobs = probing.probes(settings, worker)
                yield from probing.run(driver, jobs, settings.poll_interval, stopped)
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


def _of_settings_error(error: SettingsError) -> Iterator[Finding]:
    for line in str(error).splitlines():
        yield Finding(ERROR, "settings", line, "docs/settings.md has every setting")


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
    if settings.container_env in ("slurm", "cromwell"):
        yield from _way_to_slurm(settings)
    if settings.container_env == "slurm" and settings.timelimit_minutes is None:
        yield Finding(
            OK,
            "TIMELIMIT_MINUTES",
            "not set: each job has the time limit that its partition gives by default",
        )
    yield from _without_effect(settings)
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


def _way_to_slurm(settings: Settings) -> Iterator[Finding]:
    unused = _given(settings, "ssh_(?!host)")
    if unused and not settings.ssh_host:
        here = "Slurm's commands run on this machine"
        if settings.container_env == "cromwell":
            here = "Slurm is not asked"
        yield Finding(
            WARNING,
            "SSH_HOST",
            f"it is empty, so {here} and {_no_effect(unused)}",
            "set SSH_HOST, or leave the others out",
        )
    if settings.poll_interval < 1:
        yield Finding(
            WARNING,
            "POLL_INTERVAL",
            f"{settings.poll_interval:g} s: sites ban a gateway that asks Slurm so often",
            "set it to 2 or more",
        )


def _without_effect(settings: Settings) -> Iterator[Finding]:
    engine = settings.container_env
    others = "jobs_dir" if engine == "cromwell" else "cromwell_.*"
    for name in _given(settings, others):
        text = f"on {engine} {_no_effect([name])}"
        yield Finding(WARNING, name, text, "leave it out, or is CONTAINER_ENV another one?")


def _given(settings: Settings, pattern: str) -> list[str]:
    """The settings that are set, as far as their names begin like that."""
    return sorted(name.upper() for name in settings.model_fields_set if re.match(pattern, name))


def _no_effect(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect"


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
    folders = [language.folder for language in LANGUAGES.values()]
    for path in sources.templates:
        if path.partition("/")[0] not in folders:
            text = f"{path} is in no folder that templates are looked for in"
            yield Finding(WARNING, "templates", text, f"move it to {'/ or '.join(folders)}/")
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
        other = ", or use the template podman" if document.language == "sbatch" else ""
        yield Finding(WARNING, "SHM_SIZE", text, f"leave it out{other}")
