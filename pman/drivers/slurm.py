"""Slurm by its own commands on the login node: sbatch, squeue, sacct, scancel.

Each of the driver's calls is one shell command, however many jobs it is about.
"""

import io
import tarfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pman.drivers import slurm_check
from pman.drivers import slurm_states as states
from pman.drivers import slurm_verdict as verdicts
from pman.drivers.slurm_cluster import Cluster
from pman.drivers.slurm_queue import (
    ACCOUNTED,
    CLEAN,
    FIELD,
    NO_ACCOUNTING,
    QUEUED,
    RECORD,
    SQUEUE,
    answered,
    decoded,
    one_line,
    reason,
    rows,
)
from pman.drivers.slurm_states import Evidence, Row
from pman.drivers.slurm_verdict import Answer
from pman.errors import Ambiguous, EngineError, Rejected, Unavailable
from pman.jobs import Finding, Job, JobState, Observation, Verdict
from pman.shell import Shell

LOG_BYTES = 256 << 10
"""Bytes of a log's tail, at the most."""

BATCH = 500
"""Jobs whose end is asked for in one call of sacct, at the most."""

DISK_LAGS = timedelta(seconds=60)
"""How long a shared disk may take to show on the login node what a compute node wrote."""

_ACCOUNTING_RETRY = 600.0
"""Seconds after which sacct is asked again at a site that said it has no accounting."""

_SBATCH_SECONDS = 60
_SUBMIT = (
    CLEAN
    + r"""
storebase=$1 seconds=$2
shift 2
# An empty one is a disk that is not mounted: ChRIS's data would be there.
if [ -z "$(find "$storebase" -mindepth 1 -maxdepth 1 -print -quit)" ]; then
    echo "$storebase is not there, or empty: is the disk mounted?" >&2
    exit 1
fi
err=$(mktemp) || exit
trap 'rm -f -- "$err"' EXIT
# For these folders alone: sbatch hands its own umask on to the job.
(umask 077 && mkdir -p -- "$@" && tar --absolute-names --extract --file=-) || exit
for folder; do
    id=$(timeout "$seconds" sbatch --parsable "$folder/script" 2> "$err" < /dev/null)
    code=$?
    words=$(head -c 4000 -- "$err" | tr -d '\036\037')
    printf '%s\037%s\037%s\037%s\036' "${folder##*/}" "$code" "$id" "$words"
    case $words in *'Unable to contact slurm controller'*) break ;; esac
done
exit 0
"""
)

_FIND = (
    SQUEUE
    + r"""
names=$1 since=$2
shift 2
queue --me --name="$names" || exit
printf '\036'
account --name="$names" --starttime="now-${since}"
printf '\036'
for folder; do
    owner=$(head -c 40 -- "$folder/lock/owner" 2> /dev/null | tr '\n' ' ')
    printf '%s\037%s\n' "${folder##*/}" "$owner"
done
exit 0
"""
)

_QUEUE = SQUEUE + 'queue --me "$@"\n'

_EVIDENCE = (
    SQUEUE
    + r"""
ids=$1
shift
if [ -n "$ids" ]; then
    account --jobs="$ids"
    printf '\036%s' "$?"
else
    printf '\036'
fi
printf '\036'
part() { [ ! -f "$1" ] || head -c 1000 -- "$1" | tr -d '\036\037'; printf '\037'; }
for folder; do
    [ -d "$folder" ] || continue  # pman made it: the disk that it is on is away
    printf '%s\037' "${folder##*/}"
    part "$folder/exit"
    part "$folder/lock/owner"
    part "$folder/reason"
    [ ! -f "$folder/log" ] || tail -c 65536 -- "$folder/log" |
        grep -aE '^(slurmstepd|srun)[^ ]*: error: ' | tail -n 5 | tr -d '\036\037'
    printf '\036'
done
exit 0
"""
)

_LOGS = r"""
[ -d "$1" ] || { echo "$1 is not there" >&2; exit 1; }
[ -f "$1/log" ] || exit 0
# The bytes first: a line without an end would have all of the file read.
tail -c "$3" -- "$1/log" | tail -n "$2"
"""

_REMOVE = r"""
ids=$1
shift
[ -z "$ids" ] || scancel $ids || exit
for folder; do
    why=$(rm -rf -- "$folder" 2>&1) || printf '%s\037%s\036' "${folder##*/}" "$why"
done
exit 0
"""

_TEST = CLEAN + verdicts.TEST

# What sbatch says, and what it means; the first that fits. Anything else is a refusal.
_VERDICTS: Sequence[tuple[str, type[EngineError]]] = (
    ("perjob", Rejected),  # as in QOSMaxWallDurationPerJobLimit: it is over it whenever it comes
    ("unable to contact slurm controller", Unavailable),
    ("connection refused", Unavailable),
    ("slurm temporarily unable to accept job", Unavailable),
    ("resource temporarily unavailable", Unavailable),
    ("accounting/qos policy", Unavailable),
    ("maxsubmit", Unavailable),
    ("submit limit", Unavailable),
    ("job limit", Unavailable),
    ("rate limit", Unavailable),
    ("standby", Unavailable),
    ("command not found", Unavailable),
    ("failed to run command", Unavailable),
    ("unable to open file", Unavailable),
    ("no space left", Unavailable),
    ("quota exceeded", Unavailable),
    ("partition not available", Unavailable),
    ("protocol authentication", Unavailable),
    ("munge", Unavailable),
    ("auth_g_create", Unavailable),
    ("incompatible versions", Unavailable),
    ("could not establish a configuration", Unavailable),
    ("i/o error writing script", Unavailable),
    ("i/o error", Ambiguous),
    ("job credential", Ambiguous),
    ("unexpected message", Ambiguous),
    ("timed out", Ambiguous),
    ("zero bytes were transmitted", Ambiguous),
    ("communication", Ambiguous),
)

# Of these the ones that are about the job or its partition: everybody else's jobs go on.
_LATER = (
    "accounting/qos policy",
    "maxsubmit",
    "submit limit",
    "job limit",
    "partition not available",
)


class SlurmDriver:
    """Slurm behind ``shell``; the jobs' own folders lie on the shared disk."""

    def __init__(self, shell: Shell, storebase: Path, jobs_dir: Path, poll_interval: float) -> None:
        self._shell = shell
        self._storebase = str(storebase)
        self._jobs_dir = str(jobs_dir)
        self._poll_interval = poll_interval
        self._no_accounting_until = 0.0

    def close(self) -> None:
        self._shell.close()

    def submit(self, jobs: Sequence[Job]) -> Mapping[str, str | EngineError]:
        result = self._shell.run(
            _SUBMIT,
            self._storebase,
            str(_SBATCH_SECONDS),
            *(job.spec.folder for job in jobs),
            stdin=_archive({f"{job.spec.folder}/script": job.document.text for job in jobs}),
            timeout=_SBATCH_SECONDS + 2.0 * len(jobs),
            repeatable=False,
        )
        if result.truncated or result.code >= 128:
            raise Ambiguous(f"the submission on {self._shell.where} was cut off")
        if result.code:
            raise Unavailable(
                f"no script could be written on {self._shell.where}: {reason(result.stderr)}; "
                "check STOREBASE, JOBS_DIR and the account's rights",
                "the shared disk can't be written",
            )
        outcomes: dict[str, str | EngineError] = {
            job.name: Unavailable("Slurm's controller could not be reached") for job in jobs
        }
        for record in decoded(result.stdout).split(RECORD)[:-1]:
            name, code, answer, words = record.split(FIELD, 3)
            # `id`, or `id;cluster`; a site's own wrapper may say more before it
            number = answer.strip().rpartition("\n")[2].partition(";")[0]
            outcomes[name] = number if code == "0" and number.isdigit() else _verdict(code, words)
        return outcomes

    def find(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        names = ",".join(job.name for job in jobs)
        oldest = min(job.accepted_at or datetime.now(UTC) for job in jobs)
        since = int((datetime.now(UTC) - oldest).total_seconds()) + 3600
        result = self._shell.run(
            _FIND, names, f"{since}seconds", *(job.spec.folder for job in jobs), timeout=60
        )
        answered(result, "squeue", self._shell.where)
        queue, account, owners = decoded(result.stdout).split(RECORD)
        wanted = {job.name for job in jobs}
        found = {row.name: row.id for row in [*rows(account, ACCOUNTED), *rows(queue, QUEUED)]}
        for line in owners.splitlines():
            name, _, owner = line.partition(FIELD)
            if (owner := owner.strip()).isdecimal():
                found[name] = owner
        return {name: number for name, number in found.items() if name in wanted}

    def observe(self, jobs: Sequence[Job]) -> Mapping[str, Observation]:
        rows = self._queue()
        own = {(row.id, row.name): row for row in rows}
        # A lost answer can have left a job under two ids: the one that gets somewhere counts.
        ahead = {row.name: row for row in rows if row.state in (*states.RUNNING, "COMPLETED")}
        seen: dict[str, Observation] = {}
        over: dict[str, tuple[Job, Row | None]] = {}
        for job in jobs:
            row = own.get((job.engine_id, job.name))
            other = ahead.get(job.name)
            if other is not None and (row is None or row.state in states.WAITING):
                seen[job.name] = _follow(job, other.id)
            elif row is None or row.state in states.ENDED:
                over[job.name] = job, row
            else:
                seen[job.name] = _not_back(job, states.unended(row))
        if over:
            names = [*over]
            for start in range(0, len(names), BATCH):
                seen |= self._ends({name: over[name] for name in names[start : start + BATCH]})
        return seen

    def _queue(self, *options: str) -> list[Row]:
        result = self._shell.run(_QUEUE, *options, timeout=60, limit=64 << 20)
        answered(result, "squeue", self._shell.where)
        return rows(decoded(result.stdout), QUEUED)

    def _ends(self, over: Mapping[str, tuple[Job, Row | None]]) -> Mapping[str, Observation]:
        """What became of jobs that squeue does not show as alive."""
        ask = time.monotonic() >= self._no_accounting_until
        ids = ",".join(job.engine_id for job, _ in over.values()) if ask else ""
        result = self._shell.run(
            _EVIDENCE,
            ids,
            *(job.spec.folder for job, _ in over.values()),
            timeout=60,
            limit=64 << 20,
        )
        answered(result, "the shared disk", self._shell.where)
        account, code, *records = decoded(result.stdout).split(RECORD)
        doubt = ""
        if code not in ("", "0"):
            if NO_ACCOUNTING in account.lower():
                self._no_accounting_until = time.monotonic() + _ACCOUNTING_RETRY
            else:
                doubt = f"the accounting does not answer: {reason(account.encode())}"
        accounted = {(row.id, row.name): row for row in rows(account, ACCOUNTED)}
        evidence = {}
        for record in records[:-1]:
            name, *parts = record.split(FIELD, 4)
            evidence[name] = Evidence(*(part.strip() for part in parts))
        seen = {}
        for name, (job, queued) in over.items():
            left = evidence.get(name, Evidence())
            away = "" if name in evidence else f"{job.spec.folder} is not there on the login node"
            found = _end(job, queued, accounted.get((job.engine_id, name)), left)
            if found is None and (doubt or away):
                found = Observation(job.state, f"not in Slurm's queue any more; {doubt or away}")
            if found is not None:
                seen[name] = found
        return seen

    def logs(self, job: Job, tail: int) -> str:
        result = self._shell.run(
            _LOGS, job.spec.folder, str(tail), str(LOG_BYTES), timeout=20, limit=LOG_BYTES
        )
        if result.code:
            raise Unavailable(f"the log can't be read: {reason(result.stderr)}")
        return result.stdout.decode(errors="replace")

    def remove(self, jobs: Sequence[Job]) -> Mapping[str, str]:
        # By name: ids are used again, and a lost answer can have left a job under an unknown one.
        rows = self._queue(f"--name={','.join(job.name for job in jobs)}")
        names = {job.name for job in jobs}
        ids = [row.id for row in rows if row.name in names and row.state not in states.ENDED]
        result = self._shell.run(
            _REMOVE, " ".join(ids), *(job.spec.folder for job in jobs), timeout=60 + len(jobs)
        )
        if result.code:
            raise Unavailable(f"scancel does not answer: {reason(result.stderr)}")
        records = decoded(result.stdout).split(RECORD)[:-1]
        return dict(record.split(FIELD, 1) for record in records)

    def test(self, jobs: Sequence[Job]) -> Mapping[str, Verdict]:
        scripts = {str(number): job.document.text for number, job in enumerate(jobs)}
        result = self._shell.run(
            _TEST,
            str(_SBATCH_SECONDS),
            stdin=_archive(scripts),
            timeout=4 * _SBATCH_SECONDS,  # the script ends before by itself, and clears up
            limit=64 << 20,
        )
        if result.code or result.truncated:
            words = "its answer is too long" if result.truncated else reason(result.stderr)
            raise Unavailable(f"sbatch can't be asked on {self._shell.where}: {words}")
        answers, cluster = verdicts.read(decoded(result.stdout))
        found = [_judged(answer, cluster) for answer in answers]
        if len(found) < len(jobs):
            raise Unavailable(f"sbatch was not asked about every job on {self._shell.where}")
        return {job.name: verdict for job, verdict in zip(jobs, found, strict=True)}

    def check(self) -> Iterable[Finding]:
        return slurm_check.check(self._shell, self._storebase, self._jobs_dir, self._poll_interval)


def _end(job: Job, queued: Row | None, accounted: Row | None, left: Evidence) -> Observation | None:
    """How ``job`` ended by squeue, then sacct, then its folder; None: none of them tells."""
    if left.owner.isdecimal() and left.owner != job.engine_id:
        # This one found the lock taken: the job that took it is the one to follow.
        return _follow(job, left.owner)
    over = states.over(queued, accounted)
    if over is None:
        return states.left(job, left) or _unended(job, accounted)
    trace = left.exit or left.owner or left.reason
    if over.state == "FAILED" and not trace and not _long_missing(job):
        return None  # a duplicate that found the lock taken, on a disk that does not show it yet?
    return states.ended(job, over, left)


def _unended(job: Job, accounted: Row | None) -> Observation | None:
    """sacct lags behind, or Slurm's controller forgot the job."""
    if accounted is None:
        return None
    says = f"not in Slurm's queue any more; the accounting says {accounted.state}"
    return Observation(job.state, says)


def _long_missing(job: Job) -> bool:
    since = job.missing_since
    return since is not None and datetime.now(UTC) - since > DISK_LAGS


def _follow(job: Job, engine_id: str) -> Observation:
    return Observation(job.state, f"runs as Slurm's job {engine_id}", engine_id=engine_id)


def _not_back(job: Job, seen: Observation) -> Observation:
    """A running job that Slurm queued again: it can't run twice, and it does not go back."""
    if job.state is JobState.RUNNING and seen.state is JobState.QUEUED:
        return replace(
            seen,
            state=JobState.RUNNING,
            message=f"put back into the queue by Slurm; {seen.message}",
        )
    return seen


def _archive(texts: Mapping[str, str]) -> bytes:
    """A tar of files by name."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, text in texts.items():
            data = text.encode()
            file = tarfile.TarInfo(name)
            file.size, file.mode = len(data), 0o600
            tar.addfile(file, io.BytesIO(data))
    return archive.getvalue()


def _judged(answer: Answer, cluster: Cluster) -> Verdict:
    """The verdict in what sbatch said. Raises Unavailable when it is about Slurm, not the job."""
    said = one_line(answer.words)
    if answer.code == "0":
        return verdicts.accepted(answer, said, cluster)
    error = _verdict(answer.code, answer.words)
    if isinstance(error, Rejected):
        return verdicts.refused(answer, said, cluster)
    if any(words in said.lower() for words in _LATER):
        return verdicts.later(said)
    raise Unavailable(f"Slurm can't be asked: {error}", error.summary)


def _verdict(code: str, words: str) -> EngineError:
    said = one_line(words)
    if code == "124":
        return Ambiguous(f"sbatch did not answer within {_SBATCH_SECONDS} s")
    if code in ("126", "127"):
        return Unavailable(f"sbatch can't be run on the login node: {said}")
    # Killed by a signal, or without a word: it may have done its work. 255 is a refusal.
    if code == "0" or not said or 128 <= int(code) < 255:
        return Ambiguous(f"sbatch ended with exit code {code} and without a job id {said}".rstrip())
    for pattern, kind in _VERDICTS:
        if pattern in words.lower():
            return kind(said)
    return Rejected(f"refused by Slurm: {said}")
