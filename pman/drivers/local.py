"""This machine, with bash and nothing else: for trying things without a cluster.

Limits are not enforced and nothing is queued. A job goes on when the server ends, and is found by
what it leaves in its own folder: ``pid`` and the exit file of its script.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pman.drivers.slurm_states import Evidence, Row, ended
from pman.errors import EngineError, Rejected, Unavailable
from pman.jobs import Finding, Job, JobState, Observation, Severity, Verdict

LOG_BYTES = 256 << 10
"""Bytes of a log's tail, at the most."""

KILL_WAIT = 5.0
"""Seconds from SIGTERM to SIGKILL, at the most."""


# pman's own environment holds its settings, secrets among them.
_INHERITED = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR")


class LocalDriver:
    """Runs ``bare`` documents."""

    def __init__(self) -> None:
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def close(self) -> None:
        """Nothing is held; the jobs go on."""

    def test(self, jobs: Sequence[Job]) -> Mapping[str, Verdict]:
        return {job.name: _verdict(job) for job in jobs}

    def check(self) -> Sequence[Finding]:
        bash = shutil.which("bash")
        if bash is None:
            return [Finding(Severity.ERROR, "bash", "it is not on the PATH", "install bash")]
        return [Finding(Severity.OK, "bash", f"it is {bash}")]

    def submit(self, jobs: Sequence[Job]) -> Mapping[str, str | EngineError]:
        return {job.name: self._start(job) for job in jobs}

    def _start(self, job: Job) -> str | EngineError:
        if refusal := _refusal(job):
            return Rejected(refusal)
        folder = Path(job.spec.folder)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            script = folder / "script"
            script.write_text(job.document.text, encoding="utf-8")
            with (folder / "log").open("ab") as log:
                log.write(b"pman: runs on this machine, without a container and without limits\n")
                log.flush()
                process = subprocess.Popen(
                    ["bash", str(script)],
                    cwd=folder,
                    env={name: os.environ[name] for name in _INHERITED if name in os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._started[job.name] = process
            identity = _identity(process.pid) or str(process.pid)
            (folder / "pid").write_text(identity)
        except OSError as error:
            return Unavailable(f"the job could not be started: {error}")
        return identity

    def find(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        return {job.name: found for job in jobs if (found := self._found(job))}

    def _found(self, job: Job) -> str:
        folder = Path(job.spec.folder)
        if identity := _read(folder / "pid"):
            return identity
        # A crash came between the start and the note of it: the script knows its own pid.
        owner = _read(folder / "lock" / "owner")
        return _identity(int(owner)) or owner if owner.isdigit() else ""

    def observe(self, jobs: Sequence[Job]) -> Mapping[str, Observation]:
        return {job.name: seen for job in jobs if (seen := self._observe(job))}

    def _observe(self, job: Job) -> Observation | None:
        folder = Path(job.spec.folder)
        process = self._started.get(job.name)
        alive = process.poll() is None if process else _alive(job.engine_id)
        evidence = Evidence(exit=_read(folder / "exit"), reason=_read(folder / "reason"))
        if alive:  # it may have left its exit code and be about to go
            return Observation(JobState.RUNNING, "running", started_at=_changed(folder / "lock"))
        self._started.pop(job.name, None)
        row = Row(job.engine_id, job.name, "FAILED")
        if evidence.code is not None:
            row = Row(job.engine_id, job.name, "COMPLETED" if evidence.code == 0 else "FAILED")
        elif evidence.reason:
            pass
        elif process is not None and process.returncode < 0:
            row = Row(job.engine_id, job.name, "FAILED", exit_code=f"0:{-process.returncode}")
        elif process is not None:
            row = Row(job.engine_id, job.name, "FAILED", exit_code=f"{process.returncode}:0")
        else:
            return None
        return ended(job, row, evidence)

    def logs(self, job: Job, tail: int) -> str:
        try:
            with Path(job.spec.folder, "log").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_BYTES))
                lines = log.read(LOG_BYTES).splitlines(keepends=True)
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise Unavailable(f"the log can't be read: {error}") from None
        return b"".join(lines[-tail:] if tail else []).decode(errors="replace")

    def remove(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        stay = {}
        for job in jobs:
            identity = self._found(job)
            if not job.state.final:
                _end(identity)
            if process := self._started.pop(job.name, None):
                process.wait(timeout=10)
            try:
                shutil.rmtree(Path(job.spec.folder))
            except FileNotFoundError:
                pass
            except OSError as error:
                stay[job.name] = str(error)
        return stay


def _end(identity: str) -> None:
    """End a job's processes: politely, so that its script cleans up, then at once."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        if not _alive(identity):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(identity.partition("@")[0]), name)
        deadline = time.monotonic() + KILL_WAIT
        while _alive(identity) and time.monotonic() < deadline:
            time.sleep(0.02)


def _identity(pid: int) -> str:
    """``pid@start``: a pid is used again, its start time in clock ticks since boot is not
    (proc_pid_stat(5), field 22). Empty when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state == "Z" else f"{pid}@{fields[18]}"


def _alive(identity: str) -> bool:
    pid = identity.split("@", maxsplit=1)[0]
    return pid.isdigit() and identity == _identity(int(pid))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _changed(path: Path) -> datetime | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return None


def _refusal(job: Job) -> str:
    """Why this machine does not run ``job``; empty: it does."""
    workers = job.spec.number_of_workers
    return f"local runs one worker, and the job asks for {workers}" if workers > 1 else ""


def _verdict(job: Job) -> Verdict:
    refusal = _refusal(job)
    return Verdict(not refusal, refusal or "this machine has no queue: it would start at once")
